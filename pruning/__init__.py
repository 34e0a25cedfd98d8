"""Vision-token pruners, one paper per file; registering a method here is enough to test it."""

from vlm_prune.pruning.adaptinfer import AdaptInfer
from vlm_prune.pruning.apet import Apet, ApetInside
from vlm_prune.pruning.base import (
    DecoderPruner,
    DecoderScorePruner,
    OrderPruner,
    Pruner,
    ScorePruner,
    VisionPruner,
)
from vlm_prune.pruning.best import Best
from vlm_prune.pruning.cdpruner import CDPruner
from vlm_prune.pruning.coin import CoIn
from vlm_prune.pruning.compose import Cascade, Merge, merging
from vlm_prune.pruning.dart import Dart
from vlm_prune.pruning.dedupe import Dedupe
from vlm_prune.pruning.divprune import DivPrune
from vlm_prune.pruning.downsample import Downsample
from vlm_prune.pruning.evs import EVS
from vlm_prune.pruning.fastv import FastV
from vlm_prune.pruning.fastvid import FastVID
from vlm_prune.pruning.flashvid import FlashVID
from vlm_prune.pruning.fopru import FoPru
from vlm_prune.pruning.frames import Frames
from vlm_prune.pruning.holitom import HoliTom
from vlm_prune.pruning.icr import ICR
from vlm_prune.pruning.mmtok import MMTok
from vlm_prune.pruning.none import NoPruning
from vlm_prune.pruning.pool import Pool
from vlm_prune.pruning.pyramiddrop import PyramidDrop
from vlm_prune.pruning.random import Random
from vlm_prune.pruning.restore import Restore
from vlm_prune.pruning.scope import Scope
from vlm_prune.pruning.sparsevlm import SparseVLM
from vlm_prune.pruning.v_cast import VCast
from vlm_prune.pruning.vidcom2 import VidCom2
from vlm_prune.pruning.video import VideoPruner
from vlm_prune.pruning.visionzip import VisionZip
from vlm_prune.pruning.vispruner import VisPruner
from vlm_prune.pruning.zoo import Zoo, ZooExact
from vlm_prune.vlm.common.registry import Registry

METHODS: Registry[type[Pruner]] = Registry(
    "method",
    {
        "none": NoPruning,
        "random": Random,
        "pool": Pool,
        "downsample": Downsample,
        "frames": Frames,
        "fopru": FoPru,
        "adaptinfer": AdaptInfer,
        "zoo": Zoo,
        "zoo-exact": ZooExact,
        "fastv": FastV,
        "sparsevlm": SparseVLM,
        "pyramiddrop": PyramidDrop,
        "dart": Dart,
        "visionzip": VisionZip,
        "vispruner": VisPruner,
        "divprune": DivPrune,
        "cdpruner": CDPruner,
        "mmtok": MMTok,
        "scope": Scope,
        "apet": Apet,
        "coin": CoIn,
        "evs": EVS,
        "vidcom2": VidCom2,
        "fastvid": FastVID,
        "flashvid": FlashVID,
        "holitom": HoliTom,
        "v-cast": VCast,
        "cascade": Cascade,
        "merge": Merge,
        "restore": Restore,
        "dedupe": Dedupe,
        "icr": ICR,
        "best": Best,
    },
)

__all__ = [
    "EVS",
    "ICR",
    "METHODS",
    "AdaptInfer",
    "Apet",
    "ApetInside",
    "Best",
    "CDPruner",
    "Cascade",
    "CoIn",
    "Dart",
    "DecoderPruner",
    "DecoderScorePruner",
    "Dedupe",
    "DivPrune",
    "Downsample",
    "FastV",
    "FastVID",
    "FlashVID",
    "FoPru",
    "Frames",
    "HoliTom",
    "MMTok",
    "Merge",
    "NoPruning",
    "OrderPruner",
    "Pool",
    "Pruner",
    "PyramidDrop",
    "Random",
    "Restore",
    "Scope",
    "ScorePruner",
    "SparseVLM",
    "VCast",
    "VidCom2",
    "VideoPruner",
    "VisPruner",
    "VisionPruner",
    "VisionZip",
    "Zoo",
    "ZooExact",
    "merging",
]
