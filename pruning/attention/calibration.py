"""What was found for the heads of one model, on disk: thresholds, heads to change, gates."""

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_prune.vlm.checkpoint import check_finite
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.files import atomic_path, open_regular
from vlm_prune.vlm.common.state import writing
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.sparse_attention import replaced_attention
from vlm_prune.vlm.weight_samples import same_samples, weight_samples

SAMPLES, ABOUT = "model.samples", "about"


@dataclass(frozen=True)
class HeadCalibration:
    """What was found for a model's heads, with samples of the model's weights.

    Args:
        method: registered name of the method of sparse attention that it is for.
        tensors: by name, `layers.<number>.<what>`.
        samples: weights of the model, of `weight_samples`.
        about: how it was found, plain values by name.
    """

    method: str
    tensors: Mapping[str, Tensor]
    samples: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, method: str, tensors: Mapping[str, Tensor], model: Any, **about: Any) -> Self:
        """Returns what was found for a model.

        Args:
            method: registered name of the method that it is for.
            tensors: by name.
            model: of a supported family.
            about: how it was found.
        """
        return cls(method, tensors, weight_samples(family_of(model)), about)

    def of_layers(self, what: str) -> dict[int, Tensor]:
        """Returns the tensors `layers.<number>.<what>` by the number of their layer."""
        parts = {tuple(name.split(".", 2)): tensor for name, tensor in self.tensors.items()}
        return {
            int(number): tensor
            for (_, number, own), tensor in parts.items()
            if own == what and number.isdecimal()
        }

    def save(self, path: str | Path) -> None:
        """Writes all of it to a safetensors file, or nothing.

        Raises:
            InputError: if `path` names no file.
            OSError: if it cannot be written.
        """
        path = Path(path)
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()
        }
        described = {"method": self.method, **self.about}
        text = msgspec.json.encode(described).decode()
        with atomic_path(path) as partial, writing(path):
            save_file(tensors | {SAMPLES: self.samples}, partial, {"format": "pt", ABOUT: text})

    @classmethod
    def read(cls, path: str | Path, method: str) -> Self:
        """Reads what `save` wrote.

        Args:
            path: of the file.
            method: registered name of the method that it must be for.

        Raises:
            InputError: if the file is missing, damaged, or of another method.
        """
        path = Path(path)
        open_regular(path).close()
        try:
            with safe_open(path, "pt") as file:
                about = msgspec.json.decode((file.metadata() or {})[ABOUT], type=dict[str, Any])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            found, samples = str(about.pop("method")), tensors.pop(SAMPLES)
            if not all(len(name.split(".", 2)) == 3 for name in tensors):
                raise ValueError("its tensors are named otherwise")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"{path} holds nothing that vlm-prune calibrate wrote ({first_line(error)})"
            ) from error
        if found != method:
            raise InputError(f"{path} is for {found}, not for {method}; give one for {method}")
        check_finite(tensors)
        return cls(method, tensors, samples, about)

    def check(self, model: Any, source: str) -> None:
        """Raises `InputError` unless the model is the one that this was found for.

        Args:
            model: of a supported family.
            source: where this was read, for the message.
        """
        if not same_samples(self.samples, weight_samples(family_of(model))):
            raise InputError(
                f"{source} is of another model, as its weights tell; "
                f"make one for this model with vlm-prune calibrate {self.method}"
            )


@torch.no_grad()
def read_prompts(model: Any, run: Any, prompts: Iterable[Mapping[str, Any]]) -> int:
    """Runs prompts through a model whose attention `run` computes; returns how many rows they had.

    Args:
        model: of a supported family.
        run: as for `replaced_attention`.
        prompts: what the model's processor gives for them.

    Raises:
        InputError: if the model's attention cannot be replaced.
    """
    count = 0
    with replaced_attention(model, run):
        for inputs in prompts:
            model(**inputs, use_cache=False, logits_to_keep=1)
            count += len(inputs["input_ids"])
    return count


def check_found(found: Sized, name: str, minimum: int) -> None:
    """Raises `InputError` if nothing was found, as every prompt was too short.

    Args:
        found: by layer.
        name: of the method, for the message.
        minimum: tokens of the shortest prompt that the method is used on.
    """
    if not found:
        raise InputError(
            f"no prompt has the {minimum} tokens of those that {name} is used on; give longer "
            "ones, or minimum=1 for shorter ones"
        )
