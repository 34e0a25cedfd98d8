"""Continual learners by name: CoDyRA, its controls, and its rivals."""

from dataclasses import fields, replace
from typing import Any

from vlm_prune.continual.config import Placement, check_options
from vlm_prune.continual.methods.adalora import AdaLoRA
from vlm_prune.continual.methods.base import Context, Method, Space
from vlm_prune.continual.methods.codyra import CoDyRA
from vlm_prune.continual.methods.codyra_plus import CoDyRAPlus
from vlm_prune.continual.methods.condu import ConDU
from vlm_prune.continual.methods.dora import DoRA
from vlm_prune.continual.methods.full import FullFineTune
from vlm_prune.continual.methods.keeplora import KeepLoRA
from vlm_prune.continual.methods.lda_text import LDAText
from vlm_prune.continual.methods.lora import LoRA
from vlm_prune.continual.methods.lwf import LwF
from vlm_prune.continual.methods.moram import MoRAM
from vlm_prune.continual.methods.olora import OLoRA
from vlm_prune.continual.methods.rail import RAIL
from vlm_prune.continual.methods.randlora import RandLoRA
from vlm_prune.continual.methods.random_rank import RandomRank
from vlm_prune.continual.methods.wise_ft import WiseFT
from vlm_prune.continual.methods.zero_shot import ZeroShot
from vlm_prune.continual.methods.zscl import ZSCL
from vlm_prune.vlm.common.registry import Registry

METHODS: Registry[type[Method]] = Registry("continual method")
for _method in (
    ZeroShot, CoDyRA, CoDyRAPlus, RandomRank, LoRA, OLoRA, DoRA, RandLoRA, AdaLoRA,
    KeepLoRA, MoRAM, FullFineTune, ConDU, WiseFT, LwF, ZSCL, RAIL, LDAText,
):  # fmt: skip
    METHODS.register(_method.name, _method)


def make_method(name: str, **options: Any) -> Method:
    """Builds a method by its name.

    Methods with a `placement` also take `encoder`, which changes their placement's towers alone.

    Raises:
        InputError: for an unknown name or option, or a value of another kind or out of range.
    """
    kind = METHODS[name]
    placements: list[Any] = [f for f in fields(kind) if f.name == "placement"]
    if placements and "encoder" in options:
        default: Placement = options.get("placement", placements[0].default_factory())
        check_options(Placement, name, {"encoder": options["encoder"]})
        options["placement"] = replace(default, encoder=options.pop("encoder"))
    check_options(kind, name, options)
    return kind(**options)


__all__ = ["METHODS", "Context", "Method", "Space", "make_method"]
