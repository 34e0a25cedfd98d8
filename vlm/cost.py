"""What a prompt costs: floating-point operations and key-value bytes, from sizes alone."""

from collections.abc import Sequence
from typing import Any

_MULTIPLY_ADD = 2


def prefill_flops(config: Any, text: int, image_per_layer: list[float]) -> float:
    """Matrix-product FLOPs of one prefill of a Llama-style decoder with one logit row.

    Args:
        config: the text config.
        text: tokens that are not image tokens.
        image_per_layer: image tokens each layer computes.
    """
    width = config.hidden_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    # Qwen3.5's layers of softmax attention have a gate as wide as their queries
    gates = query if "linear_attention" in kinds_of(config, len(image_per_layer)) else 0
    projections = width * (2 * query + 2 * key + gates)
    total = config.vocab_size * width
    for number, kind in enumerate(kinds_of(config, len(image_per_layer))):
        tokens = text + image_per_layer[number]
        total += tokens * feed_forward_weights(config, number)
        if kind == "linear_attention":
            total += tokens * linear_attention_weights(config)
        else:
            total += tokens * projections + 2 * tokens * tokens * query
    return float(_MULTIPLY_ADD * total)


def kinds_of(config: Any, layers: int) -> list[str]:
    """The kind of attention of each of a decoder's layers, as far as its config tells them apart."""
    return list(getattr(config, "layer_types", None) or [""] * layers)


def linear_attention_weights(config: Any) -> int:
    """Returns what a token is multiplied with in a layer of gated delta rule: projections, the
    convolution, and the state, which it reads, corrects and is added to.
    """
    heads, values = config.linear_num_value_heads, config.linear_value_head_dim
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    mixed = 2 * keys + heads * values
    projections = config.hidden_size * (mixed + 2 * heads * values + 2 * heads)
    state = 3 * heads * values * config.linear_key_head_dim
    return int(projections + mixed * config.linear_conv_kernel_dim + state)


def feed_forward_weights(config: Any, number: int) -> int:
    """Returns the weights that a token meets in layer `number` behind its attention.

    Of a mixture of experts these are the router's, those of the experts that a token is sent to,
    and those of an expert for all tokens where there is one.
    """
    width, experts = config.hidden_size, getattr(config, "num_experts", None)
    dense = number in (getattr(config, "mlp_only_layers", None) or ())
    if not experts or dense or (number + 1) % (getattr(config, "decoder_sparse_step", None) or 1):
        return int(3 * width * config.intermediate_size)
    inner = config.num_experts_per_tok * config.moe_intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    gates = experts + (1 if shared else 0)
    return int(width * (3 * (inner + shared) + gates))


def tower_flops(
    width: int, patches: int, embedding: int, layers: Sequence[tuple[int, Sequence[int]]]
) -> float:
    """Matrix-product FLOPs of a vision tower on one image.

    Args:
        width: of its hidden states.
        patches: of the image, in all its views.
        embedding: weights that turn a patch into a hidden state.
        layers: weights of each layer, and the lengths of the sequences that attend to themselves
            there: views of the image, or windows.
    """
    total = patches * embedding
    for weights, lengths in layers:
        total += sum(lengths) * weights + 2 * width * sum(length**2 for length in lengths)
    return float(_MULTIPLY_ADD * total)


def key_value_bytes(config: Any, text: int, image_per_layer: list[float], itemsize: int) -> float:
    """Returns the bytes of keys and values after the prefill of one prompt.

    A layer with a sliding window holds those that the next token sees, one of linear attention none.

    Args:
        config: the language model's.
        text: tokens that are not image tokens.
        image_per_layer: image tokens that each layer computes.
        itemsize: bytes of a number.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_key_value_heads * head * itemsize
    held = []
    for kind, image in zip(kinds_of(config, len(image_per_layer)), image_per_layer, strict=True):
        tokens = 0 if kind == "linear_attention" else text + image
        held.append(min(tokens, config.sliding_window - 1) if "sliding" in kind else tokens)
    return float(sum(held) * per_token)
