"""What pruning did, and whether the initial gates alone explain it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_prune.continual.attention import Site
from vlm_prune.continual.clip import extra
from vlm_prune.continual.config import MODULES, Tower
from vlm_prune.continual.delta import Delta


@dataclass(frozen=True)
class Survival:
    """How the kept components follow from their initial gates.

    Args:
        components: in all sites together.
        kept: those that were merged.
        correlation: of |initial gate| with having survived, point-biserial; nan where all gates
            start equal, or all or no components survived.
        agreement: share of the components of which "|initial gate| > total shrinkage" tells
            whether they survived.
        expected: number that would survive by that rule.
    """

    components: int
    kept: int
    correlation: float
    agreement: float
    expected: int

    @property
    def mean_rank_share(self) -> float:
        """Returns the share of all components that survived."""
        return self.kept / self.components


def survival(delta: Delta, total: float) -> Survival:
    """Compares survival with the initial gates.

    Args:
        delta: of one task.
        total: what the proximal steps shrink a gate by altogether, `prox.total_shrinkage`.
    """
    starts, survived = [], []
    for factors in delta.factors.values():
        # which of the initial components are among the kept ones
        mask = torch.zeros(len(factors.start), dtype=torch.bool)
        mask[factors.kept] = True
        starts.append(factors.start.abs())
        survived.append(mask)
    size = torch.cat(starts).double().numpy()
    stayed = torch.cat(survived).numpy()
    varied = size.std() > 0 and 0 < stayed.sum() < len(stayed)
    correlation = float(np.corrcoef(size, stayed)[0, 1]) if varied else math.nan
    # the null model: an untrained gate survives where it starts above the sum of all thresholds
    rule = size > total
    return Survival(
        len(stayed), int(stayed.sum()), correlation, float((rule == stayed).mean()), int(rule.sum())
    )


def ranks(delta: Delta, sites: Mapping[str, Site], tower: Tower) -> NDArray[np.float64]:
    """Returns the number of kept components by module and layer (6, layers);
    nan where there is no adapter.

    Args:
        delta: the low-rank changes of a task.
        sites: by name, `attention.sites` of a CLIP that is split.
        tower: whose layers they are.
    """
    depth = 1 + max((s.layer for s in sites.values() if s.tower == tower), default=-1)
    table = np.full((len(MODULES), depth), np.nan)
    for name, factors in delta.factors.items():
        site = sites[name]
        if site.tower == tower:
            table[MODULES.index(site.module), site.layer] = factors.rank
    return table


def null_ranks(delta: Delta, total: float) -> dict[str, int]:
    """Returns the components per site that the initial gates alone would
    leave: the map to compare with.
    """
    return {n: int((f.start.abs() > total).sum()) for n, f in delta.factors.items()}


def update_norms(delta: Delta) -> dict[str, float]:
    """Returns the Frobenius norm of each site's change."""
    return {name: float(f.matrix().norm()) for name, f in delta.factors.items()}


def draw_ranks(delta: Delta, sites: Mapping[str, Site], path: Path) -> None:
    """Writes a picture of the kept ranks, module by layer, one panel per tower.

    Args:
        delta: the low-rank changes of a task.
        sites: where each of them sits.
        path: the picture to write.
    """
    figure_module = extra("matplotlib.figure")
    towers: list[Tower] = ["vision", "text"]
    tables = {t: table for t in towers if (table := ranks(delta, sites, t)).size}
    figure = figure_module.Figure(figsize=(6 * len(tables), 3), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    most = max(len(f.start) for f in delta.factors.values())
    for axis, (tower, table) in zip(axes, tables.items(), strict=True):
        image = axis.imshow(table, vmin=0, vmax=most, aspect="auto", cmap="viridis")
        axis.set_title(f"{tower} tower")
        axis.set_xlabel("layer")
        axis.set_yticks(range(len(MODULES)), MODULES)
    figure.colorbar(image, ax=list(axes), label=f"rank kept of {most}")
    figure.savefig(path)
