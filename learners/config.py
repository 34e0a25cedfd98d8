"""What a set of Wings learners looks like."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec

from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.registry import unknown

Modality = Literal["visual", "textual"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
RouterKind = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class WingsConfig:
    """Low-rank residual attention learners beside every attention layer of a decoder.

    https://arxiv.org/abs/2406.03496

    The paper leaves several choices open, and its released code makes some that leak future tokens
    or depend on the batch; those are not offered. Where the code differs harmlessly, an option
    selects its reading.

    Args:
        rank: inner width of every low-rank map; the paper does not give one, its checkpoint has 64.
        layers: decoder layers with learners, counted from 0; None means all.
        modalities: which learners there are. One learner alone is added with weight 1, which is
            stage 1 of the training.
        query: `parallel` reads the normalized input of the main attention (the paper's figure),
            `sequential` the un-normalized sum of residual and main attention (its code).
        visual_mask: `causal` lets a token see the image tokens before it, so that a cached prefix
            stays valid; `all` shows the row's image tokens to every token (the code).
        skip_text: text tokens at the start of rows with an image that the textual learner does
            not see; the code leaves the system prompt out.
        images: `all`, or `first` for the first run of image tokens (the code has one image only).
        rope: rotate queries and keys at their positions in the mixed sequence (the paper is
            silent, its code does).
        router: `mean` merges attention heads by their mean and has no bias; `sum` adds them up,
            with a bias and a SiLU (the code); `none` adds both learners with weight 1.
        max_positions: sequence length the router has weights for.
        scale: what the learners' sum is multiplied by; the code in effect uses 2.
        stride: learners in every `stride`-th decoder layer, the last of each group; 1 is all of
            `layers`' default.

    Raises:
        InputError: for a value out of range.
    """

    rank: int = 64
    layers: tuple[int, ...] | None = None
    modalities: tuple[Modality, ...] = MODALITIES
    query: Literal["parallel", "sequential"] = "parallel"
    visual_mask: Literal["causal", "all"] = "causal"
    skip_text: int = 0
    images: Literal["all", "first"] = "all"
    rope: bool = True
    router: RouterKind = "mean"
    max_positions: int = 4096
    scale: float = 1.0
    stride: int = 1

    def __post_init__(self) -> None:
        for field in ("rank", "max_positions", "stride"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} {getattr(self, field)} is out of range; give 1 or more")
        if self.skip_text < 0:
            raise InputError(f"skip_text {self.skip_text} is out of range; give 0 or more")
        allowed = {
            "query": ("parallel", "sequential"),
            "visual_mask": ("causal", "all"),
            "images": ("all", "first"),
            "router": get_args(RouterKind),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise InputError(unknown(field, str(getattr(self, field)), values))
        for name in self.modalities:
            if name not in MODALITIES:
                raise InputError(unknown("modality", name, MODALITIES))
        if not math.isfinite(self.scale):
            raise InputError(f"scale {self.scale} is not finite")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers {self.layers} must name each layer once")
        if self.layers is not None and self.stride > 1:
            raise InputError(f"give layers or a stride, not layers {self.layers} and a stride")
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise InputError(f"modalities {self.modalities} must name each learner once")

    @property
    def routed(self) -> bool:
        """Returns whether there are two learners and a router between them."""
        return len(self.modalities) > 1 and self.router != "none"

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """Returns the decoder layers that get learners.

        Raises:
            InputError: when one lies outside a stack of `depth` layers.
        """
        every = tuple(range(self.stride - 1, depth, self.stride))
        layers = every if self.layers is None else self.layers
        wrong = [layer for layer in layers if not 0 <= layer < depth]
        if wrong:
            raise InputError(f"layers {wrong} are outside the stack; give 0 to {depth - 1}")
        if not layers:
            raise InputError(
                f"a stride of {self.stride} leaves none of {depth} layers with learners"
            )
        return layers

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "WingsConfig":
        """Reads what `dataclasses.asdict` wrote to JSON.

        Raises:
            InputError: for a field this version does not know, or a value of another kind.
        """
        known = cls.__dataclass_fields__
        for name in values:
            if name not in known:
                raise InputError(unknown("Wings option", name, known))
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise InputError(f"the options of Wings are damaged: {first_line(error)}") from error
