"""A start for the vision tower and the language model that a CPU can afford to train from.

A random patch embedding answers almost only to the mean color of a patch, and random position
embeddings hide which patches are neighbors. Whitened principal components and two-dimensional
waves give both away from the first step.

A language model looks up what a text says once a head carries a word to the words after it
(https://arxiv.org/abs/2209.11895); small models wait long for such a head to form. Here the first
layer gets one, as in https://arxiv.org/abs/2305.09828 weights begin as trained ones look, once the
layers behind it look up what image tokens say.
"""

from typing import Any

import torch
from torch import Tensor

PATCH_SCALE = 0.5
POSITION_SCALE = 0.4
SHARPNESS = 9.0
OUTPUT_SCALE = 0.5


@torch.no_grad()
def initialize_embeddings(tower: Any, patches: Tensor, generator: torch.Generator) -> None:
    """Sets the tower's patch and position embeddings in place.

    Args:
        tower: a CLIP vision transformer of a square grid.
        patches: `(samples, 3 p p)` normalized patches, mostly of objects; more than `width` of
            them.
        generator: draws the rotation that spreads the components over all channels.
    """
    embeddings = tower.embeddings
    kernel = embeddings.patch_embedding.weight
    kernel.copy_((PATCH_SCALE * whitened(patches, len(kernel), generator)).reshape(kernel.shape))
    table = embeddings.position_embedding.weight
    grid = round((len(table) - 1) ** 0.5)
    table[1:] = POSITION_SCALE * waves(table.shape[1], grid)


def whitened(patches: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Returns filters (width, 3 p p) with uncorrelated and equally large responses to `patches`.

    Args:
        patches: (samples, 3 p p), at least `width` of them.
        width: number of filters.
        generator: draws the rotation that spreads the components over the filters.
    """
    centered = patches - patches.mean(0)
    _, singular, components = torch.linalg.svd(centered, full_matrices=False)
    spread = singular[:width, None] / len(patches) ** 0.5
    floor = 0.1 * spread[min(20, width - 1)]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    filters: Tensor = rotation @ (components[:width] / (spread + floor))
    return filters


def waves(width: int, grid: int) -> Tensor:
    """Returns sines and cosines of the row and of the column of each
    patch, `(grid * grid, width)`.
    """
    frequencies = torch.logspace(0.3, -1.1, width // 4)
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, width)


@torch.no_grad()
def look_back(decoder: Any) -> None:
    """Makes the first two heads of a Llama decoder's first layer attend one
    and two tokens back, in place.

    The layer adds nothing until `add_look_back`.

    Queries and keys are biases, so that rotary positions alone decide; needs `attention_bias`.
    """
    layer, rates = decoder.layers[0], decoder.rotary_emb.inv_freq
    attention = layer.self_attn
    size = attention.head_dim
    fast = (torch.arange(len(rates)) < 10) * SHARPNESS**0.5 * size**0.25
    for head in range(2):
        part = slice(head * size, (head + 1) * size)
        turned = -rates * (head + 1)
        attention.q_proj.bias[part] = torch.cat([fast * turned.cos(), fast * turned.sin()])
        attention.k_proj.bias[part] = torch.cat([fast, 0 * fast])
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[part] *= 0.1
    attention.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


@torch.no_grad()
def add_look_back(decoder: Any, words: Tensor) -> None:
    """Makes the second head that looks back add what it sees at half the
    size of an embedding, in place.

    In "star is red" it is the head by which "red" reads "star".

    Args:
        decoder: a Llama decoder after `look_back`.
        words: ids of at most `head_dim` words; the head carries what tells them apart.
    """
    attention = decoder.layers[0].self_attn
    table = decoder.embed_tokens.weight[words]
    second = slice(attention.head_dim, 2 * attention.head_dim)
    spanned = torch.linalg.svd(table, full_matrices=False).Vh
    others = torch.randn(table.shape[1], attention.head_dim - len(spanned))
    basis = torch.linalg.qr(torch.cat([spanned.T, others], 1)).Q
    attention.v_proj.weight[second] = basis.T
    attention.o_proj.weight[:, second] = OUTPUT_SCALE * table.square().mean().sqrt() * basis


@torch.no_grad()
def prefer_times(
    decoder: Any, layers: tuple[int, ...] = (2, 3, 4, 5), strength: float = 1.0
) -> None:
    """Makes the third head of some layers attend to early tokens rather than late ones, and the
    fourth to late ones, in place, beside what they attend to by content.

    Queries and keys get biases in the slowly turning channels, so that logits grow by about 2 over
    100 tokens, and by 3 over 576.

    Args:
        decoder: a Llama decoder with biases of queries and keys.
        layers: in which.
        strength: of each channel, in logits.
    """
    half = len(decoder.rotary_emb.inv_freq)
    channels = torch.arange(3 * half // 8, 5 * half // 8)
    for number in layers:
        attention = decoder.layers[number].self_attn
        size = attention.head_dim
        length = (strength * size**0.5) ** 0.5
        for head, sign in ((2, -1), (3, 1)):
            # the logit of a distance d is the sum of -sign * sin(rate d)
            attention.k_proj.bias[head * size + channels] += length
            attention.q_proj.bias[head * size + half + channels] += sign * length
