"""What the question looks at in every decoder layer, without attention maps."""

from collections.abc import Iterator, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from vlm_prune.vlm.attention import decoder_query_key, window_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import Need, family_of
from vlm_prune.vlm.layout import alike, image_columns, image_ordinals, image_rows, question_mask
from vlm_prune.vlm.tokens import AttentionRows, compact


@torch.inference_mode()
def question_rows(
    model: Any, inputs: Mapping[str, Any], items: tuple[Tensor, list[int]] | None = None
) -> Iterator[list[AttentionRows]]:
    """Yields queries of each image's question and all keys of the unpruned model, layer by layer.

    Each layer gives one `AttentionRows` for the images of each number of tokens, in order of first
    appearance.

    Args:
        model: of a supported family, unpruned.
        inputs: what the processor gives for prompts, `input_ids` (B, L), or images encoded
            beforehand as `mm_encoder_outputs`, with `position_ids` where these have rows.
        items: for each token the image or video that it belongs to, -1 for text, (B, L), and how many
            tokens each has; the images' unless given.

    Raises:
        InputError: if a layer has no attention that could be scored.
    """
    family, ids = family_of(model), inputs["input_ids"]
    needs: frozenset[Need] = frozenset(
        {"decoder layers with keys and values, and no inputs but hidden states, of their own"}
    )
    if needed := sorted(needs & family.lacks):
        raise InputError(
            f"scores of attention need {needed[0]}, which {model.config.model_type} models lack"
        )
    valid = inputs["attention_mask"].bool()
    positions = inputs.get("position_ids")
    if positions is None:
        positions = family.positions(ids, valid.long(), inputs) * valid
    seen: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    thread = get_ident()

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if get_ident() == thread:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            seen.append((hidden_states, kwargs["position_embeddings"]))

    layers = family.decoder.layers
    windows = [window_of(family.decoder.config, number) for number in range(len(layers))]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model(**{**inputs, "position_ids": positions}, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if items is None:
        counts = family.counts(ids, inputs)
        items = image_ordinals(ids == family.image_token, counts), counts
    ordinal, counts = items
    is_image = ordinal >= 0
    # where each image stands, and the questions of all rows, padded to the longest
    rows, columns_of = image_rows(ordinal, len(counts)), image_columns(ordinal, counts)
    index, real = compact(question_mask(is_image, valid))
    columns = torch.where(real, index, -1)
    # images of equally many tokens share a tensor: their rows (m,) and columns (m, n)
    groups = [
        (rows[members], torch.stack([columns_of[i] for i in members])) for members in alike(counts)
    ]
    for number, (layer, (hidden_states, rotary)) in enumerate(zip(layers, seen, strict=True)):
        query, key = decoder_query_key(layer, hidden_states, rotary, index)
        scale, window = layer.self_attn.scaling, windows[number]
        yield [
            AttentionRows(query[row], key[row], columns[row], valid[row], at, scale, window)
            for row, at in groups
        ]
