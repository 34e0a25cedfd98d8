"""ACT: attention sinks that say little get less, and what they free goes to the other keys."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.pruning.attention.base import Calibrated
from vlm_prune.pruning.attention.calibration import HeadCalibration, check_found
from vlm_prune.pruning.attention.engine import MethodRun, PromptRow, by_prompt, most_products
from vlm_prune.pruning.attention.executors import attend_dense, attention_with_sums
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.sparse_attention import AttentionCall, replaced_attention


@dataclass
class ACT(Calibrated):
    """Calibrate the attention of a prefill: for accuracy, at more than the cost of dense attention.

    https://arxiv.org/abs/2406.15765

    A key but the first is a sink of a head where the rows that see it pay it more than `sink` times
    an even share of the prompt, on average. Its attention is multiplied by `keep`, and what is freed goes
    to the other keys in proportion. Nothing but the sinks' columns of attention is held. The
    authors choose heads on labeled questions, as `calibrate_act` does.

    Args:
        density: not used; all products are computed.
        calibration: file of `calibrate_act`, whose heads are calibrated; all heads of the layers from
            `dense_layers` on where it is empty.
        sink: times an even share, 1 / n.
        keep: share of a sink's attention that stays.
        dense_layers: first decoder layers that are left as they are.
    """

    density: float | None = None
    sink: float = 5.0
    keep: float = 0.4
    dense_layers: int = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15765"
    registered: ClassVar[str] = "act"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density not in (None, 1):
            raise InputError("act computes all products; leave out the density")
        if self.keep > 1:
            raise InputError(f"keep {self.keep} is no share; give one above 0, at most 1")

    def run(self) -> "CalibratedRun":
        """Returns the run that computes attention in one `with` block."""
        heads = None if self.found is None else self.found.of_layers("heads")
        return CalibratedRun(self, heads=heads)


@dataclass
class CalibratedRun(MethodRun):
    """Computes all attention, with sinks that are calibrated.

    Args:
        method: its hyperparameters.
        trace: what was computed.
        heads: which heads of each layer are calibrated, (H,) of booleans; None for all of them.
    """

    method: ACT
    heads: Mapping[int, Tensor] | None = None

    @torch.no_grad()
    def prefill(self, call: AttentionCall) -> Tensor | None:
        """Returns calibrated attention (B, n, H, v), each prompt without its padding."""
        method = self.method
        if self.too_early(call, method.dense_layers, method.minimum):
            return None
        if self.heads is not None and not (
            call.layer in self.heads and bool(self.heads[call.layer].any())
        ):
            self.left_dense("no heads to calibrate")
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
        if self.heads is None:
            return [calibrated(prompt.query, key, value, call.scaling, sink, keep)]
        chosen = self.heads[call.layer].to(key.device)
        output = attend_dense(prompt.query, prompt.key, prompt.value, call.scaling)
        output[chosen] = calibrated(
            prompt.query[chosen], key[chosen], value[chosen], call.scaling, sink, keep
        )
        return [output]


@dataclass
class HeadCount(MethodRun):
    """Leaves all attention to SDPA, and notes how many heads the layers have that could be calibrated.

    Args:
        method: its hyperparameters.
        trace: what was computed.
        heads: of each layer.
    """

    method: ACT
    heads: dict[int, int] = field(default_factory=dict)

    def prefill(self, call: AttentionCall) -> Tensor | None:
        """Returns None, and notes the heads of a layer."""
        method = self.method
        if not self.too_early(call, method.dense_layers, method.minimum):
            self.heads[call.layer] = call.query.shape[1]
        return None


def calibrate_act(
    model: Any,
    accuracy: Callable[[], float],
    method: ACT | None = None,
    progress: Callable[[int, int], None] = lambda done, passes: None,
) -> HeadCalibration:
    """Returns which heads to calibrate, found on labeled questions, for `ACT(calibration=...)`.

    https://arxiv.org/abs/2406.15765

    Heads are calibrated one at a time, and those are chosen with which alone the model answers more
    questions right than without. The questions should be none that the model is measured on later; the
    authors take 900. On few of them chance chooses many heads.

    Args:
        model: of a supported family.
        accuracy: answers the questions with the model, and returns the share that is right; called
            once for the model as it is, and once for each head.
        method: hyperparameters; its `dense_layers` first layers are left out. `ACT` as it is unless
            given.
        progress: called after each pass over the questions, with the passes done and all of them.

    Raises:
        InputError: if the model's attention cannot be replaced, or no prompt is long enough.
    """
    method = ACT() if method is None else method
    count = HeadCount(method)
    with replaced_attention(model, count):
        before = accuracy()
    check_found(count.heads, "ACT", method.minimum)
    tensors, passes, done = dict[str, Tensor](), 1 + sum(count.heads.values()), 1
    progress(done, passes)
    for layer, heads in sorted(count.heads.items()):
        after = torch.zeros(heads)
        for head in range(heads):
            alone = {layer: torch.arange(heads) == head}
            with replaced_attention(model, CalibratedRun(method, heads=alone)):
                after[head] = accuracy()
            progress(done := done + 1, passes)
        tensors[f"layers.{layer}.heads"] = after > before
        tensors[f"layers.{layer}.accuracy"] = after
    about = {"accuracy": before, "method_options": asdict(method)}
    return HeadCalibration.of("act", tensors, model, **about)


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
    size = max(1, most_products(query.device) // (heads * length))
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
