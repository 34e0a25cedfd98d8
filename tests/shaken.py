"""Learners as training would leave them: with every weight random."""

import torch

from vlm_prune.learners.model import wings_layers


def shake(model, seed=0, deviation=0.3):
    """Give every learner and router weight a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in wings_layers(model).values():
            for parameter in layer.parameters():
                parameter.normal_(0, deviation, generator=generator)
