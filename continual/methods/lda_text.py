"""LDA-text, our own: a discriminant analysis of image features, written into the text tower."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_prune.continual.attention import sites
from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import above, within
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.base import Context, Method, ParameterGroup
from vlm_prune.vlm.common.errors import InputError

RIDGE = 1e-3  # in mean squared lengths of the map's inputs
PIECES = 12  # of a random text, at most
BATCH = 256  # prompts encoded at a time


def discriminants(means: Tensor, scatter: Tensor, shrinkage: float) -> Tensor:
    """Returns the unit directions (C, d) that tell each class from the mean of all.

    Args:
        means: of the classes' features, (C, d).
        scatter: of features around their class's mean, (d, d), up to a factor.
        shrinkage: share of the identity, scaled to the scatter's mean eigenvalue, in the covariance.
    """
    mean = means.mean(0)
    eye = torch.eye(len(mean), dtype=means.dtype, device=means.device)
    covariance = (1 - shrinkage) * scatter + shrinkage * scatter.trace() / len(mean) * eye
    ways: Tensor = torch.linalg.solve(covariance, (means - mean).T).T
    # what all images share tells no class from another
    shared = F.normalize(mean, dim=0)
    return F.normalize(ways - ways @ shared[:, None] * shared, dim=1)


def vocabulary(clip: Clip) -> list[str]:
    """Returns the pieces of a CLIP's tokenizer that are letters; the alphabet if it tells none."""
    tokenizer = getattr(clip.processor or clip.tokenize, "tokenizer", clip.tokenize)
    # a Hugging Face tokenizer's, or those of open_clip's own
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    pieces: Iterable[str] = known or getattr(tokenizer, "encoder", {})
    # without marks of the beginning or end of a word
    plain = {re.sub("</w>|[▁Ġ]", "", piece) for piece in pieces}
    return sorted(piece for piece in plain if piece.isalpha()) or list(ascii_lowercase)


def random_texts(pieces: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """Returns texts of one to `PIECES` random pieces each.

    Args:
        pieces: what a text is made of.
        count: of the texts.
        generator: draws them.
    """
    lengths = torch.randint(1, PIECES + 1, (count,), generator=generator).tolist()
    drawn = torch.randint(len(pieces), (count, PIECES), generator=generator).tolist()
    return [
        " ".join(pieces[k] for k in row[:length])
        for row, length in zip(drawn, lengths, strict=True)
    ]


@dataclass
class LDAText(Method):
    """Closed-form classifiers as class prompts' features, by one weight of the text tower.

    The image tower stays as it is. Of each class the mean image feature is kept, and over all
    classes the scatter around it; their linear discriminant analysis gives every class learned so
    far a direction that tells it from the others. The last map of the text tower's last MLP gets the
    smallest change that turns the class prompts' features there and leaves random texts' where
    they are. It is solved anew from the first weights after each task, so that the order of tasks
    does not matter and nothing is added at inference.

    A class's feature lies along its direction but for what it has in common with all images: that
    part is the same for all classes, the mean cosine of their prompts before training.

    `shrinkage`, `protect` and `length` were chosen on validation images of the stream `packaged`:
    the highest Average among those whose Transfer is not below zero-shot's.

    Statistics are of training images in order, not augmented; of the recipe only the seed matters.
    Prompts are those of the first template.

    Args:
        shrinkage: of the covariance toward the identity, 0 to 1.
        protect: weight of random texts, in learned prompts.
        length: weight of the squared length of what is added for a prompt, in those of the map's
            output. Behind a layer norm a long one does no better for it and moves other texts more.
        references: number of random texts.
        iterations: of L-BFGS, which finds what the map must give for a prompt.

    Raises:
        InputError: for an option out of range.
    """

    name: ClassVar[str] = "lda-text"
    shrinkage: float = 0.6
    protect: float = 15.0
    length: float = 1e-5
    references: int = 4096
    iterations: int = 50
    _means: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _scatter: Tensor | None = field(default=None, init=False, repr=False)
    _first: Tensor | None = field(default=None, init=False, repr=False)
    _others: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        within("shrinkage", self.shrinkage)
        above("protect", self.protect, 0)
        above("length", self.length, 0)
        above("references", self.references, 1)
        above("iterations", self.iterations, 1)

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        self.start(context)
        context.clip.model.requires_grad_(False)
        weight = self.map.weight.requires_grad_(True)
        if self._first is None:
            self._first = weight.detach().clone()
            self._others = self._reference_moment()
        with torch.no_grad():
            self._learn_images()
        return []

    @property
    def map(self) -> nn.Linear:
        """Returns the last linear map of the text tower's last MLP.

        Raises:
            InputError: if there is none.
        """
        model = self.context.clip.model
        found = [s for s in sites(model).values() if s.tower == "text" and s.module == "out"]
        if not found:
            raise InputError(f"{self.name} needs a text tower with MLPs; this one has none")
        module: nn.Linear = model.get_submodule(max(found, key=lambda site: site.layer).name)
        return module

    def _reference_moment(self) -> Tensor:
        """Returns the mean of x xᵀ over the map's inputs x for random texts, (d_in, d_in), float64.

        Nothing before the map changes, so that it holds for all tasks.
        """
        clip = self.context.clip
        texts = random_texts(vocabulary(clip), self.references, self.context.generator(5))
        ids = clip.tokenize(texts).to(clip.device)
        _, inputs = self._pooled(ids)
        return inputs.T @ inputs / len(inputs)

    def _learn_images(self) -> None:
        parts = [(self.context.clip.encode_image(x).double(), y) for x, y in self.context.train()]
        features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        classes = len(self.context.ids)
        counts = torch.bincount(labels, minlength=classes).clamp(min=1)
        sums = features.new_zeros(classes, features.shape[1]).index_add(0, labels, features)
        means = sums / counts[:, None]
        around = features - means[labels]
        scatter = around.T @ around
        self._means.append(means)
        self._scatter = scatter if self._scatter is None else self._scatter + scatter

    def end_task(self) -> Delta | None:
        weight = self.map.weight.requires_grad_(False)
        assert self._first is not None and self._scatter is not None and self._others is not None
        weight.copy_(self._first)
        ids = torch.cat([self.context.earlier, self.context.ids]).to(weight.device)
        means = torch.cat(self._means)
        shared = F.normalize(means.mean(0), dim=0)
        common = (self.context.encode(ids).double() @ shared).mean()
        ways = discriminants(means, self._scatter, self.shrinkage)
        targets = common * shared + (1 - common**2).sqrt() * ways
        places, inputs = self._pooled(ids)
        outputs = self._outputs(ids, places, targets.float()).double()
        # min over C of |inputs C' - outputs|² + protect mean |others C'|² + ridge |C|²
        eye = torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
        ridge = RIDGE * inputs.square().sum(1).mean()
        gram = inputs.T @ inputs + self.protect * self._others + ridge * eye
        change = torch.linalg.solve(gram, inputs.T @ outputs).T
        weight.copy_(self._first.double() + change)
        return None

    @contextmanager
    def _hooked(self, see: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Lets a function of the map's input and output replace its output."""

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return see(inputs[0], output)

        handle = self.map.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _pooled(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which position of each prompt is pooled (n,), and the map's input there, float64.

        It is the one whose output the feature depends on, whatever the tower's rule.
        """
        found = [self._pooled_of(part) for part in ids.split(BATCH)]
        places, inputs = zip(*found, strict=True)
        return torch.cat(places), torch.cat(inputs)

    def _pooled_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def open_output(x: Tensor, y: Tensor) -> Tensor:
            seen.extend((x.detach(), y.detach().requires_grad_(True)))
            return seen[1]

        with torch.enable_grad(), self._hooked(open_output):
            features = self.context.clip.encode_text(ids)
            # any direction in which features are not stationary will do
            mix = torch.randn(features.shape, generator=self.context.generator(6))
            (gradient,) = torch.autograd.grad((features * mix.to(features)).sum(), seen[1])
        places = gradient.norm(dim=-1).argmax(1)
        return places, seen[0][torch.arange(len(ids)), places].double()

    def _outputs(self, ids: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """Returns what must be added to the map's output for features along targets, (n, d_out).

        Args:
            ids: of the prompts, (n, length).
            places: positions that are pooled, (n,).
            targets: unit features, (n, d).
        """
        parts = zip(ids.split(BATCH), places.split(BATCH), targets.split(BATCH), strict=True)
        return torch.cat([self._outputs_of(*part) for part in parts])

    def _outputs_of(self, ids: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        added = torch.zeros(len(ids), self.map.out_features, device=ids.device, requires_grad=True)
        rows = torch.arange(len(ids), device=ids.device)
        size = self.map.weight.new_ones(())
        optimizer = torch.optim.LBFGS(
            [added], max_iter=self.iterations, line_search_fn="strong_wolfe"
        )

        def add(_: Tensor, y: Tensor) -> Tensor:
            nonlocal size
            size = y[rows, places].detach().norm(dim=1, keepdim=True)
            return y.index_put((rows, places), added.to(y.dtype), accumulate=True)

        def distance() -> Any:
            features = self.context.clip.encode_text(ids)
            penalty = self.length * (added / size).square().sum()
            loss = (features - targets).square().sum() + penalty
            (added.grad,) = torch.autograd.grad(loss, added)
            return loss

        with torch.enable_grad(), self._hooked(add):
            optimizer.step(distance)
        return added.detach()

    def state(self) -> dict[str, Tensor]:
        if self._first is None or self._scatter is None or self._others is None:
            return {}
        fixed = {"first": self._first, "scatter": self._scatter, "others": self._others}
        return fixed | {f"means-{n}": means for n, means in enumerate(self._means)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self._first, self._scatter = state["first"], state["scatter"]
            self._others = state["others"]
        self._means = [state[f"means-{n}"] for n in range(len(state) - 3)]
