"""One method on the packaged stream as a user runs it, and methods against each other."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_prune.benchmarks.experiments.continual import results
from vlm_prune.benchmarks.experiments.continual.compare import figures, metric_differences
from vlm_prune.benchmarks.experiments.continual.experiment import (
    ARMS,
    CANDIDATES,
    Experiment,
    run_all,
    take_search,
)
from vlm_prune.benchmarks.experiments.continual.learn import (
    Learning,
    fewer,
    learn,
    method_of,
    picture_ranks,
    recipe_of,
)
from vlm_prune.benchmarks.experiments.continual.results import (
    BUDGETED,
    GAIN,
    SMALLER,
    WHICH,
    collect,
    verdicts,
    write,
)
from vlm_prune.benchmarks.experiments.continual.timing import (
    PeftLoRA,
    step_cost,
    step_times,
    unit_costs,
)
from vlm_prune.continual.clip import Clip, load_clip
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods import METHODS, make_method
from vlm_prune.continual.metrics import AccuracyMatrix
from vlm_prune.continual.streams import open_stream
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.folder import record_settings

SCRIPT = Path(__file__).parents[3] / "scripts" / "train_continual.py"
SMALL = ["--recipe", "steps=2,batch=4", "--test-per-class", "1"]
LEARNING = {"recipe": {"steps": 2, "batch": 4}, "test_per_class": 1}


def run(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_reports_and_leaves_a_model(tmp_path):
    out = run("--output", tmp_path, *SMALL, "--options", "rank=2")
    assert out.returncode == 0, out.stderr[-2000:]
    assert "zero-shot" in out.stdout and "retention on scenes" in out.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert np.array(report["accuracy"]).shape == (8, 8) and len(report["zero_shot"]) == 8
    for name in ("transfer", "average", "last", "forgetting"):
        low, high = report["metrics"][name]["ci"]
        assert low <= report["metrics"][name]["value"] <= high
    assert report["recipe"]["steps"] == 2 and len(report["drift"]) == 8
    assert report["drift"][-1] > report["drift"][0] > 0
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    base, final = (load_clip(n).model.state_dict() for n in ("tiny", str(tmp_path / "model")))
    assert base.keys() == final.keys()
    assert any(not torch.equal(base[name], final[name]) for name in base)


@pytest.mark.slow
def test_a_killed_script_ends_in_the_same_matrix(tmp_path):
    learn(Learning(tmp_path / "whole", **LEARNING))
    broken = tmp_path / "broken"
    process = subprocess.Popen([sys.executable, SCRIPT, "--output", broken, *SMALL])
    for _ in range(1200):
        if any(broken.glob("state-*")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run("--output", broken, *SMALL).returncode == 0
    one, two = (json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "broken"))
    assert {**one, "command": ""} == {**two, "command": ""}


@pytest.mark.slow
def test_two_processes_run_the_script(tmp_path):
    one = learn(Learning(tmp_path / "one", **LEARNING))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, SCRIPT, "--output", tmp_path / "two", *SMALL]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("retention on scenes") == 1
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    np.testing.assert_allclose(two["accuracy"], one["accuracy"], atol=0.11)  # one image of ten
    assert two["drift"] == pytest.approx(one["drift"], rel=1e-3)


def test_wrong_input_is_one_line(tmp_path):
    out = run("--output", tmp_path, "--method", "codira")
    assert out.returncode == 2
    assert out.stderr.strip().count("\n") == 0 and "did you mean 'codyra'" in out.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": "packagd"}, "did you mean 'packaged'"),
        ({"stream": "x-tail", "data_root": Path("/nowhere")}, "not a folder"),
        ({"model": "ViT-B-16"}, "give pretrained"),
        ({"recipe": {"step": 3}}, "did you mean 'steps'"),
        ({"recipe": {"steps": "many"}}, "steps of the recipe is 'many'; give a value such as 500"),
        ({"recipe": {"clip_norm": "x"}}, "clip_norm x is out of range"),
        ({"recipe": {"steps": 0}}, "steps 0 is out of range"),
        ({"options": {"rnk": 3}}, "did you mean 'rank'"),
        ({"test_per_class": 0}, "test_per_class 0"),
        ({"shots": 0}, "0 shots leave digits without training images"),
        ({"shots": 33}, "has 32 training images for 33 shots"),
    ],
)
def test_wrong_settings(changes, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        learn(Learning(tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_class_keeps_its_first_test_images():
    task = open_stream("packaged").tasks[0]
    labels = [label for _, label in fewer(task, 2).test]
    assert sorted(labels) == sorted([*range(10)] * 2)
    assert fewer(task, None) is task


def matrices(seeds, shift=0.0, images=60):
    runs = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        draws = [rng.random((2, images)) for _ in "ab"]
        hits = tuple((d < 0.5 + shift).astype(np.uint8) for d in draws)
        runs[seed] = AccuracyMatrix(("a", "b"), hits)
    return runs


def test_means_over_seeds_and_paired_differences():
    one, other = matrices((0, 1, 2), 0.2), matrices((0, 1, 2))
    found = figures(one)
    by_hand = 100 * np.mean([run.values[-1].mean() for run in one.values()])
    assert found["last"]["value"] == pytest.approx(by_hand)
    assert found["last"]["low"] < by_hand < found["last"]["high"]
    gain = metric_differences(one, other)["last"]
    other_last = 100 * np.mean([run.values[-1].mean() for run in other.values()])
    assert gain["value"] == pytest.approx(by_hand - other_last)
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    # every image that the other has right the first has right too: pairing narrows the interval
    assert gain["high"] - gain["low"] < found["last"]["high"] - found["last"]["low"]
    assert metric_differences(one, one)["average"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_differences_use_common_seeds():
    one, other = matrices((0, 1), 0.2), matrices((1, 2))
    alone = metric_differences({1: one[1]}, {1: other[1]})
    assert metric_differences(one, other) == alone
    assert metric_differences(one, matrices((5,))) == {}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    arms = (*list(ARMS)[:5], "zero-shot")
    small = {"steps": 4, "batch": 4, "test_per_class": 1, "search_tasks": 1, "tasks": 2}
    found = Experiment(tmp_path_factory.mktemp("experiment"), seeds=1, arms=arms, **small)
    run_all(found)
    return found


def test_the_search_sees_validation_images_alone(experiment):
    record = json.loads((experiment.output / "search.json").read_text())
    assert {name: len(scores) for name, scores in record.items()} == {"codyra": 4, "lora": 4}
    run = json.loads((experiment.folder("search-lora-0", 0) / "run.json").read_text())
    assert [task["test"] for task in run["tasks"]] == [80]  # 8 of each of 10 classes
    task = open_stream("packaged").tasks[0]
    val, test = ({task_image.tobytes() for task_image, _ in s} for s in (task.val, task.test))
    assert not val & test


def test_controls_follow_codyra(experiment):
    for number in range(2):
        one, ranks, both, norms = (
            Delta.load(experiment.folder(label, 0) / "deltas" / f"task-{number}.safetensors")
            for label in ("codyra", *list(ARMS)[2:5])
        )
        kept = {name: factors.rank for name, factors in one.factors.items()}
        assert kept == {name: factors.rank for name, factors in ranks.factors.items()}
        assert kept == {name: factors.rank for name, factors in both.factors.items()}
        for other in (both, norms):
            assert other.norm() == pytest.approx(one.norm(), rel=1e-4)


def test_pruned_ranks_are_drawn_for_every_task(experiment, tmp_path):
    for label, drawn in (("codyra", ["digits.png", "letters.png"]), ("lora", [])):
        shutil.copytree(experiment.folder(label, 0), tmp_path / label)
        picture_ranks(tmp_path / label)
        assert sorted(p.name for p in (tmp_path / label).glob("ranks/*")) == drawn


def test_a_finished_experiment_trains_nothing(experiment):
    files = sorted(path for path in experiment.output.rglob("*") if path.name != ".lock")
    times = [path.stat().st_mtime_ns for path in files]
    run_all(experiment)
    after = sorted(path for path in experiment.output.rglob("*") if path.name != ".lock")
    assert after == files
    assert [path.stat().st_mtime_ns for path in files] == times


def test_an_experiments_folder_belongs_to_its_settings_and_its_clip(experiment, monkeypatch):
    for changed in (replace(experiment, steps=5), replace(experiment, batch=8)):
        with pytest.raises(InputError, match="holds a run with another (steps|batch);"):
            run_all(changed)
        with pytest.raises(InputError, match="holds a run with another (steps|batch);"):
            write(changed, experiment.output / "never")
    monkeypatch.setattr(Clip, "fingerprint", lambda self: "another")
    with pytest.raises(InputError, match="another weights;"):
        run_all(experiment)


def test_another_stream_takes_over_the_search(experiment, tmp_path):
    arms = ("lora", "zero-shot")
    other = replace(experiment, output=tmp_path, arms=arms, stream="redrawn")
    for _ in range(2):  # the second run finds everything
        run_all(other, search_from=experiment.output)
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock")
    assert names == ["experiment.json", "lora", "search.json", "zero-shot"]
    assert json.loads((tmp_path / "experiment.json").read_text())["stream"] == "redrawn"
    taken, searched = ((e.output / "search.json").read_text() for e in (other, experiment))
    assert json.loads(taken) == json.loads(searched)
    best = max(json.loads(taken)["lora"], key=lambda tried: tried["average"])
    report = json.loads((other.folder("lora", 0) / "report.json").read_text())
    assert report["recipe"]["lr"] == best["lr"]
    run = json.loads((other.folder("lora", 0) / "run.json").read_text())
    assert [task["name"] for task in run["tasks"]] == ["arrows", "numerals"]
    with pytest.raises(InputError, match="another version"):
        run_all(replace(other, stream="packaged"))


def test_searches_that_cannot_be_taken_over(experiment, tmp_path):
    other = replace(experiment, output=tmp_path / "other", stream="redrawn")
    with pytest.raises(InputError, match=r"nowhere has no search\.json"):
        run_all(other, search_from=tmp_path / "nowhere")
    with pytest.raises(InputError, match="another steps; give the folder"):
        run_all(replace(other, steps=5), search_from=experiment.output)
    assert not other.output.exists()
    shutil.copytree(experiment.output, tmp_path / "changed")
    path = tmp_path / "changed" / "search.json"
    record = json.loads(path.read_text())
    record["lora"][0]["average"] = 0.125
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="has its own search; leave out --search-from"):
        run_all(experiment, search_from=tmp_path / "changed")
    with pytest.raises(InputError, match="'x-tail'; give packaged or redrawn"):
        replace(experiment, stream="x-tail")


def test_a_search_on_fewer_tasks_is_not_taken_over(tmp_path):
    one = Experiment(tmp_path / "one")
    record_settings(one.file, one.settings())
    (one.output / "search.json").write_text("{}")
    for tasks in (3, None):  # the search has three
        take_search(replace(one, output=tmp_path / "other", tasks=tasks), one.output)
    with pytest.raises(InputError, match="another tasks; give the folder"):
        take_search(replace(one, output=tmp_path / "another", tasks=2), one.output)


def test_steps_are_timed_anew_for_an_arm_more(tmp_path, monkeypatch):
    timed = []

    def stand_in(methods, *_):
        timed.append(list(methods))
        return dict.fromkeys(methods, 1.0)

    monkeypatch.setattr(results, "step_times", stand_in)
    for arms in (("lora",), ("lora", "zero-shot"), ("codyra",), ("codyra", "lora")):
        results.time_steps(Experiment(tmp_path, arms=arms))
    assert timed == [["lora"], ["codyra", "lora"]]


def figure(value, reach=1.0):
    return {"value": value, "low": value - reach, "high": value + reach}


def test_verdicts_follow_the_figures():
    def found(gain, smaller, which, plus):
        pairs = {GAIN: gain, SMALLER: smaller, WHICH: which, BUDGETED: plus}
        metrics = ("transfer", "average", "last")
        return {
            "differences": [
                {"of": one, "minus": other, **{name: figure(value) for name in metrics}}
                for (one, other), value in pairs.items()
            ],
            "methods": {"codyra-plus": {"kept_rank": 8.0}, "codyra": {"kept_rank": 8.25}},
        }

    *shares, plus = verdicts(found(4.0, 3.0, 1.0, 2.0))
    assert len(shares) == 3 and all("75 % and 25 % of the gain" in line for line in shares)
    assert "beats CoDyRA" in plus and "8.00 against 8.25" in plus
    *shares, plus = verdicts(found(0.5, 3.0, 1.0, 0.5))
    assert all("nothing to divide" in line for line in shares) and "does not beat" in plus
    assert verdicts({"differences": [], "methods": {}}) == []


def test_results_are_written(experiment, tmp_path):
    write(experiment, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == json.loads(json.dumps(collect(experiment)))
    assert found["finished"] == found["planned"] == 6
    assert found["methods"]["zero-shot"]["metrics"]["forgetting"]["value"] == 0
    assert [one["of"] for one in found["differences"]].count("codyra") == 4
    assert len(found["verdicts"]) == 3
    assert 0 < found["methods"]["codyra"]["kept_rank"] < 16
    assert found["methods"]["lora"]["kept_rank"] == 16
    page = (tmp_path / "README.md").read_text()
    assert all(f"| {label} |" in page for label in experiment.arms)
    assert "on the packaged stream" in page and "first 1 tasks of `packaged`, seed 0" in page
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    partial = collect(replace(experiment, seeds=2))
    assert (partial["finished"], partial["planned"]) == (6, 12)


def test_every_method_is_compared_and_can_be_built():
    assert {arm.method for arm in ARMS.values()} == set(METHODS)
    assert {arm.rate for arm in ARMS.values()} - {""} == set(CANDIDATES)
    stream = open_stream("packaged")
    for arm in ARMS.values():
        follows = {arm.follows: "a run"} if arm.follows else {}
        assert method_of(stream, arm.method, {**arm.options, **follows}).name == arm.method
    assert [method_of(stream, "zscl", {}, steps).average_every for steps in (2, 60)] == [2, 5]
    for candidates in CANDIDATES.values():
        for candidate in candidates:
            assert recipe_of(stream, {"lr": candidate["lr"]}, 0).lr == candidate["lr"]


def test_a_step_of_each_method_is_timed():
    methods = {name: make_method(name) for name in ("codyra", "full", "zero-shot")}
    methods["peft"] = PeftLoRA(4)
    pixels, labels = torch.randn(2, 3, 48, 48), torch.tensor([0, 1])
    times = step_times(methods, lambda: load_clip("tiny"), ["a red.", "a blue."], pixels, labels, 2)
    assert times.keys() == {"codyra", "full", "peft"} and min(times.values()) > 0


def test_the_cost_of_a_step_is_that_of_its_images_and_prompts():
    makers = partial(make_method, "codyra"), partial(load_clip, "tiny")
    pixels = torch.randn(7, 3, 48, 48)
    units = unit_costs(*makers, "a red.", pixels[:1])
    whole, base = (
        step_cost(*makers, ["a red."] * prompts, pixels[:images])
        for images, prompts in ((7, 5), (2, 2))
    )
    for name in ("flops", "saved_bytes"):
        image, prompt = (getattr(units[unit], name) for unit in ("image", "prompt"))
        grown = getattr(whole, name) - getattr(base, name)
        assert 0 < prompt and grown == pytest.approx(5 * image + 3 * prompt, rel=0.01)
    # with frozen weights the backward pass is less than twice the forward
    assert 2 < units["image"].flops / units["test image"].flops < 3


def test_norms_are_matched_to_a_run_alone():
    with pytest.raises(InputError, match="give its folder as like"):
        make_method("random-rank", match_norm=True)
