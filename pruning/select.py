"""Choosing and merging tokens by importance and diversity, on plain tensors."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vlm_prune.kernels.greedy_select import greedy_select
from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.vlm.tokens import top


def min_max(scores: Tensor) -> Tensor:
    """Scales each row of (M, N) to [0, 1]; a constant row becomes ones."""
    low, high = scores.aminmax(dim=-1, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low + 1e-8), 1.0)


def others(indices: Tensor, count: int) -> Tensor:
    """Returns the indices below `count` that are not given, ascending; (M, k) -> (M, count - k)."""
    # what is left in a mask when the given ones are crossed out
    free = torch.ones(len(indices), count, dtype=torch.bool, device=indices.device)
    free.scatter_(1, indices, False)
    return free.nonzero()[:, 1].view(len(indices), count - indices.shape[1])


def diverse(scores: Tensor, features: Tensor, k: int) -> Tensor:
    """Chooses the largest score x (1 - largest cosine to a chosen token) at
    each step, first the best score.

    Shapes: scores (M, N) in [0, 1], features (M, N, d) -> (M, k) in the order chosen. Ties go to
    the lowest index.

    Args:
        scores: how much each token matters by itself.
        features: tokens whose cosines tell how alike they are.
        k: tokens to choose.
    """
    return greedy_select(pairwise_cosine(features, features), scores, k, "diverse")


def max_min(features: Tensor, k: int) -> Tensor:
    """Chooses at each step the token farthest from the chosen ones by cosine.

    The first is the one farthest from its nearest neighbor.

    Shapes: (M, N, d) -> (M, k) in the order chosen. Ties go to the lowest index.
    """
    similarity = pairwise_cosine(features, features)
    # a token is not its own neighbor
    apart = similarity.clone()
    apart.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    isolation = 1 - apart.amax(-1)
    return greedy_select(similarity, isolation, k, "farthest")


def dpp(kernel: Tensor, k: int) -> Tensor:
    """Chooses the greedy maximum-a-posteriori set of a determinantal point process.

    Shapes: positive semi-definite kernel (M, N, N) -> (M, k) in the order chosen.
    """
    return greedy_select(kernel, torch.ones_like(kernel[:, 0]), k, "dpp")


def averaged(kept: Tensor, dropped: Tensor, nearest: Tensor) -> Tensor:
    """Averages each kept token with the dropped ones that are assigned to it.

    Shapes: kept (M, k, d), dropped (M, n, d), nearest (M, n) -> (M, k, d).

    Args:
        kept: tokens that take others in.
        dropped: tokens that join one of them.
        nearest: the index of the kept token that each dropped one joins.
    """
    sums, sizes = sums_by_nearest(dropped, nearest, kept.shape[1])
    return ((kept.float() + sums) / (1 + sizes)).to(kept.dtype)


def sums_by_nearest(dropped: Tensor, nearest: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns for each kept token the sum of the tokens assigned to it, and how many they are.

    Shapes: dropped (M, n, d), nearest (M, n) -> (M, count, d) and (M, count, 1), in fp32.

    Args:
        dropped: tokens that join a kept one.
        nearest: the index of the kept token that each of them joins.
        count: kept tokens of an image.
    """
    # a product with memberships sums up groups, and says how large they are
    member = one_hot(nearest, count).to(torch.float32)
    return member.transpose(1, 2) @ dropped.float(), member.sum(1)[..., None]


def density_gap(distance: Tensor, density: Tensor, farthest: Tensor | None = None) -> Tensor:
    """Returns each token's distance to the nearest denser one, (n,);
    the densest take their largest.

    Args:
        distance: between tokens, (n, n).
        density: of tokens, (n,).
        farthest: what the densest take instead.
    """
    # entry (i, j): whether j is denser than i
    denser = density[None] > density[:, None]
    gap = distance.masked_fill(~denser, torch.inf).amin(1)
    return torch.where(denser.any(1), gap, distance.amax(1) if farthest is None else farthest)


def density_centers(tokens: Tensor, count: int, neighbors: int) -> Tensor:
    """Returns the `count` tokens of (n, d) with the largest density times
    distance to a denser one, ascending.

    Density is exp(-mean squared distance to the nearest tokens, itself among them); distances are
    divided by the root of d.

    Args:
        tokens: to choose from.
        count: centers.
        neighbors: nearest tokens that a density is taken over.
    """
    if count == 0 or not len(tokens):
        return torch.arange(0, device=tokens.device)
    distance = torch.cdist(tokens.float(), tokens.float()) / tokens.shape[1] ** 0.5
    near = distance.sort(1).values[:, :neighbors]
    density = near.square().mean(1).neg().exp()
    return top(density * density_gap(distance, density), count)


def clustered(tokens: Tensor, count: int, neighbors: int) -> tuple[Tensor, Tensor]:
    """Returns indices (count,) of cluster centers, ascending, and the means
    (count, d) of their clusters.

    A cluster is a center with the tokens that are nearest to it.

    Args:
        tokens: (n, d).
        count: at most n.
        neighbors: nearest tokens that a density is taken over.
    """
    if count in (0, len(tokens)):
        return torch.arange(count, device=tokens.device), tokens[:count]
    centers = density_centers(tokens, count, neighbors)
    joining = others(centers[None], len(tokens))[0]
    nearest = torch.cdist(tokens[joining], tokens[centers]).argmin(1)
    sums, sizes = sums_by_nearest(tokens[joining][None], nearest[None], count)
    return centers, (tokens[centers] + sums[0]) / (1 + sizes[0])
