"""`PrunedVLM`: model, processor and pruner in one object."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.images import open_image
from vlm_prune.vlm.load import load
from vlm_prune.vlm.registry import Registry


def methods() -> Registry[Any]:
    """Every registered pruner: ours and those of packages with a `vlm_prune.methods` entry point."""
    table: Registry[Any] = Registry("method")
    for point in entry_points(group="vlm_prune.methods"):
        for name, pruner in point.load().items():
            table.register(name, pruner)
    return table


def build(name: str, **hyperparameters: Any) -> Any:
    """A pruner by its registered name, or several joined by `+`.

    `a+b` is the cascade of a, before the language model, and b, inside it; `+merge` averages what
    the method in front of it drops into what that keeps. Hyperparameters are those of the whole;
    those of a part are named after it, `inside.layer` (parts of a cascade are `pre` and `inside`,
    that of a merge before the language model is `method`).

    Raises:
        InputError: if a name is unknown or two methods do not go together.
    """
    table = methods()
    first, *more = name.split("+")
    if not more and not any("." in key for key in hyperparameters):
        return table[first](**hyperparameters)
    pruner = table[first]()
    for part in more:
        joined = table[part]
        if part == "merge":
            pruner = joined.around(pruner)
        else:
            pruner = table["cascade"](pruner, joined())
    return _replaced(pruner, hyperparameters)


def _replaced(pruner: Any, hyperparameters: dict[str, Any]) -> Any:
    own = {key: value for key, value in hyperparameters.items() if "." not in key}
    inner: dict[str, dict[str, Any]] = {}
    for key in hyperparameters.keys() - own.keys():
        part, _, rest = key.partition(".")
        inner.setdefault(part, {})[rest] = hyperparameters[key]
    for part, values in inner.items():
        if not is_dataclass(getattr(pruner, part, None)):
            raise InputError(f"{type(pruner).__name__} has no part {part!r}")
        own[part] = _replaced(getattr(pruner, part), values)
    return replace(pruner, **own)


class PrunedVLM:
    """A vision-language model that answers questions with fewer image tokens.

    Args:
        model: an unmodified Hugging Face model of a supported family.
        processor: its processor.
        pruner: a pruner; None leaves the model as it is.
    """

    def __init__(self, model: Any, processor: Any, pruner: Any | None = None) -> None:
        self.model, self.processor, self.pruner = model, processor, pruner

    @classmethod
    def from_pretrained(
        cls,
        name: str = "tiny",
        pruner: str = "none",
        budget: float = 64,
        device: str = "cpu",
        dtype: str = "auto",
        **hyperparameters: Any,
    ) -> "PrunedVLM":
        """Load a checkpoint and build a pruner by its registered name."""
        built = build(pruner, budget=budget, **hyperparameters)
        return cls(*load(name, device, dtype), built)

    def answer(self, image: str | Path | Image.Image, question: str, **generation: Any) -> str:
        """The model's reply to one question about one image, a file or a Pillow image.

        Raises:
            InputError: if the image cannot be used.
        """
        return self.replies([image], [question], **generation)[0].text

    def replies(
        self,
        images: Sequence[str | Path | Image.Image],
        questions: Sequence[str],
        **generation: Any,
    ) -> list["Reply"]:
        """The same for several images at once, one question about each.

        Raises:
            InputError: if an image cannot be used.
        """
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
            )
            for text in questions
        ]
        inputs = self.processor(
            text=prompts, images=[[open_image(image)] for image in images], padding=True,
            padding_side="left", return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        block = nullcontext() if self.pruner is None else self.pruner(self.model)
        with torch.inference_mode(), block as trace:
            output = self.model.generate(**inputs, **generation)
        texts = self.processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        counts: list[tuple[int | None, int | None]] = [(None, None)] * len(texts)
        if trace is not None:
            counts = list(zip(trace.available, map(len, trace.kept), strict=True))
        return [Reply(text.strip(), *each) for text, each in zip(texts, counts, strict=True)]


@dataclass(frozen=True)
class Reply:
    """An answer, how many tokens its image had, and how many were left at the end of pruning.

    For methods that prune inside the language model the latter are those of its last layer, fewer
    than the budget, which is a mean over layers. Without a pruner both are None.
    """

    text: str
    image_tokens: int | None
    kept_tokens: int | None
