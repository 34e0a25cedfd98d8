"""ACT: attention sinks that say little get less, and what they free goes to the other keys."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import SparseAttention
from vlm_prune.pruning.attention.engine import MOST_PRODUCTS, MethodRun, PromptRow, by_prompt
from vlm_prune.pruning.attention.executors import attention_with_sums
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.sparse_attention import AttentionCall


@dataclass
class ACT(SparseAttention):
    """Calibrate the attention of a prefill: for accuracy, at more than the cost of dense attention.

    https://arxiv.org/abs/2406.15765

    A key but the first is a sink of a head where the rows that see it pay it more than `sink` times
    an even share of the prompt, on average. Its attention is multiplied by `keep`, and what is freed goes
    to the other keys in proportion. The authors choose heads on labeled questions; here it is
    all heads, of the layers from `dense_layers` on. Nothing but the sinks' columns of attention is held.

    Args:
        density: not used; all products are computed.
        sink: times an even share, 1 / n.
        keep: share of a sink's attention that stays.
        dense_layers: first decoder layers that are left as they are.
    """

    density: float | None = None
    sink: float = 5.0
    keep: float = 0.4
    dense_layers: int = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15765"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density not in (None, 1):
            raise InputError("act computes all products; leave out the density")
        if self.keep > 1:
            raise InputError(f"keep {self.keep} is no share; give one above 0, at most 1")

    def run(self) -> "CalibratedRun":
        """Returns the run that computes attention in one `with` block."""
        return CalibratedRun(self)


@dataclass
class CalibratedRun(MethodRun):
    """Computes all attention, with sinks that are calibrated."""

    method: ACT

    @torch.no_grad()
    def prefill(self, call: AttentionCall) -> Tensor | None:
        """Returns calibrated attention (B, n, H, v), each prompt without its padding."""
        method = self.method
        if self.too_early(call, method.dense_layers, method.minimum):
            return None
        return by_prompt(call, self.attend)

    def attend(self, call: AttentionCall, prompt: PromptRow, row: int) -> list[Tensor]:
        """Returns calibrated attention of one prompt, (H, n, v), in one part.

        Args:
            call: of the layer.
            prompt: a row of it.
            row: its number.
        """
        # keys and values for each query head
        shared = len(prompt.query) // len(prompt.key)
        key, value = (part.repeat_interleave(shared, 0) for part in (prompt.key, prompt.value))
        sink, keep = self.method.sink, self.method.keep
        return [calibrated(prompt.query, key, value, call.scaling, sink, keep)]


def calibrated(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sink: float, keep: float
) -> Tensor:
    """Returns causal attention (H, n, v) in which sinks keep a share of their weight,
    and other keys get the rest.

    Args:
        query: (H, n, d).
        key: (H, n, d).
        value: (H, n, v).
        scaling: factor of the products.
        sink: a key is a sink if the mean attention of the rows that see it exceeds sink / n; the
            first token is never one.
        keep: share of a sink's attention that stays.
    """
    heads, length = query.shape[:2]
    output, sums = (part[0] for part in attention_with_sums(
        query[None], key[None], value[None], scaling, True
    ))  # fmt: skip
    received = torch.zeros(heads, length, device=query.device)
    # few rows at a time, twice: to find sinks, then to calibrate
    size = max(1, MOST_PRODUCTS["other"] // 64 // (heads * length))
    index = torch.arange(length, device=query.device)

    def attention_of(rows: slice, columns: Tensor) -> Tensor:
        """Returns the attention of some rows to keys at some columns, (H, rows, columns)."""
        scores = (query[:, rows] @ key[:, columns].transpose(1, 2)).float() * scaling
        weights = (scores - sums[:, rows, None]).exp()
        return weights.masked_fill(columns > index[rows, None], 0)

    for first in range(0, length, size):
        rows = slice(first, min(first + size, length))
        received[:, : rows.stop] += attention_of(rows, index[: rows.stop]).sum(1)
    # the mean over the rows that see a key
    sinks = received / (length - index) > sink / length
    sinks[:, 0] = False
    # columns that are a sink of any head; the first token stays as it is
    columns = sinks.any(0).nonzero()[:, 0]
    if not len(columns):
        return output
    result = torch.empty_like(output)
    for first in range(0, length, size):
        rows = slice(first, first + size)
        weights = attention_of(rows, columns) * sinks[:, None, columns]
        share = weights.sum(-1, keepdim=True)
        from_sinks = weights @ value[:, columns].float()
        # what sinks free is spread over the other keys in proportion; without others they keep it
        others = (1 - share).clamp(min=0)
        factor = torch.where(others > 1e-6, (1 - keep * share) / others.clamp(min=1e-6), 0)
        kept = torch.where(others > 1e-6, keep, 1.0)
        result[:, rows] = (factor * (output[:, rows].float() - from_sinks) + kept * from_sinks).to(
            result.dtype
        )
    return result
