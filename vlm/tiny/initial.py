"""A start for the vision tower and the language model that a CPU can afford to train from.

A random patch embedding answers almost only to the mean colour of a patch, and random position
embeddings hide which patches are neighbours. Whitened principal components and two-dimensional
waves give both away from the first step.

A language model looks up what a text says once a head carries a word to the words after it
(https://arxiv.org/abs/2209.11895); small models wait long for such a head to form. Here the first
layer begins with them, as in https://arxiv.org/abs/2305.09828 weights begin as trained ones look.
"""

from typing import Any

import torch
from torch import Tensor, nn

PATCH_SCALE = 0.5
POSITION_SCALE = 0.4
SHARPNESS = 9.0
LOUDNESS = 0.5


@torch.no_grad()
def initialise_embeddings(tower: Any, patches: Tensor, generator: torch.Generator) -> None:
    """Set the tower's patch and position embeddings in place.

    Args:
        tower: a CLIP vision transformer of a square grid.
        patches: `(samples, 3 p p)` normalised patches, mostly of objects; more than `width` of them.
        generator: draws the rotation that spreads the components over all channels.
    """
    embeddings = tower.embeddings
    kernel = embeddings.patch_embedding.weight
    kernel.copy_((PATCH_SCALE * whitened(patches, len(kernel), generator)).reshape(kernel.shape))
    table = embeddings.position_embedding.weight
    grid = round((len(table) - 1) ** 0.5)
    table[1:] = POSITION_SCALE * waves(table.shape[1], grid)


def whitened(patches: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """`(width, 3 p p)` filters whose responses to `patches` are uncorrelated and of equal size."""
    centred = patches - patches.mean(0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    spread = singular[:width, None] / len(patches) ** 0.5
    floor = 0.1 * spread[min(20, width - 1)]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    filters: Tensor = rotation @ (components[:width] / (spread + floor))
    return filters


def waves(width: int, grid: int) -> Tensor:
    """Sines and cosines of the row and of the column of each patch, `(grid * grid, width)`."""
    frequencies = torch.logspace(0.3, -1.1, width // 4)
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, width)


@torch.no_grad()
def look_back(decoder: Any) -> None:
    """Let head h of a Llama decoder's first layer attend h + 1 tokens back, in place.

    Queries and keys are biases, so that rotary positions alone decide; needs `attention_bias`. Each
    head reads a part of the token, and the second (in "star is red", the star heard by red) adds it
    at half the volume of an embedding; the others are silent until trained.
    """
    attention, rates = decoder.layers[0].self_attn, decoder.rotary_emb.inv_freq
    heads, size = decoder.config.num_attention_heads, attention.head_dim
    fast = (torch.arange(len(rates)) < 10) * SHARPNESS**0.5 * size**0.25
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        turned = -rates * (head + 1)
        attention.q_proj.bias[part] = torch.cat([fast * turned.cos(), fast * turned.sin()])
        attention.k_proj.bias[part] = torch.cat([fast, 0 * fast])
        attention.v_proj.weight[part] = nn.init.orthogonal_(
            torch.empty_like(attention.v_proj.weight[part])
        )
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(0.1)
    attention.o_proj.weight.zero_()
    second = slice(size, 2 * size)
    spread = LOUDNESS * decoder.embed_tokens.weight.std()
    attention.o_proj.weight[:, second] = spread * attention.v_proj.weight[second].T
