"""Sparse attention, one paper per file; registering a method here is enough to test it.

It is for prompts that keep nearly all of their image tokens: pruning cuts the linear layers, too.
"""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from vlm_prune.pruning.attention.act import ACT, calibrate_act
from vlm_prune.pruning.attention.anchor import AnchorAttention
from vlm_prune.pruning.attention.base import BlockAttention, SparseAttention
from vlm_prune.pruning.attention.calibration import HeadCalibration
from vlm_prune.pruning.attention.compose import with_attention
from vlm_prune.pruning.attention.dhsa import DHSA
from vlm_prune.pruning.attention.hip import HiP
from vlm_prune.pruning.attention.local import Local
from vlm_prune.pruning.attention.oracle import OracleBlocks
from vlm_prune.pruning.attention.own_frame import OwnFrame
from vlm_prune.pruning.attention.pooled import Pooled
from vlm_prune.pruning.attention.power import PowerAttention
from vlm_prune.pruning.attention.prism import Prism
from vlm_prune.pruning.attention.random_blocks import RandomBlocks
from vlm_prune.pruning.attention.recycled import Recycled
from vlm_prune.pruning.attention.s2 import S2Attention
from vlm_prune.pruning.attention.sale import Sale, calibrate_sale
from vlm_prune.pruning.attention.seer import Seer, train_gates
from vlm_prune.pruning.attention.trace import SparseTrace
from vlm_prune.pruning.attention.xattention import XAttention
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry

ATTENTION: Registry[type[SparseAttention]] = Registry(
    "attention method",
    {
        "local": Local,
        "random-blocks": RandomBlocks,
        "oracle": OracleBlocks,
        "power": PowerAttention,
        "s2": S2Attention,
        "own-frame": OwnFrame,
        "pooled": Pooled,
        "prism": Prism,
        "anchor": AnchorAttention,
        "xattention": XAttention,
        "sale": Sale,
        "hip": HiP,
        "dhsa": DHSA,
        "seer": Seer,
        "recycled": Recycled,
        "act": ACT,
    },
)


def build_attention(name: str, **hyperparameters: Any) -> SparseAttention:
    """Returns a method of sparse attention by its registered name.

    Raises:
        InputError: if there is no such method or hyperparameter, or a value is out of range.
    """
    method = ATTENTION[name]
    known = [field.name for field in fields(method)]
    for given in hyperparameters:
        if given not in known:
            near = get_close_matches(given, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"{name} has no hyperparameter {given!r}{hint} (it has {', '.join(known)})"
            )
    return method(**hyperparameters)


__all__ = [
    "ACT",
    "ATTENTION",
    "DHSA",
    "AnchorAttention",
    "BlockAttention",
    "HeadCalibration",
    "HiP",
    "Local",
    "OracleBlocks",
    "OwnFrame",
    "Pooled",
    "PowerAttention",
    "Prism",
    "RandomBlocks",
    "Recycled",
    "S2Attention",
    "Sale",
    "Seer",
    "SparseAttention",
    "SparseTrace",
    "XAttention",
    "build_attention",
    "calibrate_act",
    "calibrate_sale",
    "train_gates",
    "with_attention",
]
