"""Sparse attention beside a pruner, as one pruner: `none+xattention`, `divprune+pooled`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass
from typing import Any

from vlm_prune.pruning.attention.base import SparseAttention
from vlm_prune.vlm.trace import Trace


def with_attention(method: Any, attention: SparseAttention) -> Any:
    """Returns the pruner, with sparse attention to what it keeps; its trace says what that computed.

    Hyperparameters are those of the pruner, and `attention`.
    """
    kind = type(method)

    @contextmanager
    def call(
        self: Any, model: Any, vision: Any = None, video_frames: Any = None
    ) -> Iterator[Trace]:
        block = kind.__call__(self, model, vision, video_frames)
        with block as trace, self.attention(model) as computed:
            trace.attention = computed
            yield trace

    def admit(self: Any, model: Any) -> Any:
        self.attention.admit(model)
        return kind.admit(self, model)

    pruner = make_dataclass(
        f"{kind.__name__}With{type(attention).__name__}",
        [("attention", SparseAttention, field(default_factory=lambda: attention))],
        bases=(kind,),
        namespace={"__call__": call, "admit": admit, "__doc__": kind.__doc__},
        kw_only=True,
    )
    return pruner(**{own.name: getattr(method, own.name) for own in fields(method) if own.init})
