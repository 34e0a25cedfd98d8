"""What learners add to the cost of a prefill, from the configurations alone."""

from typing import Any

from vlm_prune.learners.columns import padded_columns
from vlm_prune.learners.config import WingsConfig

_MULTIPLY_ADD = 2


def learner_flops(
    text_config: Any, config: WingsConfig, text: float, image_per_layer: list[float]
) -> float:
    """Returns the matrix-product FLOPs that the learners add to one prefill.

    All products of queries and keys are counted, masked ones too, as `prefill_flops` counts the
    main attention's.

    Args:
        text_config: the language model's config.
        config: the learners.
        text: tokens that are not image tokens.
        image_per_layer: image tokens each layer computes.
    """
    width, total = text_config.hidden_size, 0.0
    for layer in config.layers_of(len(image_per_layer)):
        image = image_per_layer[layer]
        tokens, seen = text + image, {"visual": image, "textual": text}
        for keys in (seen[modality] for modality in config.modalities):
            # low-rank maps of queries and outputs, of keys and values; scores and their values
            total += 4 * width * config.rank * (tokens + keys) + 2 * tokens * keys * width
    return _MULTIPLY_ADD * total


def router_flops(
    text_config: Any,
    config: WingsConfig,
    text: float,
    image_per_layer: list[float],
    fused: bool,
) -> float:
    """Returns the FLOPs of one prefill that the router's reading takes, as `columns` does it.

    Args:
        text_config: the language model's config.
        config: the learners.
        text: tokens that are not image tokens.
        image_per_layer: image tokens each layer computes.
        fused: whether the columns widen the heads of the main attention, as on a CPU; on a GPU the
            router passes over queries and keys once more.
    """
    if not config.routed:
        return 0.0
    heads = text_config.num_attention_heads
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    more = padded_columns(len(config.modalities)) if fused else head
    layers = config.layers_of(len(image_per_layer))
    squares = sum((text + image_per_layer[layer]) ** 2 for layer in layers)
    return float(_MULTIPLY_ADD * 2 * squares * heads * more)
