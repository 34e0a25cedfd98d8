"""Every method on two tasks: it runs, leaves a plain model, and does what it says."""

import copy
from dataclasses import fields

import numpy as np
import pytest
import torch

from vlm_prune.continual.config import Placement, Recipe
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods import METHODS, Context, Space, make_method
from vlm_prune.continual.methods.adalora import AdaLoRA
from vlm_prune.continual.methods.codyra_plus import kept_components
from vlm_prune.continual.methods.olora import overlap
from vlm_prune.continual.methods.rail import ridge
from vlm_prune.continual.train import ContinualRun, train_tasks
from vlm_prune.vlm.common.errors import InputError

RECIPE = Recipe(steps=8, batch=5, lr=1e-2, betas=(0.9, 0.999))
OPTIONS = {
    "codyra": {"rank": 4, "total": 0.65},
    "codyra-plus": {"rank": 4, "budget": 2.5, "rounds": 2},
    "random-rank": {"rank": 4},
    "lora": {"rank": 2},
    "o-lora": {"rank": 2},
    "dora": {"rank": 2},
    "randlora": {"rank": 8, "alpha": 8},
    "adalora": {"rank": 4, "target_rank": 2, "interval": 2},
    "keeplora": {"rank": 2, "placement": Placement(), "feature_energy": 0.5},
    "moram": {"rank": 2, "top_k": 3},
    "rail": {"width": 64},
    "lda-text": {"references": 32},
    "zscl": {"captions": ["a disc", "a bar", "a ring"], "average_every": 3, "reference_batch": 2},
}
FROZEN = {"zero-shot", "rail"}
BESIDE = {"moram"}  # what they learn stays beside the model


def build(name, references, **options):
    images = {"images": references} if name == "zscl" else {}
    return make_method(name, **OPTIONS.get(name, {}) | images | options)


@pytest.fixture
def learn(clip, tasks, tmp_path, references):
    """Train a method on both tasks in a folder; returns the results."""

    def run(name, folder="run", recipe=RECIPE, model=clip, **options):
        method = build(name, references, **options)
        return train_tasks(ContinualRun(tmp_path / folder, method, recipe, cpu=True), model, tasks)

    return run


@pytest.fixture
def begin(clip, tasks, references):
    """A method at the start of its first task."""

    def run(name, recipe=RECIPE, model=clip, number=0, **options):
        method = build(name, references, **options)
        ids = model.tokenize(["a photo of a red.", "a photo of a green."])
        return method, method.begin_task(Context(model, recipe, number, ids, ids[:0]))

    return run


@pytest.mark.parametrize("name", METHODS)
def test_two_tasks(name, learn, clip, tmp_path):
    before = copy.deepcopy(clip.model.state_dict())
    results = learn(name)
    after = clip.model.state_dict()
    assert list(after) == list(before)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert bool(changed) == (name not in FROZEN | BESIDE)
    assert "logit_scale" not in changed
    assert results.matrix.shape == (2, 2) and results.zero_shot.shape == (2,)
    assert ((results.matrix >= 0) & (results.matrix <= 1)).all()
    assert (results.trainable[0] > 0) == (name not in FROZEN)
    if name == "zero-shot":
        assert (results.matrix == results.zero_shot).all()
    deltas = sorted((tmp_path / "run" / "deltas").glob("*"))
    assert len(deltas) == (2 if results.norms[0] else 0)
    for path in reversed(deltas):
        Delta.load(path).apply(clip.model, -1)
    if deltas:
        for n, tensor in clip.model.state_dict().items():
            torch.testing.assert_close(tensor, before[n], atol=1e-5, rtol=0)


def test_training_learns_the_task(learn, references):
    results = learn("lora", recipe=Recipe(steps=25, batch=9, lr=5e-3, joint=False))
    assert results.matrix[0, 0] == 1 > results.zero_shot[0]


def test_codyra_keeps_what_starts_large_and_reports_it(learn, tmp_path):
    learn("codyra")
    delta = Delta.load(tmp_path / "run" / "deltas" / "task-0.safetensors")
    for factors in delta.factors.values():
        assert factors.rank < 4 or (factors.start.abs() > 0.5).all()
        assert (factors.gate != 0).all()
        assert factors.A.shape[0] == factors.B.shape[1] == len(factors.kept) == factors.rank


def flat(method):
    return torch.cat([gate.detach() for gate in method.gates()])


def test_gate_options(begin, make_clip):
    kinds = {
        kind: flat(begin("codyra", model=make_clip(), gate_init=kind, gate_value=0.3)[0])
        for kind in ("randn", "ones", "const", "|randn|")
    }
    assert (kinds["ones"] == 1).all() and (kinds["const"] == torch.tensor(0.3)).all()
    assert torch.equal(kinds["randn"].abs(), kinds["|randn|"])
    assert (kinds["randn"] < 0).any()
    _, groups = begin("codyra", model=make_clip(), gate_lr=0.5)
    assert [group["lr"] for group in groups] == [RECIPE.lr, 0.5]


def test_frozen_gates_stay_at_zero(begin):
    method, _ = begin("codyra", gate_init="const", gate_value=0.01, freeze_pruned=True, kappa=0.05)
    method.after_step(6)
    assert not flat(method).any()
    for gate in method.gates():
        gate.data.fill_(9.0)
    method.after_step(7)
    assert not flat(method).any()


def test_normalized_importance_shrinks_the_larger_component_less(begin):
    method, _ = begin("codyra", gate_init="ones", importance="normalized", kappa=0.1, dense=0.0)
    for layer in method.layers.values():
        layer.A.data.fill_(1)
        layer.B.data.fill_(1)
        layer.B.data[:, 0] *= 3
    kappa = method.threshold(7)
    method.after_step(7)
    gates = next(iter(method.layers.values())).gate
    # the sizes are 3, 1, 1, 1 with the mean 1.5
    want = 1 - kappa * torch.tensor([0.5, 1.5, 1.5, 1.5])
    torch.testing.assert_close(gates.detach(), want)


def test_codyra_plus_meets_its_budget_globally(begin):
    method, _ = begin("codyra-plus", budget=1.5)
    kept = [method.kept_at(step) for step in range(8)]
    sites = len(method.layers)
    assert kept[0] == 4 * sites and kept[-1] == round(1.5 * sites)
    assert kept == sorted(kept, reverse=True)
    for number, layer in enumerate(method.layers.values()):
        layer.B.data.fill_(1.0 + number)
    for step in range(8):
        method.after_step(step)
    left = [int(layer.gate.count_nonzero()) for layer in method.layers.values()]
    assert sum(left) == kept[-1]
    assert left[-1] == 4 and left[0] == 0


def test_taylor_importance_is_the_change_of_the_loss(begin):
    method, _ = begin("codyra-plus", importance="taylor", decay=0.0)
    gates = method.gates()
    loss = sum((n + 1) * gate.sum() for n, gate in enumerate(gates))
    loss.backward()
    method.after_step(0)
    want = torch.arange(1.0, len(gates) + 1).repeat_interleave(4)
    torch.testing.assert_close(method._taylor, want)


def test_ties_go_to_the_lowest_index():
    mask = kept_components(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2)
    assert mask.tolist() == [True, True, False, False]


def test_controls_match_ranks_and_norm_of_another_run(learn, tmp_path, make_clip):
    learn("codyra")
    folder = tmp_path / "run"
    learn("random-rank", "random", model=make_clip(), like=folder)
    learn("lora", "matched", model=make_clip(), match=folder)
    for number in range(2):
        ours, random, matched = (
            Delta.load(tmp_path / name / "deltas" / f"task-{number}.safetensors")
            for name in ("run", "random", "matched")
        )
        for name, factors in ours.factors.items():
            assert random.factors[name].rank == factors.rank
        assert any((random.factors[n].kept != f.kept).any() for n, f in ours.factors.items())
        assert matched.norm() == pytest.approx(ours.norm(), rel=1e-4)


def test_olora_penalizes_shared_directions(learn, begin):
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert overlap(a, torch.tensor([[0.0, 3.0]])) == 36
    method, _ = begin("o-lora")
    assert not method._earlier
    method.end_task()
    assert all(a.shape[0] == 2 for a in method._earlier.values())


def test_silent_no_ops_of_peft_are_errors(begin):
    method, _ = begin("dora")
    with pytest.raises(InputError, match="changed no weight"):
        method.end_task()


ADAPTERS = [
    name for name, kind in METHODS.items() if "placement" in {field.name for field in fields(kind)}
]


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_gets_a_gradient_in_every_library(name, begin, any_clip, batch):
    method, _ = begin(name, model=any_clip)
    method.loss(batch[0], torch.tensor([0, 1, 0]), 0).backward()
    method.check_gradients()
    adapters = method.adapters()
    sites = {n.rpartition(".")[0].partition(".lora_")[0] for n in adapters}
    assert len(sites) >= 6 * 2 * 2  # six maps in each of two blocks of two towers
    trained = {id(p) for p in any_clip.model.parameters() if p.requires_grad}
    assert {id(p) for p in adapters.values()} == trained


@pytest.mark.parametrize("name", ["lora", "codyra", "dora"])
def test_an_adapter_without_a_gradient_is_an_error(name, learn, monkeypatch):
    """PyTorch's fused attention reads the weight of `out_proj` and never calls it."""
    for module in ("model", "methods.peft_adapter"):
        monkeypatch.setattr(f"vlm_prune.continual.{module}.split", lambda model: None)
        monkeypatch.setattr(f"vlm_prune.continual.{module}.fuse", lambda model: None)
    with pytest.raises(InputError, match=r"get no gradient, .*out_proj") as error:
        learn(name, placement=Placement(modules=("o", "in")))
    assert "\n" not in str(error.value)


def test_adalora_says_when_a_task_is_too_short(begin):
    with pytest.raises(InputError, match="steps 1 is too few for adalora"):
        begin("adalora", recipe=Recipe(steps=1))


def test_adalora_without_allocation_is_an_error(learn, monkeypatch):
    monkeypatch.setattr(AdaLoRA, "after_step", lambda self, step: None)
    with pytest.raises(InputError, match="above its budget"):
        learn("adalora")


def test_adalora_trains_its_orthogonality(begin):
    method, _ = begin("adalora")
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    strong = method.loss(pixels, labels, 0)
    method.orthogonality = 0.0
    assert strong > method.loss(pixels, labels, 0)


@pytest.mark.parametrize("name", ["dora", "codyra"])
def test_text_sites_do_not_match_vision(name, begin, clip):
    begin(name, placement=Placement("text", ("q",)))
    opened = [n for n, p in clip.model.named_parameters() if p.requires_grad]
    assert opened and not any(n.startswith("visual") for n in opened)


def test_ridge_is_least_squares_with_a_penalty():
    x, y = np.random.default_rng(0).normal(size=(2, 20, 5))
    want = np.linalg.lstsq(
        np.vstack([x, np.sqrt(0.7) * np.eye(5)]), np.vstack([y, np.zeros((5, 5))]), rcond=None
    )[0]
    x, y = torch.tensor(x), torch.tensor(y)
    got = ridge(x.T @ x, x.T @ y, 0.7)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-10)


def test_rail_leaves_images_of_unseen_classes_alone(learn):
    results = learn("rail")
    assert results.matrix[0, 0] >= results.zero_shot[0]
    method = make_method("rail", width=16)
    logits = torch.tensor([[5.0, 1.0, 9.0], [9.0, 1.0, 5.0]])
    space = Space(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    method.load_state({
        "gram": torch.eye(16, dtype=torch.float64),
        "seed": torch.tensor(3),
        "cross-0": torch.randn(16, 2, dtype=torch.float64),
    })  # fmt: skip
    scores = method.scores(torch.randn(2, 8), logits, space)
    assert torch.equal(scores[0], logits[0])
    assert scores[1, 2] == -torch.inf and (scores[1, :2] != logits[1, :2]).all()


def test_wise_ft_interpolates(begin, clip):
    weight = clip.model.visual.conv1.weight
    before = weight.detach().clone()
    method, _ = begin("wise-ft", alpha=0.25)
    weight.data += 1.0
    method.end_task()
    torch.testing.assert_close(weight.data, before + 0.25)


def test_zscl_averages_weights(begin, clip):
    weight = clip.model.visual.conv1.weight
    before = weight.detach().clone()
    method, _ = begin("zscl", average_every=1)
    for step in range(2):
        weight.data += 3.0
        method.after_step(step)
    method.end_task()
    torch.testing.assert_close(weight.data, before + 3.0)  # the mean of 0, 3 and 6


def test_an_average_without_a_trained_weight_is_refused(begin):
    """It would put back the weights from before the task."""
    with pytest.raises(InputError, match="average_every=9 is above the 8 steps of a task; give"):
        begin("zscl", average_every=9)
    begin("zscl", average_every=8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("codyro", {}, "did you mean 'codyra'"),
        ("codyra", {"rnk": 3}, "did you mean 'rank'"),
        ("codyra", {"dense": 1.5}, "dense 1.5 is out of range"),
        ("codyra", {"rank": 8.5}, "rank of codyra is 8.5; give a value such as 16"),
        ("codyra", {"freeze_pruned": 1}, "give a value such as False"),
        ("codyra", {"placement": "vision"}, "give a value such as Placement"),
        ("codyra", {"operator": "codd"}, "did you mean 'coded'"),
        ("adalora", {"target_rank": 16}, "target_rank 16 is out of range"),
        ("zscl", {}, "zscl needs reference images"),
        ("zscl", {"images": "no/such/folder"}, "no folder"),
        ("rail", {"strength": 0.0}, "give above 0"),
    ],
)
def test_wrong_options_are_one_line(name, options, message):
    with pytest.raises(InputError, match=message) as error:
        make_method(name, **options)
    assert "\n" not in str(error.value)


def test_a_missing_reference_run_is_named(learn, tmp_path):
    with pytest.raises(InputError, match="has no deltas of task 0"):
        learn("lora", match=tmp_path / "nothing")


def test_names_of_before_are_taken_with_a_warning():
    from vlm_prune.continual import results, streams
    from vlm_prune.learners import tokens

    with pytest.warns(DeprecationWarning, match="every is called interval now"):
        method = make_method("adalora", rank=4, target_rank=2, every=3)
    assert method.interval == 3 and "every" not in method.options()
    with pytest.warns(DeprecationWarning, match="normalised is called normalized now"):
        assert make_method("codyra", importance="normalised").importance == "normalized"
    for module, old, new in (
        (streams, "Task", "StreamTask"), (streams.base, "Task", "StreamTask"),
        (streams.base, "Labelled", "Labeled"), (streams.base, "LabelledImages", "LabeledImages"),
        (results, "Results", "StreamResults"), (tokens, "Tokens", "PromptTokens"),
    ):  # fmt: skip
        with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
            assert getattr(module, old) is getattr(module, new)
        with pytest.raises(AttributeError, match="has no attribute 'Missing'"):
            module.Missing  # noqa: B018
