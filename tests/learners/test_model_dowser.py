"""Model-Dowser against autograd on small modules, and what it opens in a model."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from vlm_prune.learners import model_dowser
from vlm_prune.learners import train as train_module
from vlm_prune.learners.data import read_llava
from vlm_prune.learners.model_dowser import (
    ModelDowser,
    close,
    importance,
    jacobian_norms,
    linear_maps,
    lowest,
    open_least_important,
    probe,
    written_prompts,
)
from vlm_prune.learners.recipe import PRESETS
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import load


class Small(nn.Module):
    """Two maps and a sum over earlier tokens: (1, tokens, 3) to (1, tokens, 2)."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
        self.requires_grad_(False)

    def forward(self, x):
        return self.after(self.one(x))

    def after(self, z):
        return self.two(torch.tanh(z).cumsum(1))


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Small()
    return model, {"one": model.one, "two": model.two}


def test_all_signs_give_the_norms_of_the_exact_jacobian(small):
    model, _ = small
    x = torch.randn(1, 3, 3)
    z = model.one(x).requires_grad_()
    output = model.after(z)
    signs = [torch.tensor(s).view_as(output) for s in product((-1.0, 1.0), repeat=output.numel())]
    found = jacobian_norms(output, {"one": z}, signs)["one"]
    exact = torch.autograd.functional.jacobian(model.after, z.detach())
    for i in range(4):
        squares = [float(j) ** 2 for j in exact[..., i].flatten()]
        assert float(found[i]) == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


def test_the_importance_equals_a_loop_over_prompts_draws_tokens_and_weights(small):
    model, maps = small
    prompts = list(torch.randn(3, 1, 5, 3))
    found = probe(model, maps, prompts, 4, torch.Generator().manual_seed(1))
    scores = {name: importance(map_.weight, *found[name]) for name, map_ in maps.items()}
    generator = torch.Generator().manual_seed(1)
    want = {name: torch.zeros_like(map_.weight) for name, map_ in maps.items()}
    for x in prompts:
        z = model.one(x)
        given = {"one": x[0], "two": torch.tanh(z).cumsum(1)[0]}
        after = {
            "one": torch.autograd.functional.jacobian(model.after, z)[0, :, :, 0],
            "two": torch.eye(10).view(5, 2, 5, 2),
        }
        signs = torch.randint(0, 2, (4, 1, 5, 2), generator=generator) * 2.0 - 1
        for name, map_ in maps.items():
            for i, j in product(*map(range, map_.weight.shape)):
                square = sum(
                    float((sign[0] * after[name][..., t, i]).sum()) ** 2
                    for sign in signs
                    for t in range(5)
                )
                h = sum(abs(float(given[name][t, j])) for t in range(5)) / 5
                weight = abs(float(map_.weight[i, j]))
                want[name][i, j] += weight * h * (square / 4) ** 0.5 / 3
    for name in maps:
        torch.testing.assert_close(scores[name], want[name])


def test_the_lowest_share_is_chosen():
    scores = torch.tensor([[5.0, 1.0, 3.0], [0.5, 4.0, 2.0]])
    assert lowest(scores, 0.5).tolist() == [1, 3, 5]
    assert lowest(scores, 0.01).tolist() == [3]
    assert len(lowest(scores, 1.0)) == 6


def test_a_share_of_each_map_trains_and_the_rest_keeps_its_bits(build, prompts, processor):
    model = build("qwen2", len(processor.tokenizer), 5)
    options = ModelDowser(0.2, prompts=2, length=4, draws=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = prompts([(1, 4), (1, 4)])
    want = model(**inputs).logits
    open_least_important(model, processor.tokenizer, options, 0)
    torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=0)
    values = {n: p for n, p in model.named_parameters() if n.endswith("values")}
    assert len(values) == len(linear_maps(model)) == 3 * 7
    optimizer = torch.optim.AdamW(values.values(), lr=0.1, weight_decay=0.5)
    model(**inputs).logits.square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == values.keys()
    optimizer.step()
    close(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert not any(type(m).__name__.startswith("Parametrized") for m in model.modules())
    for name, tensor in after.items():
        changed = int((tensor != before[name]).sum())
        inside = ".layers." in name and "language_model" in name and name.endswith("proj.weight")
        assert changed == (round(0.2 * tensor.numel()) if inside else 0), name


def test_the_model_writes_its_prompts_without_special_tokens_or_traces(build, processor):
    model = build("llama", len(processor.tokenizer), 5)
    state = torch.get_rng_state()
    found = written_prompts(model, processor.tokenizer, ModelDowser(prompts=4, length=6), 3)
    assert torch.equal(state, torch.get_rng_state()) and found.shape == (4, 6)
    assert not set(found.flatten().tolist()) & {5, *processor.tokenizer.all_special_ids}
    again = written_prompts(model, processor.tokenizer, ModelDowser(prompts=4, length=6), 3)
    assert torch.equal(found, again) and len({tuple(row) for row in found.tolist()}) == 4
    assert written_prompts(model, processor.tokenizer, ModelDowser(length=1), 3).shape == (16, 1)


def test_a_run_that_goes_on_trains_the_entries_that_it_chose_first(
    checkpoint, conversations, tmp_path, monkeypatch
):
    """Another machine's rounding may rank weights in another order."""
    recipe = replace(PRESETS["paper-2"], projector_lr=0.0, language_lr=1e-2, batch=4)
    run = train_module.WingsRun(
        str(checkpoint), tmp_path / "run", "model-dowser", recipe, save_every=1, bf16=False, cpu=True,
        dowser=ModelDowser(0.1, prompts=1, length=4, draws=1),
    )  # fmt: skip
    examples = read_llava(conversations / "data.json", conversations)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "seed_step", lambda _, step, __: 1 // (2 - step))
        with pytest.raises(ZeroDivisionError):
            train_module.train_wings(run, examples)
    AcceleratorState._reset_state(True)
    stored = load_file(run.output / "checkpoint-1" / "trained.safetensors")
    monkeypatch.setattr(model_dowser, "lowest", lambda scores, share: lowest(-scores, share))
    train_module.train_wings(run, examples)
    before = load(str(checkpoint))[0].state_dict()
    after = load(str(run.output / "model"))[0].state_dict()
    name = "model.language_model.layers.1.mlp.up_proj"
    (index,) = (t for n, t in stored.items() if n.startswith(name) and n.endswith("index"))
    moved = (after[f"{name}.weight"] != before[f"{name}.weight"]).flatten().nonzero().flatten()
    assert len(moved) and set(moved.tolist()) <= set(index.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, r"share 0.0 is out of range; give a number in \(0, 1\]"),
        ({"share": 1.5}, "share 1.5 is out of range"),
        ({"draws": 0}, "draws 0 is out of range; give 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ModelDowser(**options)
