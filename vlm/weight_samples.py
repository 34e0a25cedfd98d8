"""Which model something was found for: some weights of its decoder."""

import torch
from torch import Tensor

from vlm_prune.vlm.families import Family
from vlm_prune.vlm.families.base import loaded

SAMPLES, PRECISION = 8, 2**-6


@torch.no_grad()
def weight_samples(family: Family) -> Tensor:
    """Returns weights at even distances in each parameter of the decoder's layers, (n,), in fp32."""
    found = []
    for layer in family.decoder.layers:
        for module in layer.modules():
            with loaded(module):
                for parameter in module.parameters(recurse=False):
                    # tensors of quantizing libraries have kinds of their own
                    if type(data := parameter.data) is Tensor and data.numel():
                        steps = torch.arange(SAMPLES, device=data.device)
                        index = steps * (data.numel() - 1) // (SAMPLES - 1)
                        found.append(data.flatten()[index].float().cpu())
    return torch.cat(found)


def same_samples(ours: Tensor, theirs: Tensor) -> bool:
    """Returns whether samples are of one model, perhaps in two precisions."""
    return ours.shape == theirs.shape and bool(
        torch.isclose(ours, theirs, rtol=PRECISION, atol=PRECISION**2).all()
    )
