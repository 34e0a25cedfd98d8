"""ConDU: experts trained from the initial model, merged by sign into one change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import above, one_of
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.base import Context, ParameterGroup, Space
from vlm_prune.continual.methods.full import FullFineTune
from vlm_prune.vlm.common.errors import InputError

Inference = Literal["merged", "masks", "prototypes"]


def unify(changes: Tensor) -> Tensor:
    """Returns for each weight the largest change where the sum is positive, else the least.

    Args:
        changes: of n tasks, (n, ...).
    """
    return changes.amax(0).where(changes.sum(0) > 0, changes.amin(0))


def pack_bits(mask: Tensor) -> Tensor:
    """Returns a mask of any shape as bytes of eight bits, (n,)."""
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """Returns the mask of this shape that `pack_bits` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts & 1).flatten()
    return bits[: shape.numel()].view(shape).bool()


@dataclass
class ConDU(FullFineTune):
    """Train every task from the initial model; merge its change with the earlier tasks' by sign.

    https://arxiv.org/abs/2503.10705

    An earlier task's change, its expert, is re-created from the merged one: its mask keeps the weights
    whose merged change has its sign, and its scale restores the mean magnitude.

    At inference the merged model may answer, which adds nothing. Or experts do: of a test image whose
    task is told and learned that task's expert; of any other the `experts` whose tasks have the class
    prototypes nearest to it by cosine in the initial model, their scores weighted by that cosine. A
    prototype is the feature of a class's prompt plus the mean feature of its training images.

    Args:
        encoder: as of `full`.
        inference: `merged`; `masks`, where the task of each test image is told, and the merged model
            answers about tasks that are not learned; or `prototypes`.
        experts: that answer together, with `prototypes`.

    Raises:
        InputError: for a value out of range, or `masks` on a stream that does not tell tasks.
    """

    name: ClassVar[str] = "condu"
    inference: Inference = "merged"
    experts: int = 2
    _initial: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _merged: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _masks: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False)
    _scales: list[float] = field(default_factory=list, init=False, repr=False)
    _prototypes: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _banks: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("inference", self.inference, get_args(Inference))
        above("experts", self.experts, 1)

    @torch.no_grad()
    def begin_task(self, context: Context) -> list[ParameterGroup]:
        if self.inference == "masks" and context.recipe.joint:
            raise InputError(
                "inference=masks needs to be told the task of a test image; give the recipe "
                "joint=false, or inference=prototypes"
            )
        groups, weights = super().begin_task(context), self.weights()
        if not self._initial:
            self._initial = self.copies()
        device = context.clip.device
        self._initial = {name: start.to(device) for name, start in self._initial.items()}
        self._merged = {name: weights[name] - start for name, start in self._initial.items()}
        for name, start in self._initial.items():
            weights[name].copy_(start)
        if self.inference == "prototypes":
            self._prototypes[context.number :] = [self._prototypes_of(context)]
        return groups

    def _prototypes_of(self, context: Context) -> Tensor:
        """Returns the class prototypes of a task in the model as it is, (C, d)."""
        texts = context.encode(context.ids)
        sums, counts = torch.zeros_like(texts), texts.new_zeros(len(texts))
        for pixels, labels in context.train():
            sums.index_add_(0, labels, context.clip.encode_image(pixels))
            counts += torch.bincount(labels, minlength=len(texts))
        return texts + sums / counts.clamp(min=1)[:, None]

    @torch.no_grad()
    def end_task(self) -> Delta | None:
        masks: list[dict[str, Tensor]] = [{} for _ in range(len(self._scales) + 1)]
        sizes, kept = ([0.0] * len(masks) for _ in range(2))
        for name, weight in self.weights().items():
            start, merged = self._initial[name], self._merged[name]
            changes = [self._change(task, name, merged) for task in range(len(self._scales))]
            changes.append(weight - start)
            unified = unify(torch.stack(changes))
            for number, change in enumerate(changes):
                mask = change * unified > 0
                masks[number][name] = pack_bits(mask)
                sizes[number] += float(change.abs().sum().double())
                kept[number] += float(unified[mask].abs().sum().double())
            weight.copy_(start + unified)
        self._masks, self._merged, self._banks = masks, {}, {}
        self._scales = [size / k if k else 0.0 for size, k in zip(sizes, kept, strict=True)]
        return super().end_task()

    def _change(self, task: int, name: str, merged: Tensor) -> Tensor:
        """Returns the re-created change of a weight by a task.

        Args:
            task: one that is learned.
            name: of the weight.
            merged: its merged change.
        """
        packed = self._masks[task][name].to(merged.device)
        return self._scales[task] * merged * unpack_bits(packed, merged.shape)

    @torch.no_grad()
    def answer(
        self, clip: Clip, pixels: Tensor, bank: Tensor, space: Space, encode: Callable[[], Tensor]
    ) -> Tensor:
        learned = len(self._scales)
        told = int(space.task[0]) if space.told else learned
        if learned == 0 or self.inference == "merged":
            return super().answer(clip, pixels, bank, space, encode)
        if told < learned:
            shares = pixels.new_zeros(len(pixels), learned)
            shares[:, told] = 1
        elif self.inference == "masks":
            return super().answer(clip, pixels, bank, space, encode)
        else:
            with self._weights_of(clip, None):
                shares = self._shares(clip.encode_image(pixels))
        total = bank.new_zeros(len(pixels), len(bank))
        for task in shares.any(0).nonzero().flatten().tolist():
            with self._weights_of(clip, task):
                key = (task, *space.task.unique().tolist())
                if key not in self._banks:
                    self._banks[key] = encode() if self.encoder != "vision" else bank
                chosen = shares[:, task] != 0
                scores = clip.scale * clip.encode_image(pixels[chosen]) @ self._banks[key].T
                total[chosen] += shares[chosen, task, None] * scores
        return total

    def _shares(self, features: Tensor) -> Tensor:
        """Returns what each learned task's expert weighs for each image, (M, tasks), 0 where it is
        not among the `experts` nearest ones.

        Args:
            features: unit features of the images in the initial model, (M, d).
        """
        nearest = torch.stack(
            [(features @ F.normalize(p.to(features), dim=1).T).amax(1) for p in self._prototypes], 1
        )
        chosen = nearest.topk(min(self.experts, nearest.shape[1]), 1).indices
        return torch.zeros_like(nearest).scatter(1, chosen, nearest.gather(1, chosen))

    @contextmanager
    def _weights_of(self, clip: Clip, task: int | None) -> Iterator[None]:
        """Gives the model the weights of a task's expert within the block; None gives the initial ones."""
        weights = {name: clip.parameters()[name] for name in self._initial}
        merged = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                start = self._initial[name].to(weight.device)
                change = 0 if task is None else self._change(task, name, merged[name] - start)
                weight.copy_(start + change)
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(merged[name])

    def added_parameters(self) -> int:
        """Returns the number of the initial weights and the prototypes; masks are bits."""
        if self.inference == "merged":
            return 0
        return sum(t.numel() for t in (*self._initial.values(), *self._prototypes))

    def added_bytes(self) -> int:
        """Returns the bytes of initial weights, masks, scales and prototypes."""
        if self.inference == "merged":
            return 0
        masks = [mask for one in self._masks for mask in one.values()]
        tensors = (*self._initial.values(), *self._prototypes, *masks)
        return sum(t.numel() * t.itemsize for t in tensors) + 8 * len(self._scales)

    def state(self) -> dict[str, Tensor]:
        masks = {
            f"mask-{number}|{name}": mask
            for number, one in enumerate(self._masks)
            for name, mask in one.items()
        }
        initial = {f"initial|{name}": start for name, start in self._initial.items()}
        prototypes = {f"prototypes|{n}": tensor for n, tensor in enumerate(self._prototypes)}
        scales = torch.tensor(self._scales, dtype=torch.float64)
        return masks | initial | prototypes | {"scales": scales}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._scales, self._banks = state["scales"].tolist(), {}
        self._masks = [{} for _ in self._scales]
        prototypes = {}
        for key, tensor in state.items():
            kind, _, name = key.partition("|")
            if kind == "initial":
                self._initial[name] = tensor
            elif kind == "prototypes":
                prototypes[int(name)] = tensor
            elif name:
                self._masks[int(kind.removeprefix("mask-"))][name] = tensor
        self._prototypes = [prototypes[number] for number in sorted(prototypes)]
