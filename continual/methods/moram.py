"""MoRAM: a growing memory of rank-one atoms, of which each token's own responses choose some."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import above
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.layer import GatedLoRA
from vlm_prune.continual.methods.base import Space
from vlm_prune.continual.methods.gated import LowRank
from vlm_prune.continual.model import insert, remove

Atoms = dict[int, tuple[Tensor, Tensor]]


def mixture(responses: Tensor, top_k: int, temperature: float, threshold: float | None) -> Tensor:
    """Returns the weights of the atoms, (..., r), which are 0 for all but the `top_k` best scores.

    Scores are responses over their norm. The weights are a softmax over the best ones.

    Args:
        responses: A x of each token to each atom's key, (..., r).
        top_k: atoms that answer.
        temperature: of the softmax.
        threshold: atoms with a lower score are dropped after it; None for no one.
    """
    scores = F.normalize(responses, dim=-1)
    best, atoms = scores.topk(min(top_k, scores.shape[-1]), -1)
    weights = (best / temperature).softmax(-1)
    if threshold is not None:
        weights = weights * (best >= threshold)
    return torch.zeros_like(scores).scatter(-1, atoms, weights)


class MemoryLoRA(GatedLoRA):
    """y = base(x) + sum_i w_i(x) B_i (A_i x) over the atoms of earlier tasks and of this one.

    Args:
        base: the map that is adapted; its parameters are frozen.
        rank: atoms of this task.
        generator: for their A; their B starts at 0.
        earlier: A (n, d_in) and B (d_out, n) of earlier tasks.
        weigh: gives the weights of all atoms from their responses, and whether the model is trained.
    """

    earlier_a: Tensor
    earlier_b: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        generator: torch.Generator,
        earlier: tuple[Tensor, Tensor],
        weigh: Callable[[Tensor, bool], Tensor],
    ) -> None:
        super().__init__(base, rank, None, generator)
        self.weigh = weigh
        for name, atoms in zip(("earlier_a", "earlier_b"), earlier, strict=True):
            self.register_buffer(name, atoms, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = torch.cat([self.earlier_a, self.A]), torch.cat([self.earlier_b, self.B], 1)
        responses = F.linear(x, keys.to(x.dtype))
        weights = self.weigh(responses, self.training)
        output: Tensor = self.base(x) + F.linear(weights * responses, values.to(x.dtype))
        return output


@dataclass
class MoRAM(LowRank):
    """Rank-one atoms beside the weights; each token's responses to their keys choose and weigh some.

    https://arxiv.org/abs/2506.21035

    Each task adds `rank` atoms B_i A_i to those of earlier tasks, which are frozen. Of a token x atom
    i has the score s_i = A_i x / |A x| over all atoms; a softmax of s / `temperature` over the `top_k`
    best weighs B_i (A_i x), and in answers weights with s_i < `threshold` are 0. As weights
    depend on the token nothing can be merged: the model stays as it is, and answering needs all
    atoms. The project's page, which equations are taken from, says 16 atoms per task and
    no value of the other three.

    Args:
        top_k: atoms that answer for a token.
        temperature: of the softmax.
        threshold: least score of an atom that answers.
    """

    name: ClassVar[str] = "moram"
    top_k: int = 16
    temperature: float = 0.1
    threshold: float = 0.0
    _atoms: list[Atoms] = field(default_factory=list, init=False, repr=False)
    _banks: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        above("top_k", self.top_k, 1)
        above("temperature", self.temperature, 0, strict=True)

    def make(self, base: nn.Linear, number: int) -> GatedLoRA:
        return self._layer(base, number, self._atoms, self.context.generator(0, number))

    def _layer(
        self,
        base: nn.Linear,
        number: int,
        earlier: list[Atoms],
        generator: torch.Generator,
    ) -> MemoryLoRA:
        """Makes the layer of a site.

        Args:
            base: the map there.
            number: of the site.
            earlier: A and B of the tasks before, by number of the site.
            generator: for the new ones.
        """
        a, b = (
            base.weight.new_zeros(0, base.in_features),
            base.weight.new_zeros(base.out_features, 0),
        )
        pairs = [atoms[number] for atoms in earlier]
        joined = (
            torch.cat([a.float(), *(pair[0].to(a.device) for pair in pairs)]),
            torch.cat([b.float(), *(pair[1].to(b.device) for pair in pairs)], 1),
        )
        return MemoryLoRA(base, self.rank, generator, joined, self._weigh)

    def _weigh(self, responses: Tensor, training: bool) -> Tensor:
        threshold = None if training else self.threshold
        return mixture(responses, self.top_k, self.temperature, threshold)

    def end_task(self) -> Delta | None:
        """Adds the task's atoms to the memory; the model stays as it was."""
        factors = ((layer.A, layer.B) for layer in self.layers.values())
        learned = {n: (a.detach().clone(), b.detach().clone()) for n, (a, b) in enumerate(factors)}
        self._atoms[self.context.number :] = [learned]
        remove(self.context.clip, self.layers, {})
        self.layers, self.starts, self._banks = {}, {}, []
        return None

    @contextmanager
    def _remembering(self, clip: Clip) -> Iterator[None]:
        """Gives the model its memory while the block is open."""
        *before, last = self._atoms
        generator = torch.Generator()

        def make(base: nn.Linear, number: int) -> GatedLoRA:
            layer = self._layer(base, number, before, generator)
            for parameter, atoms in zip((layer.A, layer.B), last[number], strict=True):
                parameter.data.copy_(atoms)
            return layer.eval()

        layers = insert(clip, self.placement, make)
        clip.model.requires_grad_(False)
        try:
            yield
        finally:
            remove(clip, layers, {})

    @torch.no_grad()
    def answer(
        self, clip: Clip, pixels: Tensor, bank: Tensor, space: Space, encode: Callable[[], Tensor]
    ) -> Tensor:
        if not self._atoms:
            return super().answer(clip, pixels, bank, space, encode)
        with self._remembering(clip):
            # prompts are encoded with the memory too, once for the same classes
            same = (ours for plain, ours in self._banks if torch.equal(plain, bank))
            found = next(same, None)
            if found is None:
                found = encode()
                self._banks.append((bank, found))
            return super().answer(clip, pixels, found, space, encode)

    def added_parameters(self) -> int:
        """Returns the number of the atoms' parameters."""
        return sum(t.numel() for atoms in self._atoms for pair in atoms.values() for t in pair)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{task}|{site}|{kind}": atoms
            for task, sites in enumerate(self._atoms)
            for site, pair in sites.items()
            for kind, atoms in zip("AB", pair, strict=True)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        found: dict[int, Atoms] = {}
        for key, atoms in state.items():
            task, site, kind = key.split("|")
            if kind == "A":
                pair = atoms, state[f"{task}|{site}|B"]
                found.setdefault(int(task), {})[int(site)] = pair
        self._atoms, self._banks = [found[task] for task in sorted(found)], []
