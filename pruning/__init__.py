"""Vision-token pruners, one paper per file; registering a method here is enough to test it."""

from vlm_prune.pruning.adaptinfer import AdaptInfer
from vlm_prune.pruning.apet import Apet, ApetInside
from vlm_prune.pruning.base import (
    DecoderPruner,
    DecoderScorePruner,
    Pruner,
    ScorePruner,
    VisionPruner,
)
from vlm_prune.pruning.best import Best
from vlm_prune.pruning.cdpruner import CDPruner
from vlm_prune.pruning.coin import CoIn
from vlm_prune.pruning.compose import Cascade, Merge, merging
from vlm_prune.pruning.dart import Dart
from vlm_prune.pruning.divprune import DivPrune
from vlm_prune.pruning.downsample import Downsample
from vlm_prune.pruning.fastv import FastV
from vlm_prune.pruning.fopru import FoPru
from vlm_prune.pruning.mmtok import MMTok
from vlm_prune.pruning.none import NoPruning
from vlm_prune.pruning.pool import Pool
from vlm_prune.pruning.pyramiddrop import PyramidDrop
from vlm_prune.pruning.random import Random
from vlm_prune.pruning.restore import Restore
from vlm_prune.pruning.scope import Scope
from vlm_prune.pruning.sparsevlm import SparseVLM
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
        "cascade": Cascade,
        "merge": Merge,
        "restore": Restore,
        "best": Best,
    },
)

__all__ = [
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
    "DivPrune",
    "Downsample",
    "FastV",
    "FoPru",
    "MMTok",
    "Merge",
    "NoPruning",
    "Pool",
    "Pruner",
    "PyramidDrop",
    "Random",
    "Restore",
    "Scope",
    "ScorePruner",
    "SparseVLM",
    "VisPruner",
    "VisionPruner",
    "VisionZip",
    "Zoo",
    "ZooExact",
    "merging",
]
