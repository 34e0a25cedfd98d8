"""Where text-to-vision attention shifts between decoder layers: AdaptInfer's offline choice of cuts.

https://arxiv.org/abs/2508.06084
"""

from itertools import groupby

import torch
from torch import Tensor

from vlm_prune.vlm.common.errors import InputError


def change_points(attention: Tensor, share: float = 0.1) -> list[int]:
    """Returns for each of an image's most attended tokens how many layers have
    run when its attention changes.

    Args:
        attention: attention from the text, the mean over heads and text rows, (layers, N).
        share: tokens looked at, those with the largest sums over layers.

    Each token's cumulative sum over layers is split in two by binary segmentation with the l2 cost,
    as the authors do. A part has at least two layers.

    Raises:
        InputError: without `ruptures`, or for fewer than four layers.
    """
    try:
        from ruptures import Binseg
    except ImportError:
        raise InputError(
            "finding change points needs ruptures: pip install 'vlm-prune[schedule]'"
        ) from None
    layers, tokens = attention.shape
    if layers < 4:
        raise InputError(f"{layers} layers have no change point; give a model with 4 or more")
    order = attention.sum(0).argsort(descending=True, stable=True)[: max(1, round(share * tokens))]
    # (tokens, layers): attention summed up over layers bends where it changes
    curves = attention[:, order].double().cumsum(0).T.cpu().numpy()
    return [int(Binseg("l2", jump=1).fit(curve).predict(n_bkps=1)[0]) for curve in curves]


def histogram(points: list[int], layers: int) -> list[int]:
    """Returns how many change points lie after 0, 1, ... `layers` - 1 layers."""
    return torch.bincount(torch.tensor(points, dtype=torch.long), minlength=layers).tolist()


def regions(counts: list[int]) -> list[tuple[int, int]]:
    """Returns the dense regions of a histogram: runs of layers above the mean,
    first and last, most dense first.

    Layer 0 has no layer before it to differ from and does not count in the mean.
    """
    mean = sum(counts) / max(1, len(counts) - 1)
    runs = groupby(range(len(counts)), key=lambda layer: counts[layer] > mean)
    dense = [list(layers) for above, layers in runs if above]
    dense.sort(key=lambda run: -sum(counts[layer] for layer in run))
    return [(run[0], run[-1]) for run in dense]


def propose(counts: list[int], cuts: int = 3) -> list[int]:
    """Proposes after how many layers to cut, given the histogram of change points.

    The paper's rule is not to cut inside a dense region but just before or after it. Here cuts
    stand after the densest regions, where attention has settled, then before them while there are
    fewer than `cuts`.
    """
    dense = regions(counts)
    after = [last + 1 for _, last in dense if last + 1 < len(counts)]
    before = [first for first, _ in dense if first > 0]
    return sorted(list(dict.fromkeys([*after, *before]))[:cuts])
