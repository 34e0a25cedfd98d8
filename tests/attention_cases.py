"""Every registered method of sparse attention, with the arguments it is tested with on short prompts."""

from dataclasses import dataclass

import torch

from vlm_prune.pruning.attention import (
    ATTENTION,
    BlockAttention,
    Seer,
    SparseAttention,
    build_attention,
)

BLOCK, TAIL = 8, 4
SHORT = {"block": BLOCK, "tail": TAIL, "minimum": 1}
ARGUMENTS = {
    "local": {"window": 16},
    "power": {"window": 8},
    "s2": {"window": 8, "stride": 3},
    "anchor": {"step": 2, "theta": 2.5},
    "xattention": {"stride": 4, "mass": 0.7},
    "pooled": {"mass": 0.7},
    "sale": {"threshold": 0.05},
    "prism": {"mass": 0.7},
    "hip": {"keys": 7},
    "own-frame": {"window": 8, "previous": 1},
    "dhsa": {"keys": 16},
    "seer": {"threshold": 0.25},
}
PREFILL = [name for name in ATTENTION if issubclass(ATTENTION[name], BlockAttention)]
RULES = [name for name in PREFILL if ATTENTION[name].choose is not BlockAttention.choose]


@dataclass
class RandomGates(Seer):
    """Gates that are drawn for a layer, on any model."""

    def admit(self, model):
        SparseAttention.admit(self, model)

    def gates(self, inputs):
        draw = torch.Generator().manual_seed(inputs.layer)
        width = inputs.key.shape[2]
        return tuple(
            torch.randn(inputs.groups, parts * width, width, generator=draw)
            * (parts * width) ** -0.5
            for parts in (1, 3)
        )


def short(name, **more):
    """A method with blocks of eight tokens, on prompts of any length."""
    if name == "seer" and "calibration" not in more:
        return RandomGates(**SHORT | ARGUMENTS["seer"] | more)
    return build_attention(name, **SHORT | ARGUMENTS.get(name, {}) | more)
