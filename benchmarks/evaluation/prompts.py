"""Conversations as a model takes them: token ids, and images already encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm_prune.benchmarks.evaluation.records import PromptRecord
from vlm_prune.vlm.chat import encode_prompts, video_frames_of
from vlm_prune.vlm.common.timing import now
from vlm_prune.vlm.common.video import VideoClip
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.families.base import PIXELS
from vlm_prune.vlm.orders import SharedOrders
from vlm_prune.vlm.trace import Trace


@dataclass(frozen=True)
class Prompts:
    """A batch of B prompts, padded on the left.

    Args:
        tensors: `input_ids` and `attention_mask` (B, L), and the family's `arguments`.
        vision: the tokens of all images, in order; None where there is no image.
        pixels: the same images and videos before the tower, and what says how they lie.
        images: how many images and videos each prompt has.
        vision_s: seconds that encoding took.
        cropped: whether the model sees only the middle of images that are not square.
        videos: how many of these are videos that are encoded behind all images; none unless given.
    """

    tensors: dict[str, Tensor]
    vision: Images | None
    pixels: dict[str, Tensor]
    images: list[int]
    vision_s: float
    cropped: bool = False
    videos: tuple[int, ...] = ()

    def sharing_orders(self) -> "Prompts":
        """Returns the prompts, in whose images one order of tokens serves several budgets."""
        if self.vision is None:
            return self
        groups = [
            replace(group, tokens=replace(group.tokens, orders=SharedOrders(tokens.device)))
            for group in self.vision.groups
            for tokens in [group.tokens.projected]
        ]
        return replace(self, vision=replace(self.vision, groups=groups))

    @property
    def reused_s(self) -> float:
        """Returns the seconds that finding orders took which were used again."""
        groups = [] if self.vision is None else self.vision.groups
        return sum(group.tokens.orders.reused_s for group in groups if group.tokens.orders)

    def encoded_numbers(self, number: int) -> list[int]:
        """Returns where in `vision` the images of one prompt are, and behind them its videos."""
        videos = list(self.videos) or [0] * len(self.images)
        images = [shown - count for shown, count in zip(self.images, videos, strict=True)]
        first, later = sum(images[:number]), sum(images) + sum(videos[:number])
        return [
            *range(first, first + images[number]),
            *range(later, later + videos[number]),
        ]

    def record(self, number: int, trace: Trace) -> PromptRecord:
        """Returns what results say about one prompt, pruned as in
        `trace`; means are over its images.

        Beam search repeats a prompt with its images, whose first copy counts.
        """
        first, count = sum(self.images[:number]), self.images[number]
        numbers = self.encoded_numbers(number)
        counts = [self.vision.counts[n] for n in numbers] if self.vision else []
        videos = [self.vision.video_grids[n] for n in numbers] if self.vision else []
        copies = max(1, len(trace.computed[0]) // max(1, sum(self.images)))
        pruned = slice(copies * first, copies * first + count)
        return PromptRecord(
            images=count,
            image_tokens=counts,
            cropped=self.cropped,
            grids=[self.vision.grids[n] for n in numbers] if self.vision else [],
            text_tokens=int(self.tensors["attention_mask"][number].sum()) - sum(counts),
            vision_flops=float(sum(self.vision.flops[n] for n in numbers)) if self.vision else 0.0,
            layer_tokens=[sum(layer[pruned]) / max(1, count) for layer in trace.computed],
            kept=[indices.tolist() for indices in trace.kept[pruned]],
            video_grids=videos if any(videos) else [],
            pruned_vision_flops=sum(trace.tower_flops[pruned]) if trace.tower_flops else None,
            densities=[]
            if trace.attention is None
            else trace.attention.of_row(number * copies, len(trace.computed)),
            chosen_density=None
            if trace.attention is None
            else trace.attention.chosen_of_row(number * copies),
        )


def make_prompts(
    model: Any,
    processor: Any,
    texts: list[str],
    images: list[list[Image.Image]],
    videos: Sequence[Sequence[VideoClip]] = (),
) -> Prompts:
    """Tokenizes rendered conversations, and runs the tower once over all their images.

    Args:
        model: of a supported family.
        processor: the model's.
        texts: a conversation each.
        images: of each conversation.
        videos: likewise; none unless given.

    Raises:
        InputError: if the processor cannot read them.
    """
    clips = [clip for row in videos for clip in row]
    inputs = encode_prompts(model, processor, texts, images, clips)
    cropped = bool(getattr(processor.image_processor, "do_center_crop", False))
    counts = tuple(map(len, videos)) or (0,) * len(images)
    shown = [len(row) + count for row, count in zip(images, counts, strict=True)]
    frames = video_frames_of(model, processor, texts, clips)
    behind = counts if frames is None else (0,) * len(images)
    prompts = encoded(model, inputs, shown, frames)
    return replace(prompts, cropped=cropped, videos=behind)


def encoded(
    model: Any,
    inputs: Mapping[str, Any],
    images: list[int],
    video_frames: Sequence[int] | None = None,
) -> Prompts:
    """Encodes the images and videos of prompts that a processor has made.

    Args:
        model: of a supported family.
        inputs: what the processor gives, padded on the left.
        images: number of images and videos of each prompt.
        video_frames: of each of these videos, 0 for images, where frames are images to the model.
    """
    family, device = family_of(model), model.device
    tensors = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    vision, seconds, pixels = None, 0.0, dict[str, Tensor]()
    if any(images):
        names = (*PIXELS.values(), *family.image_inputs, *family.video_inputs)
        pixels = {name: inputs[name] for name in names if name in inputs}
        start = now(device)
        with torch.no_grad():
            own: Any = {} if video_frames is None else {"video_frames": video_frames}
            vision = family.encode(input_ids=tensors["input_ids"], **pixels, **own)
        seconds = now(device) - start
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        tensors |= family.arguments(ids, mask, dict(inputs) | vision.inputs)
    return Prompts(tensors, vision, pixels, images, seconds)
