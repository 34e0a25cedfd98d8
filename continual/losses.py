"""Losses over unit features of images and class prompts.

https://arxiv.org/abs/2412.01004
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_prune.continual.config import TextTerm


def image_to_text(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the cross-entropy of each image over the current classes, (M,).

    Args:
        logits: (M, C).
        labels: (M,).
        smoothing: of the labels.
    """
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def text_to_image(logits: Tensor, labels: Tensor, term: TextTerm, earlier: int = 0) -> Tensor:
    """Returns the cross-entropy of each class over the images of the batch.

    Every image of a class is a target of weight 1, so a class with two images counts twice.

    Args:
        logits: (M, C) over the current classes.
        labels: (M,).
        term: divide by `all` classes, the current and `earlier` ones together, or by those
            `present` in the batch; `none` is 0.
        earlier: classes of the tasks before.
    """
    if term == "none":
        return logits.new_zeros(())
    # softmax over the images of the batch, of each image's own class
    hit = logits.log_softmax(dim=0).gather(1, labels[:, None]).sum()
    classes = labels.unique().numel() if term == "present" else logits.shape[1] + earlier
    return -hit / classes


def distil(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns the mean cross-entropy of softened rows with those of the teacher, times T².

    https://arxiv.org/abs/1503.02531

    Args:
        student: logits (n, C).
        teacher: logits (n, C).
        temperature: T, by which both are divided.
    """
    # squared, so that gradients do not shrink with the temperature
    target = (teacher / temperature).softmax(-1)
    log = (student / temperature).log_softmax(-1)
    return -(target * log).sum(-1).mean() * temperature**2


def chosen_prompts(
    labels: Tensor, classes: int, most: int | None, generator: torch.Generator
) -> Tensor:
    """Returns the indices of at most `most` class prompts (or as many as the batch has), the
    batch's first.

    Args:
        labels: of the batch, (m,).
        classes: how many there are.
        most: None takes all.
        generator: draws the others.
    """
    if most is None or most >= classes:
        return torch.arange(classes)
    present = labels.cpu().unique()
    # the batch's own classes, then others at random
    rest = torch.randperm(classes, generator=generator)
    rest = rest[~torch.isin(rest, present)][: max(0, most - len(present))]
    return torch.cat([present, rest]).sort().values
