"""The interface that every continual learner fills in, and what it is given for a task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vlm_prune.continual import losses
from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.delta import Delta
from vlm_prune.vlm.common.errors import InputError

ParameterGroup = dict[str, Any]


@dataclass
class Context:
    """What a method is given for one task.

    Args:
        clip: the plain model, with everything earlier tasks taught it.
        recipe: of the training.
        number: of the task, from 0.
        ids: token ids of the current classes' prompts (C, length).
        earlier: those of the earlier tasks' classes (E, length).
        train: batches of (pixels, labels) over the training split, in order, not augmented.
        gather: joins rows of all processes, passing gradients back to each.
    """

    clip: Clip
    recipe: Recipe
    number: int
    ids: Tensor
    earlier: Tensor
    train: Callable[[], Iterator[tuple[Tensor, Tensor]]] = lambda: iter(())
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def generator(self, *purpose: int) -> torch.Generator:
        """Returns a generator for one purpose within this task; the same for the same seed."""
        key = [self.recipe.seed, self.number, *purpose]
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def encode(self, ids: Tensor, batch: int = 256) -> Tensor:
        """Returns unit features of prompts (n, d), without gradients."""
        parts = [self.clip.encode_text(part.to(self.clip.device)) for part in ids.split(batch)]
        return torch.cat(parts)


@dataclass
class Space:
    """The classes that a test image is scored against: of each column its task and its class, and
    whether all are of the image's own task, which is thereby told.
    """

    task: Tensor
    label: Tensor
    told: bool = False


@dataclass
class Method(ABC):
    """A continual learner: its options are fields, its four steps are called in this order.

    Between tasks the model in the context is plain: whatever `begin_task` puts in, `end_task`
    takes out again, with what was learned in the model's own weights.
    """

    name: ClassVar[str]
    context: Context = field(init=False, repr=False, compare=False)
    _frozen_texts: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def options(self) -> dict[str, Any]:
        """Returns the options as they were given, for the record."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @abstractmethod
    def begin_task(self, context: Context) -> list[ParameterGroup]:
        """Prepares the model; returns AdamW's parameter groups, none if nothing is trained."""

    def loss(self, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
        """Returns the loss of a batch, ().

        Args:
            pixels: (m, 3, H, W).
            labels: (m,), -1 in rows that only pad.
            step: of the task, from 0.
        """
        return self.supervised(*self.features(pixels, labels), step)

    def after_step(self, step: int) -> None:
        """Acts after the optimizer's step (from 0), while gradients are
        still there; here not at all.
        """
        return

    @abstractmethod
    def end_task(self) -> Delta | None:
        """Writes what was learned into the model and makes it plain;
        returns it as factors if any.
        """

    def adapters(self) -> dict[str, nn.Parameter]:
        """Returns parameters of adapters by name; the model's forward
        must reach every one of them.
        """
        return {}

    def check_gradients(self) -> None:
        """Checks after a task's first backward pass that every adapter got a gradient.

        Raises:
            InputError: if an adapter got no gradient: the model does not call the module that it
                wraps, as fused attention, which reads weights, does not.
        """
        missed = [name for name, parameter in self.adapters().items() if parameter.grad is None]
        if missed:
            raise InputError(
                f"{len(missed)} trainable parameters of {self.name} get no gradient, "
                f"{missed[0]} first: the model does not call the modules they wrap; "
                "leave these modules out of the placement"
            )

    def added_parameters(self) -> int:
        """Returns how many parameters answering needs beside the model's
        own; none where all is merged.
        """
        return 0

    def added_bytes(self) -> int:
        """Returns how many bytes answering needs beside the model's own weights."""
        return 4 * self.added_parameters()

    def state(self) -> dict[str, Tensor]:
        """Returns what a run needs to go on, beside the model and the trained parameters."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave; within a task this comes after `begin_task`."""
        return

    def scores(self, features: Tensor, logits: Tensor, space: Space) -> Tensor:
        """Returns the scores of test images over the columns of `space`.

        Args:
            features: unit features (M, d) of the images.
            logits: scaled cosines (M, C) with the class prompts, which most methods return.
            space: task and label of each of the C classes.
        """
        return logits

    def answer(
        self, clip: Clip, pixels: Tensor, bank: Tensor, space: Space, encode: Callable[[], Tensor]
    ) -> Tensor:
        """Returns the scores of test images over the columns of `space`, (M, C).

        Args:
            clip: the model.
            pixels: of the images, (M, 3, H, W).
            bank: unit features of the columns' class prompts, (C, d).
            space: task and label of each column.
            encode: gives the bank anew, for methods that answer with other weights.
        """
        features = clip.encode_image(pixels)
        return self.scores(features, clip.scale * features @ bank.T, space)

    def features(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns unit features (M, d) and labels (M,) of the batch over all processes."""
        images = self.context.gather(self.context.clip.encode_image(pixels))
        labels = self.context.gather(labels)
        real = labels >= 0
        return images[real], labels[real]

    def texts(self, kept: Tensor) -> Tensor:
        """Returns unit features (n, d) of the current prompts `kept`; computed
        once where the tower is frozen.
        """
        context = self.context
        if context.clip.trains("text"):
            return context.clip.encode_text(context.ids[kept].to(context.clip.device))
        if self._frozen_texts is None:
            self._frozen_texts = context.encode(context.ids)
        return self._frozen_texts[kept.to(self._frozen_texts.device)]

    def supervised(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Returns CoDyRA's supervised loss, which all methods share: both cross-entropies, 1 to 1.

        The text-to-image term is left out where only the text tower is trained.

        Args:
            images: unit features (m, d).
            labels: (m,).
            step: of the task, from 0; it decides which prompts are drawn.
        """
        context = self.context
        recipe, classes = context.recipe, len(context.ids)
        generator = context.generator(1, step)
        kept = losses.chosen_prompts(labels, classes, recipe.prompts, generator)
        logits = context.clip.scale * images @ self.texts(kept).T
        if len(kept) < classes:
            labels = torch.searchsorted(kept.to(labels.device), labels)
        loss = losses.image_to_text(logits, labels, recipe.label_smoothing)
        if context.clip.trains("vision"):
            earlier = len(context.earlier)
            loss = loss + losses.text_to_image(logits, labels, recipe.text_term, earlier)
        return loss

    def start(self, context: Context) -> None:
        """Keeps the task for the other methods; `begin_task` calls it first."""
        self.context, self._frozen_texts = context, None


def opened(parameters: dict[str, nn.Parameter], lr: float) -> list[ParameterGroup]:
    """Makes parameters take gradients, and returns them as one group for the optimizer."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return [{"params": list(parameters.values()), "lr": lr}]
