"""Vision-token pruners, one paper per file; registering a method here is enough to test it."""

from vlm_prune.pruning.adaptinfer import AdaptInfer
from vlm_prune.pruning.base import DecoderPruner, Pruner, ScorePruner, VisionPruner
from vlm_prune.pruning.downsample import Downsample
from vlm_prune.pruning.fopru import FoPru
from vlm_prune.pruning.none import NoPruning
from vlm_prune.pruning.pool import Pool
from vlm_prune.pruning.random import Random
from vlm_prune.pruning.zoo import Zoo, ZooExact
from vlm_prune.vlm.registry import Registry

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
    },
)

__all__ = [
    "METHODS",
    "AdaptInfer",
    "DecoderPruner",
    "Downsample",
    "FoPru",
    "NoPruning",
    "Pool",
    "Pruner",
    "Random",
    "ScorePruner",
    "VisionPruner",
    "Zoo",
    "ZooExact",
]
