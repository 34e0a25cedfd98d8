"""What a prompt costs: floating-point operations and key-value bytes, from the config alone."""

from typing import Any

_MULTIPLY_ADD = 2


def prefill_flops(config: Any, text: int, image_per_layer: list[float]) -> float:
    """Matrix-product FLOPs of one prefill of a Llama-style decoder with one logit row.

    Args:
        config: the text config.
        text: tokens that are not image tokens.
        image_per_layer: image tokens each layer computes.
    """
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    weights = width * (2 * query + 2 * key) + 3 * width * inner
    total = config.vocab_size * width
    for image in image_per_layer:
        tokens = text + image
        total += tokens * weights + 2 * tokens * tokens * query
    return float(_MULTIPLY_ADD * total)


def tower_flops(config: Any) -> float:
    """Matrix-product FLOPs of a CLIP vision tower on one image, all layers."""
    width, inner = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    layer = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    stem = patches * width * config.num_channels * config.patch_size**2
    return float(_MULTIPLY_ADD * (stem + config.num_hidden_layers * layer))


def key_value_bytes(config: Any, text: int, image_per_layer: list[float], itemsize: int) -> float:
    """Bytes of keys and values after the prefill of one prompt."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_key_value_heads * head * itemsize
    return float(sum((text + image) * per_token for image in image_per_layer))
