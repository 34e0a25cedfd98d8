"""Where text attention goes, layer by layer: before, onto and after the image.

https://arxiv.org/abs/2406.03496, section 2.2 (MLLM-LAWS)

The paper sums attention weights over queries and, it seems from its figure, divides by their number;
it does not say how heads are merged. Here both are means, so the curves are proportions. It has
no token-0 variant; since the first token is an attention sink and lies before the image, report both.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_prune.learners.columns import ColumnSum, Route, with_column_sum
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of

GROUPS = ("before", "itself", "after")


def segments(is_image: Tensor, valid: Tensor, first_token: bool = True) -> Tensor:
    """Returns indicator columns of the three groups, (B, N, 3).

    With several images `before` ends at the first one and `after` starts behind the last; text
    between them belongs to no group. Rows without an image are all zero.

    Args:
        is_image: which tokens are an image's, (B, N).
        valid: which are no padding, (B, N).
        first_token: whether the first valid token belongs to `before`.
    """
    image = is_image & valid
    # 0 before the first image token, and the total behind the last one
    seen = image.cumsum(1)
    text = valid & ~image & image.any(1, keepdim=True)
    before, after = text & (seen == 0), text & (seen == seen[:, -1:])
    if not first_token:
        before = before & (valid.cumsum(1) > 1)
    return torch.stack([before, image, after], -1).float()


def answer_queries(labels: Tensor) -> Tensor:
    """Returns which tokens predict an answer token, from labels with -100
    elsewhere; (B, N) -> (B, N).
    """
    return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))


@torch.no_grad()
def laws(
    model: Any,
    inputs: dict[str, Tensor],
    queries: Tensor | None = None,
    first_token: bool = True,
) -> Tensor:
    """Returns the shares of main attention that go before, onto and after
    the image, per row and layer.

    No attention maps are built. On a model with Wings this is its main branch alone.

    Args:
        model: a supported vision-language model, with or without learners.
        inputs: what its processor gives, with `input_ids` (B, N).
        queries: which tokens' attention to average, (B, N); all valid ones if None.
        first_token: count attention to the first token of the row.

    Returns:
        Curves (B, 3, layers), groups in the order of `GROUPS`; NaN for a row without queries.
    """
    family, ids = family_of(model), inputs["input_ids"]
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    columns = segments(ids == family.image_token, valid, first_token)
    sums: list[ColumnSum] = []

    def read(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sums.append(ColumnSum(columns))
        return args, with_column_sum(kwargs, sums[-1])

    with ExitStack() as stack:
        for layer in family.decoder.layers:
            stack.callback(Route(layer.self_attn).remove)
            hook = layer.self_attn.register_forward_pre_hook(read, with_kwargs=True)
            stack.callback(hook.remove)
        model(**inputs)
    # mean over each row's queries of what they pay to the groups, layer by layer
    chosen = (valid if queries is None else queries & valid).float()[..., None]
    curves = [
        (column_sum.result.float() * chosen).sum(1) / chosen.sum(1)
        for column_sum in sums
        if column_sum.result is not None
    ]
    return torch.stack(curves, -1)


def attention_shift(curves: Tensor) -> Tensor:
    """Returns 1 - Pearson correlation of the before and after curves
    over layers: 0 is best, 2 worst.

    Shapes: (B, 3, layers) -> (B,); NaN where it is undefined, that is for an empty group or a curve
    that does not vary. `nanmean()` of it is the paper's score.
    """
    # Pearson correlation over layers, of centered curves
    before, after = (curves[:, group] - curves[:, group].mean(-1, keepdim=True) for group in (0, 2))
    product = before.norm(dim=-1) * after.norm(dim=-1)
    shift: Tensor = 1 - (before * after).sum(-1) / product
    return shift.masked_fill(product < 1e-12, torch.nan)


def plot_curves(curves: Tensor | Sequence[Tensor], path: str | Path) -> None:
    """Draws the mean curves, with a band of one standard deviation over rows, to an image file.

    Args:
        curves: (B, 3, layers), or a list of such batches.
        path: file whose suffix chooses the format.

    Raises:
        InputError: when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'vlm-prune[plot]'") from None
    rows = torch.cat([curves] if isinstance(curves, Tensor) else list(curves)).float().cpu()
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    layers = range(1, rows.shape[-1] + 1)
    for group, name in enumerate(GROUPS):
        mean, deviation = rows[:, group].nanmean(0), rows[:, group].std(0, correction=0)
        axes.plot(layers, mean, label=name)
        axes.fill_between(layers, mean - deviation, mean + deviation, alpha=0.2)
    score = attention_shift(rows).nanmean()
    axes.set(xlabel="layer", ylabel="share of attention", title=f"attention shift {score:.3f}")
    axes.legend()
    figure.savefig(path)
