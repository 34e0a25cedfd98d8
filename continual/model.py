"""Gated LoRA in a CLIP: insert before a task, merge after it; in between tasks nothing of it stays."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from vlm_prune.continual.attention import Site, fuse, sites, split
from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import Placement
from vlm_prune.continual.delta import add
from vlm_prune.continual.layer import GatedLoRA
from vlm_prune.vlm.common.errors import InputError


def placed_sites(clip: Clip, placement: Placement) -> dict[str, Site]:
    """Returns the sites that a placement names, in a CLIP that is split.

    Raises:
        InputError: if a tower or a module that it names has none.
    """
    found = {
        name: site
        for name, site in sites(clip.model).items()
        if site.tower in placement.towers and site.module in placement.modules
    }
    for tower in placement.towers:
        have = {site.module for site in found.values() if site.tower == tower}
        missing = [module for module in placement.modules if module not in have]
        if missing:
            raise InputError(
                f"the {tower} tower has no linear map for {', '.join(missing)}; "
                "give other modules, or another encoder"
            )
    return found


def insert(
    clip: Clip, placement: Placement, make: Callable[[nn.Linear, int], GatedLoRA]
) -> dict[str, GatedLoRA]:
    """Splits attention, freezes the CLIP, and puts a gated LoRA at each site; returns them by site.

    Args:
        clip: the model, changed in place.
        placement: towers and modules that get layers.
        make: builds the layer from its base and its number among the sites.

    Raises:
        InputError: if a tower or a module of the placement does not exist, or the rank is above
            the width.
    """
    split(clip.model)
    try:
        names = placed_sites(clip, placement)
        layers = {n: make(clip.model.get_submodule(n), k) for k, n in enumerate(names)}
        for name, layer in layers.items():
            rank, most = len(layer.A), min(layer.base.weight.shape)
            if rank > most:
                raise InputError(f"rank {rank} is above the width of {name}; give 1 to {most}")
    except InputError:
        fuse(clip.model)
        raise
    clip.model.requires_grad_(False)
    for name, layer in layers.items():
        _replace(clip.model, name, layer)
    return layers


def remove(clip: Clip, layers: Mapping[str, GatedLoRA], changes: Mapping[str, Tensor]) -> None:
    """Adds `changes` to the bases in float32, puts the bases back and fuses attention again.

    Args:
        clip: with its layers replaced.
        layers: the replaced ones by site.
        changes: for each site, (d_out, d_in).
    """
    for name, layer in layers.items():
        if name in changes:
            add(layer.base.weight, changes[name])
        _replace(clip.model, name, layer.base)
    fuse(clip.model)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    before, _, name = path.rpartition(".")
    setattr(model.get_submodule(before), name, module)
