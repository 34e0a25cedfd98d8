"""What the question looks at in every decoder layer, without attention maps or hooks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlm_prune.vlm.attention import decoder_query_key
from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.layout import image_ordinals, image_places, question_places
from vlm_prune.vlm.tokens import QuestionRows, compact


@torch.inference_mode()
def question_rows(model: Any, inputs: dict[str, Tensor]) -> Iterator[QuestionRows]:
    """Queries of each image's question and all keys, layer by layer, of the unpruned model.

    Args:
        inputs: what the processor gives for prompts of one image each, `input_ids` (B, L).

    Raises:
        InputError: when the images differ in their number of tokens.
    """
    family, ids = family_of(model), inputs["input_ids"]
    counts = family.counts(ids, inputs)
    if len(set(counts)) > 1:
        raise InputError("images differ in size; give images of one size, or one at a time")
    valid = inputs["attention_mask"].bool()
    position_ids = (valid.cumsum(1) - 1).clamp_min(0)
    states = model(
        **inputs, position_ids=position_ids, output_hidden_states=True, use_cache=False,
        logits_to_keep=1,
    ).hidden_states  # fmt: skip
    is_image = ids == family.image_token
    row, columns_of = image_places(image_ordinals(is_image, counts), counts)
    at = torch.stack(columns_of)
    index, asked = compact(question_places(is_image, valid))
    columns = torch.where(asked, index, -1)[row]
    rotary = family.decoder.rotary_emb(states[0], position_ids=position_ids)
    for layer, hidden in zip(family.decoder.layers, states, strict=False):
        query, key = decoder_query_key(layer, hidden, rotary, index)
        scale = layer.self_attn.scaling
        yield QuestionRows(query[row], key[row], columns, valid[row], at, scale)
