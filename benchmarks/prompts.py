"""Conversations as a model takes them: token ids, and images already encoded."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.session import now


@dataclass(frozen=True)
class Prompts:
    """A batch of B prompts, padded on the left.

    Args:
        tensors: `input_ids` and `attention_mask` (B, L).
        vision: the tokens of all images, in order; None where there is no image.
        pixel_values: the same images before the tower.
        images: how many images each prompt has.
        text_tokens: how many of its tokens are text.
        vision_s: seconds that encoding took.
    """

    tensors: dict[str, Tensor]
    vision: Images | None
    pixel_values: Tensor | None
    images: list[int]
    text_tokens: list[int]
    vision_s: float


def check_family(model: Any) -> None:
    """Raises `InputError` unless all images of the model's family have one size."""
    if not family_of(model).fixed_size:
        raise InputError(
            f"eval and compare know models of one image size, such as llava; prune "
            f"{model.config.model_type} with PrunedVLM or a `with` block around generate"
        )


def make_prompts(
    model: Any, processor: Any, texts: list[str], images: list[list[Image.Image]]
) -> Prompts:
    """Tokenise rendered conversations, and run the tower once over all their images."""
    family, device = family_of(model), model.device
    every = [image for row in images for image in row]
    inputs = processor(
        text=texts, images=every or None, padding=True, padding_side="left", return_tensors="pt"
    ).to(device)
    tensors = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    start = now(device)
    vision = family.encode(inputs["pixel_values"]) if every else None
    seconds = now(device) - start
    counts = [len(row) for row in images]
    lengths = tensors["attention_mask"].sum(1).tolist()
    text = [n - k * family.tokens_per_image for n, k in zip(lengths, counts, strict=True)]
    return Prompts(tensors, vision, inputs.get("pixel_values"), counts, text, seconds)
