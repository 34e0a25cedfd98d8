"""Kept tokens as image embeddings, for servers of vLLM without the plug-in.

Methods that read the question can run only here: a server does not show it to the vision tower.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from vlm_prune.pruning.base import VisionPruner
from vlm_prune.vlm.chat import encode_prompts, render
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of

Picture = str | Path | Image
# what vLLM gives as many placeholders as there are rows
FAMILIES = ("llava", "llava_next", "internvl")


@torch.no_grad()
def image_embeds(
    model: Any,
    images: Sequence[Picture | Sequence[Picture]],
    prompts: Sequence[str],
    pruner: VisionPruner,
    processor: Any = None,
) -> list[list[Tensor]]:
    """Chooses tokens here, and returns what is kept for a server that is given no pixels.

    Args:
        model: a loaded Hugging Face model, whose checkpoint the server serves.
        images: the image of each prompt, or its images.
        prompts: the question about each, which text-guided methods read.
        pruner: a method that acts before the language model.
        processor: the model's; loaded from its checkpoint unless given.

    Returns:
        For each prompt its images' rows (k, d_l): the value of `multi_modal_data["image"]` where
        vLLM runs with `enable_mm_embeds`, and what `as_content` takes.

    Raises:
        InputError: if the method, the model or an image cannot be used.
    """
    family = family_of(model)
    check_sendable(pruner, model.config.model_type)
    pruner.admit(model)
    if len(images) != len(prompts):
        raise InputError(f"{len(images)} images do not go with {len(prompts)} prompts")
    if processor is None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(model.name_or_path, trust_remote_code=False)
    embed = model.get_input_embeddings()
    names = ("pixel_values", "input_ids", *family.image_inputs)
    out = []
    for given, prompt in zip(images, prompts, strict=True):
        pictures = [given] if isinstance(given, Picture) else list(given)
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": prompt}]
        turn = {"role": "user", "content": content}
        text = render(processor, [turn], add_generation_prompt=True)
        inputs = encode_prompts(model, processor, [text], [pictures])
        ids = inputs["input_ids"][0]
        # the text behind the last image
        question = embed(ids[int((ids == family.image_token).nonzero().max()) + 1 :])
        rows: dict[int, Tensor] = {}
        for group in family.encode(
            **{name: inputs[name] for name in names if name in inputs}
        ).groups:
            questions = partial(_repeated, question, len(group.members))
            kept = pruner.reduce(replace(group.tokens, question=questions))
            for number, (image, features) in enumerate(
                zip(group.members, kept.features, strict=True)
            ):
                whole = len(features) == group.size
                rows[image] = group.filled(number, features) if whole else features
        out.append([rows[image] for image in sorted(rows)])
    return out


def check_sendable(pruner: Any, kind: str) -> None:
    """Raises `InputError` unless vLLM takes what a method keeps of images as their embeddings.

    Args:
        pruner: the method.
        kind: the model's `model_type`.
    """
    if kind not in FAMILIES:
        raise InputError(
            f"vLLM takes no pruned embeddings of {kind} models, only of {', '.join(FAMILIES)}; "
            "use the plug-in"
        )
    if pruner.stage == "input" or not isinstance(pruner, VisionPruner) or not pruner.only_chooses:
        raise InputError(
            f"{type(pruner).__name__} does more than choose tokens before the language model; "
            "give a method that does not, such as cdpruner"
        )
    if "videos" in pruner.needs:
        raise InputError(
            f"{type(pruner).__name__} compares frames of videos, which are not sent; "
            "give a method that prunes images, such as cdpruner"
        )


def _repeated(question: Tensor, count: int) -> tuple[Tensor, ...]:
    return (question,) * count


def as_content(rows: Sequence[Tensor]) -> list[dict[str, str]]:
    """Returns the parts of a chat message that stand for a prompt's images, for a server over HTTP.

    The rows travel as base64 of a NumPy file. The server needs `--enable-mm-embeds`.
    """
    parts = []
    for tensor in rows:
        file = io.BytesIO()
        np.save(file, tensor.detach().float().cpu().numpy(), allow_pickle=False)
        text = base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_embeds", "image_embeds": text})
    return parts
