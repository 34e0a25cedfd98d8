"""What methods hold beside the tokens of a video while they choose."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from vlm_prune.pruning.registry import build


class PeakBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that live at a time, at most; those of `given` do not count."""

    def __init__(self, given):
        super().__init__()
        self.given = {own.untyped_storage().data_ptr() for own in given}
        self.alive, self.peak = WeakTensorKeyDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for own in made if isinstance(made, tuple | list) else [made]:
            if isinstance(own, torch.Tensor):
                storage = own.untyped_storage()
                self.alive[own] = storage.data_ptr(), storage.nbytes()
        held = {at: size for at, size in self.alive.values() if at not in self.given}
        self.peak = max(self.peak, sum(held.values()))
        return made


def test_the_peak_is_that_of_what_lives():
    given = torch.ones(1000)
    with PeakBytes([given]) as held:
        one = given + 1
        view = one[:10]
        del one
        view += 1
        given[:5].clone()
    assert held.peak == 4000 + 20


@pytest.mark.parametrize(
    "name",
    ["evs", "vidcom2", "v-cast", "fastvid", "flashvid", "holitom", "frames", "pool", "random"],
)
def test_selection_holds_less_than_one_and_a_half_times_the_tokens(name, clips):
    """N x N over 2,000 tokens of 64 numbers would be 32 times the tokens."""
    draw = torch.Generator().manual_seed(0)
    frames, size, width = 100, 20, 64
    tokens = torch.randn(1, frames * size, width, generator=draw)
    query = torch.randn(frames, 2, size, 8, generator=draw)
    vision = replace(
        clips, projected=tokens, features=tokens, frames=frames, grids=((4, 5),) * frames,
        seeds=(1,), available=frames * size, query_key=lambda: (query, query),
        pool=lambda values: values.unflatten(0, (1, frames)).flatten(1, 2),
    )  # fmt: skip
    with PeakBytes([tokens, query]) as held:
        build(name, budget=0.1).select(vision)
    assert 0 < held.peak < 1.5 * tokens.nbytes
