"""ZSCL: distil the first model's view of reference images and texts, and average weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from vlm_prune.continual.clip import extra
from vlm_prune.continual.config import above
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.losses import distil
from vlm_prune.continual.methods.base import Context, ParameterGroup
from vlm_prune.continual.methods.full import FullFineTune
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass
class ZSCL(FullFineTune):
    """Full fine-tuning plus distillation from the initial CLIP on reference data, in both ways.

    https://arxiv.org/abs/2303.06628

    The initial model's features of the reference data are computed once, without augmentation. The
    paper's texts are captions; the default here is ImageNet's class names. Its option of an l2 pull
    toward the previous weights is not offered.

    Args:
        images: a folder, or images; they are no part of any task.
        allow_outside: whether links in the folder may lead out of it.
        captions: reference texts; None for prompts of ImageNet's 1,000 class names.
        weight: of each of the two distillation losses.
        temperature: of the distillation.
        reference_batch: reference images, and texts, per step.
        average_every: steps between additions to the weight average that the task ends with; 0
            leaves the weights as trained. At most a task's steps.
    """

    name: ClassVar[str] = "zscl"
    images: Path | str | Sequence[Image.Image] = ()
    captions: Sequence[str] | None = None
    weight: float = 1.0
    temperature: float = 2.0
    reference_batch: int = 64
    average_every: int = 100
    allow_outside: bool = False
    _teacher: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _sources: Sequence[Path | Image.Image] = field(default=(), init=False, repr=False)
    _ids: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        above("weight", self.weight, 0)
        above("temperature", self.temperature, 0, strict=True)
        above("reference_batch", self.reference_batch, 1)
        above("average_every", self.average_every, 0)
        self._sources = _sources(self.images, self.allow_outside)
        if not self._sources:
            raise InputError("zscl needs reference images: give images=FOLDER or a list of images")

    def options(self) -> dict[str, object]:
        named = isinstance(self.images, Path | str)
        images = str(self.images) if named else f"{len(self._sources)} images"
        return super().options() | {"images": images}

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        steps = context.recipe.steps
        if self.average_every > steps:
            # the average would be the weights before the task alone
            raise InputError(
                f"average_every={self.average_every} is above the {steps} steps of a task; "
                "give less, or 0 for no average"
            )
        groups = super().begin_task(context)
        if self._ids is None:
            self._ids = context.clip.tokenize(_texts(self.captions))
        if not self._teacher:
            parts = [
                self._encode(list(range(at, min(at + 64, len(self._sources)))))
                for at in range(0, len(self._sources), 64)
            ]
            self._teacher = {"images": torch.cat(parts), "texts": context.encode(self._ids)}
        self._average = self.copies() if self.average_every else {}
        return groups

    @torch.no_grad()
    def _encode(self, chosen: list[int]) -> Tensor:
        return self.context.clip.encode_image(self._pixels(chosen))

    def _pixels(self, chosen: list[int]) -> Tensor:
        clip = self.context.clip
        pictures = [clip.eval_transform(open_image(self._sources[n])) for n in chosen]
        return torch.stack(pictures).to(clip.device)

    def loss(self, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
        loss = super().loss(pixels, labels, step)
        clip, drawn = self.context.clip, self.context.generator(3, step)
        assert self._ids is not None
        # images and texts are drawn apart: pairs are not needed, only what both models say of them
        chosen = torch.randperm(len(self._sources), generator=drawn)[: self.reference_batch]
        words = torch.randperm(len(self._ids), generator=drawn)[: self.reference_batch]
        seen = self._teacher["images"].to(clip.device)[chosen]
        known = self._teacher["texts"].to(clip.device)[words]
        # a tower that is not trained still says what the initial one said
        images, texts = seen, known
        if clip.trains("vision"):
            images = clip.encode_image(self._pixels(chosen.tolist()))
        if clip.trains("text"):
            texts = clip.encode_text(self._ids[words].to(clip.device))
        # logits (images, texts), compared along both axes
        ours, theirs = clip.scale * images @ texts.T, clip.scale * seen @ known.T
        pairs = (ours, theirs), (ours.T, theirs.T)
        distilled = torch.stack([distil(a, b, self.temperature) for a, b in pairs]).sum()
        return loss + self.weight * distilled

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.average_every and (step + 1) % self.average_every == 0:
            # a running mean of the weights, those before the task included
            count = (step + 1) // self.average_every
            for name, parameter in self.weights().items():
                self._average[name].lerp_(parameter, 1 / (count + 1))

    @torch.no_grad()
    def end_task(self) -> Delta | None:
        for name, average in self._average.items():
            self.weights()[name].copy_(average)
        self._average = {}
        return super().end_task()

    def state(self) -> dict[str, Tensor]:
        average = {f"average|{name}": tensor for name, tensor in self._average.items()}
        return {f"teacher|{name}": tensor for name, tensor in self._teacher.items()} | average

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            kind, _, name = key.partition("|")
            if kind == "teacher":
                self._teacher[name] = tensor
            elif name in self._average:
                self._average[name].copy_(tensor)


def _sources(
    images: Path | str | Sequence[Image.Image], allow_outside: bool
) -> Sequence[Path | Image.Image]:
    if not isinstance(images, Path | str):
        return images
    root = DataRoot(Path(images), allow_outside)
    if not root.folder.is_dir():
        raise InputError(f"{images} is no folder of reference images")
    found = sorted(p for p in root.folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return [root.path(path.relative_to(root.folder)) for path in found]


def _texts(given: Sequence[str] | None) -> list[str]:
    if given is not None:
        return list(given)
    return [f"a photo of a {name}." for name in extra("open_clip").IMAGENET_CLASSNAMES]
