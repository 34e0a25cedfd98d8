"""What a prompt costs: floating-point operations and key-value bytes, from sizes alone."""

from collections.abc import Sequence
from typing import Any

_MULTIPLY_ADD = 2


def prefill_flops(
    config: Any,
    text: int,
    image_per_layer: list[float],
    densities: Sequence[float] | None = None,
) -> float:
    """Returns the matrix-product FLOPs of one prefill of a Llama-style decoder with one logit row.

    Without `densities` all products of queries and keys are counted, masked ones too, as profilers
    count them. A kernel that is causal computes half of them: where sparse attention is compared
    with it, both are counted by their `densities`, 1 for the causal one.

    Args:
        config: the text config.
        text: tokens that are not image tokens.
        image_per_layer: image tokens each layer computes.
        densities: share of the causal half of the products that each layer computes.
    """
    width = config.hidden_size
    kinds = kinds_of(config, len(image_per_layer))
    total, own = config.vocab_size * width, own_layers(config, len(kinds))
    # each is read of the config once, which takes longer than the sums
    sizes = zip(
        kinds, widths_of(config, len(kinds)), feed_forward_weights(config, len(kinds)), strict=True
    )
    for number, (kind, (query, key), feed_forward) in enumerate(sizes):
        tokens = computed = text + image_per_layer[number]
        # Qwen3.5's layers of softmax attention have a gate as wide as their queries
        weights = width * (2 * query + 2 * key + (query if "linear_attention" in kinds else 0))
        if kind == "linear_attention":
            total += tokens * (feed_forward + linear_attention_weights(config))
            continue
        # keys that a query meets: all, or its share of the causal half, on average
        seen = tokens if densities is None else densities[number] * (tokens + 1) / 2
        if number >= own:
            # a layer that uses another one's keys and values computes the token alone whose logits are asked
            weights, computed = 2 * width * query, 1
            total += 2 * (tokens - seen) * query
        total += computed * (weights + feed_forward + 2 * seen * query)
    return float(_MULTIPLY_ADD * total)


def own_layers(config: Any, layers: int) -> int:
    """Returns how many of a decoder's layers, the first ones, have keys and values of their own."""
    return layers - (getattr(config, "num_kv_shared_layers", None) or 0)


def widths_of(config: Any, layers: int) -> list[tuple[int, int]]:
    """Returns how wide the queries of each of a decoder's layers are, and its keys."""
    per_layer = getattr(config, "per_layer_config", None)
    if per_layer is None or not getattr(config, "is_heterogeneous", True):
        return [_widths(config, config)] * layers
    return [_widths(config, per_layer[number]) for number in range(layers)]


def _widths(config: Any, layer: Any) -> tuple[int, int]:
    head = getattr(layer, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, layer.num_key_value_heads * head


def kinds_of(config: Any, layers: int) -> list[str]:
    """Returns the kind of attention of each of a decoder's layers, as far as
    its config tells them apart.
    """
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


def feed_forward_weights(config: Any, layers: int) -> list[int]:
    """Returns the weights that a token meets in each of a decoder's layers behind its attention.

    Of a mixture of experts these are the router's, those of the experts that a token is sent to,
    and those of an expert for all tokens where there is one.
    """
    width, experts = config.hidden_size, getattr(config, "num_experts", None)
    if not experts:
        return [int(3 * width * config.intermediate_size)] * layers
    chosen = getattr(config, "num_experts_per_tok", None) or config.top_k_experts
    inner = chosen * config.moe_intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    gates = experts + (1 if shared else 0)
    if getattr(config, "enable_moe_block", False):  # beside the layer's own block
        shared += config.intermediate_size
    mixed = int(width * (3 * (inner + shared) + gates))
    dense = getattr(config, "mlp_only_layers", None) or ()
    step = getattr(config, "decoder_sparse_step", None) or 1
    return [
        int(3 * width * config.intermediate_size)
        if number in dense or (number + 1) % step
        else mixed
        for number in range(layers)
    ]


def tower_flops(
    width: int, patches: int, embedding: int, layers: Sequence[tuple[int, Sequence[int]]]
) -> float:
    """Returns the matrix-product FLOPs of a vision tower on one image.

    Args:
        width: of its hidden states.
        patches: of the image, in all its views.
        embedding: weights that turn a patch into a hidden state.
        layers: weights of each layer, and the lengths of the sequences that attend to themselves
            in it: views of the image, or windows.
    """
    total = patches * embedding
    for weights, lengths in layers:
        # weights once for each token, and two products of width D for each pair
        total += sum(lengths) * weights + 2 * width * sum(length**2 for length in lengths)
    return float(_MULTIPLY_ADD * total)


def key_value_bytes(config: Any, text: int, image_per_layer: list[float], itemsize: int) -> float:
    """Returns the bytes of keys and values after the prefill of one prompt.

    A layer with a sliding window holds those that the next token sees; one of linear attention, or
    one that uses another layer's, none.

    Args:
        config: the language model's.
        text: tokens that are not image tokens.
        image_per_layer: image tokens that each layer computes.
        itemsize: bytes of a number.
    """
    kinds, total = kinds_of(config, len(image_per_layer)), 0.0
    widths = widths_of(config, len(kinds))
    for number in range(own_layers(config, len(kinds))):
        tokens = text + image_per_layer[number]
        if kinds[number] == "sliding_attention":
            tokens = min(tokens, config.sliding_window - 1)
        if kinds[number] != "linear_attention":
            total += tokens * 2 * widths[number][1] * itemsize
    return total
