"""MoRAM against a slow loop from its equations: scores, mixture, and a memory beside the model."""

import copy

import pytest
import torch
from torch import nn

from vlm_prune.continual.attention import split
from vlm_prune.continual.config import Placement, Recipe
from vlm_prune.continual.evaluate import class_features
from vlm_prune.continual.methods import Context, Space, make_method
from vlm_prune.continual.train import ContinualRun, train_tasks
from vlm_prune.vlm.common.errors import InputError

RANK, TOP_K, TEMPERATURE, THRESHOLD = 2, 3, 0.3, 0.2
OPTIONS = {"rank": RANK, "top_k": TOP_K, "temperature": TEMPERATURE, "threshold": THRESHOLD}
RECIPE = Recipe(steps=4, batch=5, lr=1e-2, betas=(0.9, 0.99))


def mixed(x, atoms, training):
    """The sum over atoms of w_i B_i (A_i x) for one token x (d_in,), from equations 5 to 8."""
    responses = [float(a @ x) for a, _ in atoms]
    norm = sum(response**2 for response in responses) ** 0.5
    scores = [response / norm for response in responses]
    best = sorted(range(len(atoms)), key=lambda i: -scores[i])[:TOP_K]
    total = sum(torch.tensor(scores[i] / TEMPERATURE).exp() for i in best)
    out = torch.zeros(len(atoms[0][1]), dtype=torch.float64)
    for i in best:
        if training or scores[i] >= THRESHOLD:
            weight = torch.tensor(scores[i] / TEMPERATURE).exp() / total
            out += weight * responses[i] * atoms[i][1].double()
    return out


def pairs(a, b):
    """Atoms (A_i, B_i) of factors A (r, d_in) and B (d_out, r)."""
    return [(a[i].double(), b[:, i].double()) for i in range(len(a))]


class Slow(nn.Module):
    """A map with its mixture, token by token."""

    def __init__(self, base, atoms, training=False):
        super().__init__()
        self.base, self.atoms, self.slow_training = base, atoms, training
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        more = [mixed(row.double(), self.atoms, self.slow_training) for row in rows]
        return self.base(x) + torch.stack(more).float().view(*x.shape[:-1], -1)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_equals_the_papers_loop(clip, training):
    method = make_method("moram", **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 5)
    memory = [
        {0: (torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator))}
        for _ in range(2)
    ]
    layer = method._layer(base, 0, memory, generator).train(training)
    x = torch.randn(2, 7, 6, generator=generator)
    layer.B.copy_(torch.randn(5, 2, generator=generator))
    atoms = [one for task in memory for one in pairs(*task[0])] + pairs(layer.A, layer.B)
    torch.testing.assert_close(layer(x), Slow(base, atoms, training)(x), atol=1e-5, rtol=1e-5)


def test_answers_take_the_memory_of_all_tasks_and_leave_the_model_alone(clip, tasks):
    placement = Placement("all", ("q", "out"))
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    method = make_method("moram", placement=placement, **OPTIONS)
    for number, task in enumerate(tasks):
        ids = clip.tokenize([f"a {name}." for name in task.classes])
        groups = method.begin_task(Context(clip, RECIPE, number, ids, ids[:0]))
        optimizer = torch.optim.AdamW(groups)
        pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        for step in range(3):
            optimizer.zero_grad()
            method.loss(pixels, torch.tensor([0, 1, 2]), step).backward()
            optimizer.step()
        # earlier atoms take no gradient
        assert all(len(layer.earlier_a) == RANK * number for layer in method.layers.values())
        assert {p for g in groups for p in g["params"]} == {
            p for p in clip.model.parameters() if p.requires_grad
        }
        names = list(method.layers)
        assert method.end_task() is None
    after = clip.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    count = sum(t.numel() for site in method._atoms[0].values() for t in site)
    assert method.added_parameters() == 2 * count and method.added_bytes() == 8 * count

    slow = copy.deepcopy(clip)
    split(slow.model)
    for number, site in enumerate(names):
        at, _, name = site.rpartition(".")
        atoms = [one for task in method._atoms for one in pairs(*task[number])]
        setattr(slow.model.get_submodule(at), name, Slow(slow.model.get_submodule(site), atoms))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    space = Space(torch.zeros(3, dtype=torch.long), torch.arange(3))
    with torch.no_grad():
        texts = class_features(slow, tasks[0], False)
        expected = slow.scale * slow.encode_image(pixels) @ texts.T
        bank = class_features(clip, tasks[0], False)
        for encode in (lambda: class_features(clip, tasks[0], False), None):  # and once more
            got = method.answer(clip, pixels, bank, space, encode)
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(expected, clip.scale * clip.encode_image(pixels) @ bank.T, atol=0.1)


def test_a_run_learns_and_counts_its_memory(clip, tasks, tmp_path):
    recipe = Recipe(steps=25, batch=9, lr=3e-2, joint=False)
    run = ContinualRun(tmp_path, make_method("moram", rank=4), recipe, cpu=True)
    results = train_tasks(run, clip, tasks)
    assert results.matrix[0, 0] > results.zero_shot[0]
    assert results.added == [results.trainable[0], 2 * results.trainable[0]]
    assert results.drift == [0, 0]


@pytest.mark.parametrize(
    ("option", "value"), [("top_k", 0), ("temperature", 0.0), ("rank", 0)], ids=str
)
def test_values_out_of_range_are_refused(option, value):
    with pytest.raises(InputError, match=f"{option} {value} is out of range"):
        make_method("moram", **{option: value})
