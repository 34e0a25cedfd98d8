"""What a server keeps of each image: one object that vLLM hands to all of its processes."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch

from vlm_prune.pruning.base import VisionPruner
from vlm_prune.pruning.downsample import Downsample
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.families import FAMILIES, Need
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.tokens import VisionTokens

KEY = "vlm_prune"
ENVIRONMENT = "VLM_PRUNE"
FREE_SHARE = 0.9  # of a GPU's free memory, for engines


@dataclass(frozen=True)
class Settings:
    """A pruning method and its hyperparameters, the same for every request of a server.

    Args:
        method: registered name; `none` serves the unpruned model.
        budget: image tokens kept per image, or a fraction of them in (0, 1].
        seed: for methods that draw random numbers.
        arguments: further hyperparameters of the method.
    """

    method: str
    budget: int | float = 64
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Any) -> Self:
        """Reads the settings from a mapping, as it comes from JSON.

        Raises:
            InputError: if a key is unknown, the method is, or it cannot run in vLLM.
        """
        if not isinstance(values, Mapping) or "method" not in values:
            raise InputError(f'{KEY} is {values!r}; give {{"method": "zoo", "budget": 64}}')
        known: dict[str, Any] = {
            "method": str, "budget": int | float, "seed": int, "arguments": Mapping
        }  # fmt: skip
        for key, value in values.items():
            if key not in known:
                raise InputError(unknown(f"{KEY} setting", str(key), list(known)))
            if not isinstance(value, known[key]) or isinstance(value, bool):
                raise InputError(f"{KEY} {key} cannot be {value!r}")
        settings = cls(**values)
        check(settings.method, settings.pruner())
        return settings

    @classmethod
    def find(cls, additional_config: Any) -> Self | None:
        """Returns the settings in vLLM's `additional_config`, else in the
        environment's `VLM_PRUNE`; None if there are none.

        Raises:
            InputError: as for `read`.
        """
        if isinstance(additional_config, Mapping) and additional_config.get(KEY) is not None:
            return cls.read(additional_config[KEY])
        text = os.environ.get(ENVIRONMENT, "")
        if not text:
            return None
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            raise InputError(f"{ENVIRONMENT}={text!r} is no JSON") from None
        return cls.read(values)

    def engine_options(
        self, dtype: str, on_cpu: bool, images: int, share: float | None = None
    ) -> dict[str, Any]:
        """Returns the options of vLLM's engine that decide its answers, and its share of a GPU.

        Args:
            dtype: as for `load`.
            on_cpu: whether the engine runs there.
            images: the most that a prompt has.
            share: of the device's memory; vLLM's own default unless given.
        """
        options = {
            "dtype": "float32" if dtype == "auto" and on_cpu else dtype,
            "limit_mm_per_prompt": {"image": images},
            "additional_config": {KEY: self.as_dict()},
        }
        return options if share is None else options | {"gpu_memory_utilization": share}

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON can hold them."""
        return asdict(self) | {"arguments": dict(self.arguments)}

    @property
    def identity(self) -> str:
        """Returns a text that is equal for two settings only if they keep
        the same tokens of every image.
        """
        return json.dumps(self.as_dict(), sort_keys=True)

    def pruner(self) -> Any:
        """Builds the method with its budget, seed and hyperparameters.

        Raises:
            InputError: if it is unknown, or its hyperparameters are.
        """
        try:
            return build(self.method, budget=self.budget, seed=self.seed, **self.arguments)
        except TypeError as error:
            raise InputError(f"{self.method}: {error}") from None


def memory_share(engines: int) -> float:
    """Returns which share of a GPU's memory each of several engines may take: 90 % of what is free
    now, evenly. Other programs, and models of this process, have the rest.

    Args:
        engines: that will run on it at a time.
    """
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (1, 1)
    return FREE_SHARE * free / total / engines


def check(name: str, pruner: Any) -> None:
    """Raises `InputError` unless the method needs nothing but the vision tower and the projector."""
    if not isinstance(pruner, VisionPruner) or not pruner.only_chooses:
        raise InputError(
            f"{name} acts inside the language model, which vLLM runs itself; "
            "give a method that chooses tokens before it, such as zoo or divprune"
        )
    if "videos" in pruner.needs:
        raise InputError(
            f"{name} compares frames of videos, which are not pruned in vLLM; "
            "give a method that prunes images, such as zoo"
        )
    try:
        text = reads_question(pruner)
    except InputError as error:
        raise InputError(f"{name} is not served: {error}") from None
    if text:
        raise InputError(
            f"{name} reads the question, which vLLM does not show to the vision tower; "
            "choose tokens with vlm_prune.vlm.serving.image_embeds and send those"
        )


def check_lacks(name: str, pruner: VisionPruner, kind: str) -> None:
    """Raises `InputError` where a method needs what models of a family lack, for images in vLLM.

    Args:
        name: of the method.
        pruner: the method.
        kind: the `model_type` of the family.
    """
    needs: set[Need] = {*pruner.needs}
    if pruner.stage == "input":  # the number of tokens of an image is told beforehand
        needs.add("a fixed image size")
    for need in sorted(needs & FAMILIES[kind].lacks):
        raise InputError(f"{name} needs {need}, which {kind} models lack")


def reads_question(pruner: VisionPruner) -> bool:
    """Returns whether the method looks at the question when it chooses tokens."""
    seen = []

    def question() -> tuple[torch.Tensor, ...]:
        seen.append(True)
        return (torch.ones(1, 4),)

    pruner.reduce(_probe(question=question))
    return bool(seen)


def draws_numbers(pruner: VisionPruner) -> bool:
    """Returns whether the tokens that the method keeps depend on a number
    drawn from the image's pixels.
    """
    few = replace(pruner, budget=8)
    one, other = (few.reduce(_probe(seed)).indices[0].tolist() for seed in (0, 1))
    return bool(one != other)


def _probe(seed: int = 0, question: Callable[[], tuple[torch.Tensor, ...]] = tuple) -> VisionTokens:
    """Returns the tokens of an image that shows nothing."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 16, 4, generator=generator)
    heads = torch.randn(1, 2, 17, 4, generator=generator)
    projector = Projector.of(torch.eye(4), None, torch.tanh, torch.eye(4), None)
    return VisionTokens(
        features=features,
        projected=projector(features),
        grids=((4, 4),),
        seeds=(seed,),
        projector=projector,
        query_key=lambda: (heads, heads),
        question=question,
        has_cls=True,
    )


def kept_tokens(pruner: VisionPruner, tokens: int, placeholders: int | None = None) -> int:
    """Returns how many placeholders of an image the method keeps, from its size alone.

    Args:
        pruner: the method.
        tokens: tokens of the image that the method sees.
        placeholders: all of the image's, newlines included; as many unless given.
    """
    available = tokens if placeholders is None else placeholders
    if isinstance(pruner, Downsample):
        side = math.isqrt(tokens)  # images of one size, which are square
        return math.prod(pruner.shrunk_grid(side, side))
    nothing = torch.empty(1, tokens, 0, device="meta")
    image = VisionTokens(
        features=nothing,
        projected=nothing,
        grids=((1, tokens),),
        seeds=(0,),
        projector=lambda features: features,
        query_key=lambda: (nothing, nothing),
        available=available,
    )
    count = pruner.count(image)
    return available if count == tokens else count
