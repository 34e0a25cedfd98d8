"""What learners add to the cost of a prefill, from the configurations alone."""

from typing import Any

from vlm_prune.learners.config import WingsConfig


def learner_flops(
    text_config: Any, config: WingsConfig, text: float, image_per_layer: list[float]
) -> float:
    """Matrix-product FLOPs that the learners and the router add to one prefill.

    All products of queries and keys are counted, masked ones too, as `prefill_flops` counts the
    main attention's. The router's reading is a second pass over the main attention: its scores,
    and values as wide as a head, which kernels demand.

    Args:
        text_config: the language model's config.
        config: the learners.
        text: tokens that are not image tokens.
        image_per_layer: image tokens each layer computes.
    """
    width, heads = text_config.hidden_size, text_config.num_attention_heads
    head = getattr(text_config, "head_dim", None) or width // heads
    total = 0.0
    for layer in config.layers_of(len(image_per_layer)):
        image = image_per_layer[layer]
        tokens = text + image
        seen = {"visual": image, "textual": text}
        for modality in config.modalities:
            keys = seen[modality]
            # low-rank maps of queries and outputs, of keys and values; scores and their values
            total += 4 * width * config.rank * (tokens + keys) + 2 * tokens * keys * width
        if config.routed:
            total += 2 * tokens * tokens * heads * head
    return 2 * total
