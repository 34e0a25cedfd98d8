"""The loop: losses, order of data, resuming, several processes, and wrong input."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.transforms import Compose, RandomResizedCrop, ToTensor

from vlm_prune.continual import checkpoint, losses
from vlm_prune.continual.clip import load_clip
from vlm_prune.continual.config import Placement, Recipe
from vlm_prune.continual.data import KeptBatches, Pictures, plan
from vlm_prune.continual.evaluate import class_features, evaluate_tasks
from vlm_prune.continual.methods import Context, make_method
from vlm_prune.continual.methods.codyra import CoDyRA
from vlm_prune.continual.metrics import drift
from vlm_prune.continual.results import read_results
from vlm_prune.continual.streams.files import Files
from vlm_prune.continual.train import ContinualRun, train_tasks
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.folder import OutputFolder

RECIPE = Recipe(steps=6, batch=4, lr=1e-2)


def test_text_to_image_is_the_soft_target_form_with_both_denominators():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 2, 0, 3])
    targets = F.one_hot(labels, 4).float().T  # rows are classes, columns images
    rows = F.cross_entropy(logits.T, targets, reduction="none")
    everything = losses.text_to_image(logits, labels, "all", earlier=3)
    torch.testing.assert_close(everything, rows.sum() / 7)
    torch.testing.assert_close(losses.text_to_image(logits, labels, "present"), rows.sum() / 3)
    assert losses.text_to_image(logits, labels, "none") == 0


def test_distillation_is_least_for_the_teachers_logits():
    teacher = torch.randn(3, 6)
    student = teacher.clone().requires_grad_()
    losses.distil(student, teacher, 2.0).backward()
    torch.testing.assert_close(student.grad, torch.zeros(3, 6), atol=1e-6, rtol=0)


def test_the_batchs_own_prompts_are_always_kept():
    kept = losses.chosen_prompts(torch.tensor([7, 3, 7]), 10, 4, torch.Generator().manual_seed(0))
    assert len(kept) == 4 and {3, 7} <= set(kept.tolist())
    assert len(losses.chosen_prompts(torch.arange(6), 10, 4, torch.Generator())) == 6


def test_a_subset_of_prompts_drops_the_others_from_the_softmax(clip):
    ids = clip.tokenize(["a red.", "a green.", "a blue."])
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([2, 0, 2, 0])
    method = make_method("lora", rank=2)
    method.begin_task(Context(clip, replace(RECIPE, prompts=2), 0, ids, ids[:0]))
    loss = method.loss(pixels, labels, 0)
    method.end_task()
    method.begin_task(Context(clip, RECIPE, 0, ids[[0, 2]], ids[:0]))
    renamed = torch.tensor([1, 0, 1, 0])
    torch.testing.assert_close(loss, method.loss(pixels, renamed, 0))


def test_a_frozen_text_tower_is_encoded_once_per_task(clip, monkeypatch):
    ids = clip.tokenize(["a red.", "a green."])
    pixels, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 0])
    calls = []
    encode = clip.encode_text
    monkeypatch.setattr(clip, "encode_text", lambda part: calls.append(1) or encode(part))
    for encoder, expected in (("vision", 1), ("all", 3)):
        method = make_method("lora", rank=2, placement=Placement(encoder))
        method.begin_task(Context(clip, RECIPE, 0, ids, ids[:0]))
        calls.clear()
        for step in range(3):
            method.loss(pixels, labels, step).backward()
        assert len(calls) == expected
        method.end_task()


def test_the_text_to_image_term_needs_a_trained_vision_tower(clip):
    ids = clip.tokenize(["a red.", "a green."])
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 0, 0, 0])
    values = {}
    for encoder in ("text", "all"):
        for term in ("all", "none"):
            method = make_method("lora", rank=2, placement=Placement(encoder))
            method.begin_task(Context(clip, replace(RECIPE, text_term=term), 0, ids, ids[:0]))
            values[encoder, term] = method.loss(pixels, labels, 0).item()
            method.end_task()
    assert values["text", "all"] == values["text", "none"] == values["all", "none"]
    assert values["all", "all"] > values["all", "none"]


def test_batches_cover_every_image_in_each_pass():
    batches = plan(10, 4, 7, (8, 0))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4]
    for at in (0, 3):
        assert sorted(chain(*batches[at : at + 3])) == list(range(10))
    assert batches[:3] != batches[3:6]
    assert batches == plan(10, 4, 7, (8, 0)) != plan(10, 4, 7, (8, 1))


def outcome(folder):
    record = json.loads((folder / "results.json").read_text())
    log = folder / "log.jsonl"
    return record, log.read_text() if log.is_file() else ""


class Killed(Exception):
    pass


RESUMED = {
    "codyra": {"rank": 2, "freeze_pruned": True},
    "codyra-plus": {"rank": 2, "budget": 1, "importance": "taylor"},
    "o-lora": {"rank": 2},
    "adalora": {"rank": 3, "target_rank": 1, "interval": 2},
    "wise-ft": {"anchor": "initial"},
    "condu": {},
    "lwf": {},
    "keeplora": {"rank": 2, "feature_energy": 0.5},
    "moram": {"rank": 2, "top_k": 3},
    "rail": {"width": 32},
    "zscl": {"captions": ["a bar"], "average_every": 2},
}


def test_an_image_is_augmented_by_its_seed_without_seeding_all_devices(tasks, monkeypatch):
    transform = Compose([RandomResizedCrop(16), ToTensor()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = transform(tasks[0].train[0][0])
    state = torch.get_rng_state()
    # it writes a stack trace for each kind of device
    monkeypatch.setattr(torch, "manual_seed", None)
    pictures = Pictures(tasks[0].train, transform)
    assert torch.equal(pictures[0, 5][0], expected)
    assert not torch.equal(pictures[0, 6][0], expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("limit, read", [(2**20, 1), (0, 2)])
def test_test_images_that_fit_are_transformed_once(limit, read, clip, tasks, monkeypatch):
    calls = []
    transform = clip.eval_transform
    monkeypatch.setattr(clip, "eval_transform", lambda image: calls.append(1) or transform(image))
    expected = evaluate_tasks(clip, tasks, RECIPE)
    images, kept = len(calls), KeptBatches(limit)
    for _ in range(2):
        right = evaluate_tasks(clip, tasks, RECIPE, kept=kept)
        assert all(map(torch.equal, right, expected))
    assert len(calls) == (1 + read) * images
    assert kept.left >= 0


# The others keep no other state than one of these.
QUICKLY = {"codyra", "condu", "keeplora", "rail", "zscl"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICKLY else pytest.mark.slow) for n in RESUMED],
)
def test_a_killed_run_ends_in_the_same_matrix(
    name, make_clip, tasks, references, tmp_path, monkeypatch
):
    options = RESUMED[name] | ({"images": references} if name == "zscl" else {})

    def run(folder):
        method = make_method(name, **options)
        train_tasks(
            ContinualRun(tmp_path / folder, method, RECIPE, save_every=2, cpu=True),
            make_clip(),
            tasks,
        )

    run("whole")
    calls = []
    kind = type(make_method(name, **options))
    for where, when in (("loss", (4, 9)), ("end_task", (2,)), ("scores", (3, 4))):
        original = getattr(kind, where)

        def count(self, *arguments, where=where, when=when, original=original):
            calls.append(where)
            if calls.count(where) in when:
                raise Killed
            return original(self, *arguments)

        monkeypatch.setattr(kind, where, count)
    kills = 0
    while not (tmp_path / "cut" / "model").is_dir():
        try:
            run("cut")
        except Killed:
            kills += 1
            if calls[-1] == "loss":
                with (tmp_path / "cut" / "log.jsonl").open("a") as log:
                    log.write('{"task": 1, "st')  # a torn line
    assert kills == (3 if name == "rail" else 5)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    whole, cut = (load_clip(str(tmp_path / n / "model")).model for n in ("whole", "cut"))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, cut.state_dict()[key])
    assert not list((tmp_path / "cut").glob("st*"))


def test_a_kill_before_the_states_are_removed_leaves_none(make_clip, tasks, tmp_path):
    run = ContinualRun(tmp_path / "run", make_method("zero-shot"), RECIPE, cpu=True)
    train_tasks(run, make_clip(), tasks)
    for name in ("state-2", "step-1-2"):
        (run.output / name).mkdir()
    train_tasks(run, make_clip(), tasks)
    assert not list(run.output.glob("st*"))


def test_a_half_written_folder_is_never_read(tmp_path):
    checkpoint.save_state(tmp_path, 1, {"w": torch.ones(2)}, {})
    (tmp_path / "state-2.partial").mkdir()
    model = {"w": torch.zeros(2)}
    done, method = checkpoint.load_state(tmp_path, model)
    assert done == 1 and torch.equal(model["w"], torch.ones(2)) and not method


@pytest.fixture
def killed(make_clip, tasks, tmp_path, monkeypatch):
    """A run with a state after its first task and a step of its second, and how to go on with it."""
    run = ContinualRun(
        tmp_path / "run", make_method("codyra", rank=2), RECIPE, save_every=2, cpu=True
    )
    original, calls = CoDyRA.loss, []

    def loss(self, *arguments):
        calls.append(1)
        if len(calls) == RECIPE.steps + 4:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CoDyRA, "loss", loss)
        with pytest.raises(Killed):
            train_tasks(run, make_clip(), tasks)
    assert (run.output / "state-1").is_dir() and (run.output / "step-1-2").is_dir()
    return run, lambda: train_tasks(run, make_clip(), tasks)


@pytest.mark.parametrize(
    "name",
    [
        "state-1/model.safetensors", "state-1/method.safetensors", "step-1-2/trained.safetensors",
        "step-1-2/optimizer.safetensors", "step-1-2/method.safetensors",
    ],
)  # fmt: skip
def test_damaged_state_is_named_and_a_pickle_is_not_read(name, killed, tmp_path):
    run, go_on = killed
    path = run.output / name
    whole, tensors = path.read_bytes(), load_file(path)
    contents = [b"", whole[: len(whole) // 2], b"[" * 1000, (1 << 50).to_bytes(8, "little")]
    if tensors:
        first = max(tensors, key=lambda name: tensors[name].numel())
        save_file(tensors | {first: tensors[first][:-1].clone()}, path)
        contents.append(path.read_bytes())
    for content in contents[: 4 if "method" in name else 5]:
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            go_on()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(whole)
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    bad = path.with_name("optimizer.bin")
    torch.save({"state": Evil()}, bad)
    with pytest.raises(InputError, match=r"optimizer.bin is a pickle, which is not read"):
        go_on()
    assert not marker.exists()
    bad.unlink()
    assert go_on().matrix.shape == (2, 2)


@pytest.mark.parametrize("content", ["null", "[]", "{", "[" * 100_000, '{"tasks": 3}', "{}"])
def test_a_damaged_record_or_log_is_named(content, killed):
    run, go_on = killed
    record, log = run.output / "results.json", run.output / "log.jsonl"
    for path, damaged in ((record, content), (log, content + "\n")):
        whole = path.read_text()
        path.write_text(damaged)
        with pytest.raises(InputError, match=f"{path}.* is damaged") as caught:
            go_on()
        assert "\n" not in str(caught.value)
        path.write_text(whole)


def test_two_trainings_do_not_share_a_folder(killed):
    run, go_on = killed
    with OutputFolder(run.output), pytest.raises(InputError, match="another run writes to"):
        go_on()


def test_results_that_do_not_fit_are_named(clip, tasks, tmp_path):
    train_tasks(ContinualRun(tmp_path, make_method("zero-shot"), RECIPE, cpu=True), clip, tasks)
    path = tmp_path / "results.json"
    whole = json.loads(path.read_text())
    for name, value, message in (
        ("matrix", whole["matrix"][:1], "has not finished"),
        ("matrix", [[1.0], [1.0]], "has not finished"),
        ("zero_shot", None, "has not finished"),
        ("zero_shot", "1", "is damaged"),
        ("drift", [1], "does not say the same"),
        ("tasks", [], "has not finished"),
        ("tasks", ["a", "b"], "is not of these tasks"),
        ("matrix", [[1e400, 1], [1, 1]], "is damaged"),
    ):
        path.write_text(json.dumps(whole | {name: value}))
        with pytest.raises(InputError, match=message) as caught:
            read_results(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_folder_of_another_run_is_refused(clip, make_clip, tasks, tmp_path):
    train_tasks(
        ContinualRun(tmp_path / "a", make_method("zero-shot"), RECIPE, cpu=True), clip, tasks
    )
    again = train_tasks(
        ContinualRun(tmp_path / "a", make_method("zero-shot"), RECIPE, cpu=True), clip, tasks
    )
    assert again.matrix.shape == (2, 2)
    for number, hits in enumerate(again.hits):
        assert (hits.mean(1) == again.matrix[:, number]).all()
        assert again.zero_shot_hits[number].mean() == again.zero_shot[number]
    same = ContinualRun(tmp_path / "a", make_method("zero-shot"), RECIPE, cpu=True)
    renamed = replace(tasks[0], classes=("red", "green", "azure"))
    for changed, clip_, tasks_, what in (
        (replace(same, method=make_method("full")), make_clip(), tasks, "method, options"),
        (replace(same, recipe=replace(RECIPE, seed=1)), make_clip(), tasks, "seed"),
        (same, make_clip(width=48), tasks, "weights"),
        (same, make_clip(), tasks[::-1], "tasks"),
        (same, make_clip(), [renamed, tasks[1]], "tasks"),
    ):
        with pytest.raises(InputError, match=f"holds a run with another {what};") as error:
            train_tasks(changed, clip_, tasks_)
        assert "\n" not in str(error.value)


def test_every_task_has_its_own_adamw_and_cosine(clip, tasks, tmp_path, monkeypatch):
    seen = []

    def step(self, *arguments, original=torch.optim.AdamW.step, **named):
        (group,) = self.param_groups
        seen.append((id(self), group["lr"], group["betas"], group["weight_decay"]))
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    recipe = Recipe(steps=4, batch=2)
    train_tasks(ContinualRun(tmp_path, make_method("lora", rank=2), recipe, cpu=True), clip, tasks)
    rates = [5e-4 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)]
    assert [rate for _, rate, _, _ in seen] == pytest.approx(rates * 2)
    assert {(betas, decay) for _, _, betas, decay in seen} == {((0.9, 0.9999), 0.0)}
    assert seen[0][0] != seen[4][0]


def test_drift_is_the_distance_after_each_task(clip, make_clip, tasks, tmp_path):
    results = train_tasks(
        ContinualRun(tmp_path, make_method("lora", rank=2), RECIPE, cpu=True), clip, tasks
    )
    before, after = (one.model.state_dict() for one in (make_clip(), clip))
    assert results.drift[1] == pytest.approx(drift(before, after))
    assert results.drift[0] == pytest.approx(results.norms[0], rel=1e-4)


@pytest.mark.parametrize(("name", "times"), [("zero-shot", 1), ("lora", 3)])
def test_class_features_are_kept_while_the_text_tower_is(
    name, times, clip, tasks, tmp_path, monkeypatch
):
    calls, encode = [], clip.encode_texts
    monkeypatch.setattr(clip, "encode_texts", lambda texts: calls.append(1) or encode(texts))
    train_tasks(ContinualRun(tmp_path, make_method(name), RECIPE, cpu=True), clip, tasks)
    assert len(calls) == times * len(tasks)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_in_one_line(workers, clip, tasks, tmp_path):
    bad = tmp_path / "bad.png"
    tasks[0].train[0][0].save(bad)
    bad.write_bytes(bad.read_bytes()[:60])
    task = replace(tasks[0], train=Files([bad], [0]))
    run = ContinualRun(
        tmp_path / "run", make_method("lora", rank=2), RECIPE, workers=workers, cpu=True
    )
    with pytest.raises(InputError, match=str(bad)) as error:
        train_tasks(run, clip, [task])
    assert "\n" not in str(error.value)


class Bytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what forward passes keep."""

    def __init__(self):
        self.kept = 0
        super().__init__(self.count, lambda tensor: tensor)

    def count(self, tensor):
        self.kept += tensor.numel()
        return tensor


@pytest.mark.parametrize("any_clip", ["open_clip", "timm", "hugging face"], indirect=True)
def test_recomputed_activations_take_less_memory_and_give_the_same(any_clip, tasks, tmp_path):
    initial = {n: t.clone() for n, t in any_clip.model.state_dict().items()}
    kept, weights = [], []
    for recompute in (False, True):
        any_clip.model.load_state_dict(initial)
        method = make_method("lora", rank=2)
        recipe = Recipe(steps=2, batch=9, lr=1e-2)
        run = ContinualRun(tmp_path / str(recompute), method, recipe, cpu=True, recompute=recompute)
        with (counted := Bytes()):
            train_tasks(run, any_clip, tasks[:1])
        kept.append(counted.kept)
        weights.append({n: t.clone() for n, t in any_clip.model.state_dict().items()})
    assert kept[1] < 0.7 * kept[0]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor)


@torch.no_grad()
def test_class_incremental_tests_score_the_classes_seen_so_far(clip, tasks):
    """A loop over images, columns and rows of the matrix."""
    three = [replace(tasks[n % 2], name=f"t{n}") for n in range(3)]
    texts = [class_features(clip, task, ensemble=False) for task in three]
    for learned in range(4):
        found = evaluate_tasks(
            clip, three, replace(RECIPE, seen_only=True), None, texts, learned=learned
        )
        for number, task in enumerate(three):
            bank = [(n, k, t) for n, part in enumerate(texts) for k, t in enumerate(part)]
            bank = [entry for entry in bank if entry[0] < learned or entry[0] <= number]
            for (image, label), hit in zip(task.test, found[number], strict=True):
                feature = clip.encode_image(clip.eval_transform(image)[None])[0]
                best = max(bank, key=lambda entry: float(feature @ entry[2]))
                assert bool(hit) == (best[:2] == (number, label))


def test_scoring_within_the_task_is_easier_and_templates_are_averaged(make_clip, tasks, tmp_path):
    kinds = {"joint": {}, "own": {"joint": False}}
    joint, own = (
        train_tasks(
            ContinualRun(
                tmp_path / name, make_method("zero-shot"), replace(RECIPE, **kind), cpu=True
            ),
            make_clip(),
            tasks,
        ).zero_shot
        for name, kind in kinds.items()
    )
    assert (own >= joint).all() and (own > joint).any()
    clip = make_clip()
    one, two = (clip.encode_texts([t.format("red")]) for t in tasks[0].templates)
    both = class_features(clip, tasks[0], ensemble=True)[0]
    torch.testing.assert_close(both, F.normalize(one + two)[0])
    assert not torch.allclose(both, class_features(clip, tasks[0], ensemble=False)[0])


def test_every_make_of_clip_goes_through_the_loop(any_clip, tasks, tmp_path):
    keys = list(any_clip.model.state_dict())
    recipe = Recipe(steps=2, batch=2, lr=1e-3)
    for name in ("codyra", "dora"):
        train_tasks(
            ContinualRun(tmp_path / name, make_method(name, rank=2), recipe, cpu=True),
            any_clip,
            tasks,
        )
        loaded = load_clip(str(tmp_path / name / "model"))
        assert list(loaded.model.state_dict()) == keys


def test_bfloat16_keeps_gates_and_weights_in_float32(clip, tasks, tmp_path, monkeypatch):
    seen = set()

    def watch(self, step, original=CoDyRA.after_step):
        original(self, step)
        seen.update(tensor.dtype for tensor in [*self.gates(), *clip.parameters().values()])

    monkeypatch.setattr(CoDyRA, "after_step", watch)
    recipe = Recipe(steps=3, batch=2)
    results = train_tasks(
        ContinualRun(tmp_path, CoDyRA(rank=2), recipe, bf16=True, cpu=True), clip, tasks
    )
    assert seen == {torch.float32} and results.norms[0] > 0


def test_a_loss_that_is_not_finite_stops_the_run(clip, tasks, tmp_path):
    with pytest.raises(InputError, match="lower the lr"):
        train_tasks(
            ContinualRun(tmp_path, make_method("full"), replace(RECIPE, lr=1e30), cpu=True),
            clip,
            tasks,
        )


def test_a_label_outside_the_classes_is_named(clip, tasks, tmp_path):
    wrong = replace(tasks[0], train=[(tasks[0].train[0][0], 3)])
    with pytest.raises(InputError, match="'colours' has a label outside its classes; give 0 to 2"):
        train_tasks(
            ContinualRun(tmp_path, make_method("lora", rank=2), RECIPE, cpu=True), clip, [wrong]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": []}, "no images in its train split"),
        ({"test": []}, "no images in its test split"),
        ({"name": "shapes"}, "two tasks are named 'shapes'"),
    ],
)
def test_wrong_tasks_are_refused(change, message, clip, tasks, tmp_path):
    with pytest.raises(InputError, match=message):
        run = ContinualRun(tmp_path, make_method("zero-shot"), RECIPE, cpu=True)
        train_tasks(run, clip, [replace(tasks[0], **change), tasks[1]])


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(clip, tasks, tmp_path):
    method = CoDyRA(rank=4, total=0.65)
    recipe = replace(RECIPE, batch=3)
    one = train_tasks(ContinualRun(tmp_path / "one", method, recipe, cpu=True), clip, tasks)
    folder = Path(__file__).parent
    code = f"""
import sys, torch
sys.path.insert(0, {str(folder)!r})
from dataclasses import replace
from conftest import make_open_clip, make_task
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.methods.codyra import CoDyRA
from vlm_prune.continual.train import ContinualRun, train_tasks
import torch.distributed as dist
tasks = [make_task("colours", ("red", "green", "blue"), 0), make_task("shapes", ("disc", "bar", "ring"), 1)]
seen = []
class Watched(CoDyRA):
    def after_step(self, step):
        super().after_step(step)
        gates = torch.cat(self.gates()).detach()
        both = [torch.empty_like(gates) for _ in range(2)]
        dist.all_gather(both, gates)
        assert torch.equal(*both), step
        seen.append(step)
run = ContinualRun({str(tmp_path / "two")!r}, Watched(rank=4, total=0.65), Recipe(steps=6, batch=3, lr=1e-2), cpu=True)
run = replace(run, output=__import__("pathlib").Path(run.output))
train_tasks(run, make_open_clip(), tasks)
assert seen == [*range(6)] * 2
"""
    script = tmp_path / "two.py"
    script.write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    out = subprocess.run([*launch, str(script)], check=False, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    np.testing.assert_allclose(two["matrix"], one.matrix)
    assert two["norms"] == pytest.approx(one.norms, rel=1e-3)
    first, second = (load_clip(str(tmp_path / n / "model")).model for n in ("one", "two"))
    for key, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], tensor, atol=1e-4, rtol=1e-3)
