"""The bench command on the embedded architecture: phases, floors, files, wrong input."""

import json
from importlib.util import find_spec
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from tiny_families import MAKERS, NEEDS

from vlm_prune.benchmarks.evaluation.records import PhaseTimes, TokenCounts, Variant
from vlm_prune.benchmarks.speed import bench
from vlm_prune.benchmarks.speed.bench import (
    BenchConfig,
    ModelTimes,
    PhaseTimings,
    floors,
    random_model,
    whole_speedup,
)
from vlm_prune.benchmarks.speed.roofline import Ceilings, Timing
from vlm_prune.benchmarks.speed.shapes import SHAPES
from vlm_prune.learners import WingsConfig
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.families import family_of

FAST = ["--repeats", "1", "--new-tokens", "2", "--budget", "32"]


@pytest.mark.parametrize("method", ["fopru", "downsample"])
def test_bench_reports_every_phase_of_both_models(run, tmp_path, method):
    code, out, err = run("bench", "--method", method, *FAST, "--output", tmp_path)
    assert code == 0, err
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["schema_version"] == 1
    phases = {"vision", "selection", "prefill", "decode"}
    for name, tokens in (("unpruned", 576), ("pruned", 32 if method == "fopru" else 30)):
        assert set(results[name]["times_ms"]) == set(results[name]["floors_ms"]) == phases
        counts = {"kept": tokens, "layer_mean": tokens, "papers": tokens}
        assert results[name]["tokens"] == counts
        assert min(results[name]["times_ms"][p]["median"] for p in phases - {"selection"}) > 0
    assert results["unpruned"]["times_ms"]["selection"]["median"] == 0
    assert results["pruned"]["times_ms"]["selection"]["median"] > 0
    assert results["pruned"]["floors_ms"]["prefill"] < results["unpruned"]["floors_ms"]["prefill"]
    tower = [results[name]["floors_ms"]["vision"] for name in ("unpruned", "pruned")]
    assert (tower[1] < tower[0]) == (method == "downsample")
    speed, flops = results["speedup"], [results[n]["prefill_flops"] for n in ("unpruned", "pruned")]
    assert speed["promised"] == flops[0] / flops[1] > 5
    assert speed["prefill_alone"] > speed["prefill"]
    unpruned, short = results["unpruned"]["times_ms"]["prefill"], results["as_short_ms"]
    assert speed["as_short"] == unpruned["median"] / short["median"] > 1
    assert 0 < speed["selection_share"] < results["pruned"]["times_ms"]["selection"]["median"]
    assert f"of the {speed['promised']:.2f}x" in out and "of the unpruned prefill" in out
    table = (tmp_path / "bench.md").read_text()
    assert (
        "measured ceilings" in table and "decode per token" in table and "576 image tokens" in out
    )


@pytest.mark.slow
def test_compiled_prefill_is_timed(run, tmp_path):
    code, out, err = run(
        "bench", "--method", "divprune", *FAST, "--layers", "2", "--compile", "--output", tmp_path
    )
    assert code == 0, err
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["config"]["compile"] and "compiled prefill" in out
    assert results["pruned"]["times_ms"]["prefill"]["median"] < 5e3


def test_sparse_attention_is_timed_beside_sdpa(run, tmp_path):
    lengths = ["--attention-tokens", "500,900", "--layers", "2", "--repeats", "1"]
    code, out, err = run(
        "bench", "--attention", "prism,random-blocks,dhsa,seer,recycled", *lengths, "--density", "0.4",
        "--method-args", "block=16,refresh=4", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [length["tokens"] for length in results["lengths"]] == [500, 900]
    for length in results["lengths"]:
        assert min(times["median"] for times in length["dense"].values()) > 0
        for run_of_method in length["methods"].values():
            assert run_of_method["density"] == pytest.approx(0.4, abs=0.02)
            assert 0 < run_of_method["chosen_density"] < 0.4
            speed = run_of_method["speedup"]
            ratio = length["dense"]["layer_ms"]["median"] / run_of_method["layer_ms"]["median"]
            assert speed["layer"] == pytest.approx(ratio)
            assert 1 < speed["promised"] < 2.5
            # what the tower takes brings it nearer to 1
            assert abs(speed["first_token"] - 1) < abs(speed["layer"] - 1)
        # a full step and three of two fifths of the keys
        step = length["steps"]["recycled"]
        assert step["density"] == pytest.approx((3 * 0.4 + 1) / 4, abs=0.02)
        base = length["dense_step"]["attention_ms"]["median"]
        assert step["attention_speedup"] == pytest.approx(base / step["attention_ms"]["median"])
    assert set(results["crossover"]) == {"prism", "random-blocks", "dhsa", "seer", "recycled"}
    assert results["image_tokens"] == 576
    assert "| 900 | prism | 0.4" in (tmp_path / "bench.md").read_text() and "SDPA" in out
    for wrong, says in (
        (["--attention", "poled"], "did you mean 'pooled'"),
        (["--attention", "act"], "leaves nothing out of a prefill or a decoding step"),
        (["--attention", "local,local"], "is named twice: local"),
        (["--attention", "local", "--attention-tokens", "4k"], "attention-tokens '4k' is no list"),
        (["--attention", "local", "--density", "2"], "density 2.0 is no share"),
    ):
        code, _, err = run("bench", *wrong, "--layers", "1")
        assert code == 2 and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("mode", "ignored"),
    [
        ("--attention local", "--budget 64 --method zoo"),
        ("--attention local", "--batch 2 --compile --new-tokens 2"),
        ("--attention local", "--engine vllm --wings 2"),
        ("--attention local", "--positions original --tower-layers 1 --video-frames 2"),
        ("--wings 2", "--budget 64 --method zoo"),
        ("--wings 2", "--compile --engine vllm --video-frames 2"),
        ("--wings 2", "--method-args samples=2 --positions original"),
        ("--engine vllm", "--batch 2 --compile --device cpu"),
        ("--engine vllm", "--tower-layers 1 --video-frames 2"),
    ],
)
def test_options_that_would_be_ignored_are_refused(run, mode, ignored):
    options = " and ".join(part for part in ignored.split() if part.startswith("--"))
    code, _, err = run("bench", *mode.split(), *ignored.split())
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{mode if 'vllm' in mode else mode.split()[0]} would ignore {options}; leave out" in err


def test_several_methods_share_one_model(run, tmp_path):
    code, out, err = run("bench", "--method", "divprune,fastv", *FAST, "--output", tmp_path)
    assert code == 0, err
    both = json.loads((tmp_path / "bench.json").read_text())
    assert [results["config"]["variant"]["method"] for results in both] == ["divprune", "fastv"]
    assert both[0]["ceilings"] == both[1]["ceilings"]
    assert both[0]["pruned"]["tokens"]["kept"] == 32
    lines = (tmp_path / "bench.md").read_text().splitlines()
    (header,) = (line for line in lines if line.startswith("| method"))
    assert "of promise %" in header and "GPU" not in header
    for results in both:
        name, speed = results["config"]["variant"]["method"], results["speedup"]
        (line,) = (line for line in lines if line.startswith(f"| {name}"))
        assert f"{speed['prefill']:.2f}x" in line and f"{speed['first_token']:.2f}x" in line
        assert name in out
    assert "tiny, batch 1, float32: 576 image tokens and 60 others per prompt, budget 32" in out


def test_all_is_every_method_that_fits_the_shape(run, tmp_path, monkeypatch):
    from vlm_prune.benchmarks.cli.support import every_method

    measured = []
    monkeypatch.setattr(
        "vlm_prune.benchmarks.speed.bench.bench",
        lambda _, variants: measured.extend(variants) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        run("bench", "--method", "all", "--model-shape", "llava-0.5b")
    assert [v.method for v in measured] == every_method(SHAPES["llava-0.5b"]())
    code, _, err = run("bench", "--method", "all", "--model-shape", "llava-0.5")
    assert code == 2 and "did you mean 'llava-0.5b'" in err
    code, _, err = run("bench", "--method", ",")
    assert code == 2 and "no method given" in err


def test_a_shape_can_have_fewer_layers(run, tmp_path):
    measured = {
        "fastv": ["--method", "fastv", *FAST],
        "learners of rank 4": ["--wings", "4", *FAST[:4]],
    }
    for name, options in measured.items():
        code, out, err = run("bench", "--layers", "3", *options, "--output", tmp_path)
        assert code == 0, err
        assert "tiny of 3 layers, batch 1" in out and name in out
    model = random_model(BenchConfig("internvl3-1b", Variant("none", 64), device="meta", layers=2))
    text = model.config.get_text_config()
    assert len(model.model.language_model.layers) == len(text.layer_types) == 2


@pytest.mark.parametrize(
    "family",
    ["internvl", "llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"],
)
def test_videos_are_encoded_once_and_shared_by_all_methods(run, tmp_path, monkeypatch, family):
    if not all(map(find_spec, NEEDS[family])):
        pytest.skip("the processor needs a package")
    config = MAKERS[family]()[0].config
    for module in ("bench", "shapes"):
        monkeypatch.setattr(
            f"vlm_prune.benchmarks.speed.{module}.SHAPES", {"small": lambda: config}
        )
    monkeypatch.setattr("vlm_prune.benchmarks.speed.pictures.FRAME_SIDE", 84)
    peaks = count()
    monkeypatch.setattr("vlm_prune.benchmarks.speed.bench.peak_bytes", lambda _: next(peaks))
    code, out, err = run(
        "bench", "--model-shape", "small", "--method", "evs,fastvid,fastv", "--video-frames", "4",
        "--layers", "2", "--tower-layers", "2", "--repeats", "1", "--new-tokens", "2", "--budget",
        "0.5", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    evs, fastvid, fastv = json.loads((tmp_path / "bench.json").read_text())
    # frames of 2 x 2 tokens, perhaps with a newline behind them, or of 3 x 3, alone or in pairs
    alone = {"internvl": 36, "smolvlm": 36}
    tokens = (alone | {"llava_next_video": 16, "llava_onevision": 17}).get(family, 18)
    assert evs["unpruned"]["tokens"]["kept"] == tokens and f"{tokens} tokens of 4 frames" in out
    assert evs["pruned"]["tokens"]["kept"] == round(tokens / 2)
    assert evs["unpruned"]["times_ms"] == fastv["unpruned"]["times_ms"]
    peak = [run["unpruned"]["peak_memory_bytes"] for run in (evs, fastvid, fastv)]
    assert peak[0] == peak[1] == peak[2] < evs["pruned"]["peak_memory_bytes"]
    assert 0 < evs["selection_memory"] < fastvid["selection_memory"]
    assert fastv["selection_memory"] is None


def test_markers_may_leave_little_text(monkeypatch):
    """Of 20 text tokens 18 are markers of frames, and the two others go before the video."""
    ids = torch.tensor([[7, 7, 7, 5] * 6])
    family = SimpleNamespace(placeholder=lambda kind: 5, kind_of=lambda frames: "video")
    monkeypatch.setattr(bench, "family_of", lambda model: family)
    monkeypatch.setattr(bench, "random_videos", lambda *given: {"input_ids": ids})
    config = BenchConfig("tiny", Variant("none", 1.0), text=20, video_frames=6)
    found = bench.random_prompt(config, SimpleNamespace(device="cpu"))["input_ids"]
    assert found.shape == (1, 26) and found[0, 2:].equal(ids[0])


def test_layers_that_do_not_run_are_as_long_as_those_that_do():
    """Of 7 layers 3 run; of 12 and 5 milliseconds the logits take 2, so the whole takes 76 / 3 and 9."""
    none = Timing(0.0, 0.0, 0.0)
    unpruned, pruned = (
        ModelTimes(
            times_ms=PhaseTimings(
                vision=none, selection=Timing(0.9, 0.9, 0.9),
                prefill=Timing(prefill, prefill, prefill), decode=none,
            ),
            floors_ms=PhaseTimes(vision=0.0, selection=0.0, prefill=0.0, decode=0.0),
            tokens=TokenCounts(kept=64.0, layer_mean=64.0, papers=None),
            prefill_flops=flops,
            peak_memory_bytes=0,
        )
        for prefill, flops in ((12.0, 30.0), (5.0, 10.0))
    )  # fmt: skip
    config = BenchConfig("tiny", Variant("none", 64), layers=3)
    found = whole_speedup(unpruned, pruned, config, 2.0)
    assert found.whole_selection_share == pytest.approx(0.9 / (76 / 3))
    assert found.whole_selection_of_pruned == pytest.approx(0.1)
    assert found.whole_of_promise == pytest.approx(76 / 3 / 9.9 / 3)


def test_models_without_videos_and_odd_numbers_of_frames_are_named(run):
    for shape, more, message in (
        (
            "tiny",
            (),
            "llava models take no videos here; give a shape of llava_next_video, llava_onevision",
        ),
        ("tiny", ("--tower-layers", "9"), "tiny has no 9 tower layers; give 1 to"),
    ):
        code, _, err = run("bench", "--model-shape", shape, "--video-frames", "2", *more)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_floors_count_weights_once_and_flops_per_prompt():
    config = BenchConfig("tiny", Variant("none", 576), batch=3)
    model = random_model(config)
    layers = [576.0] * 6
    by_bytes = floors(model, config, layers, 0.0, Ceilings(flops=1e30, bandwidth=1e3))
    text = model.config.get_text_config()
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters())
    weights += text.vocab_size * text.hidden_size
    cache = 3 * (60 + 576) * 2 * text.hidden_size * 6
    assert by_bytes.prefill == by_bytes.decode == pytest.approx(4 * (weights + cache))
    one, three = (
        floors(
            model, BenchConfig("tiny", config.variant, batch=b), layers, 0.0, Ceilings(1e9, 1e30)
        )
        for b in (1, 3)
    )
    assert three.prefill == pytest.approx(3 * one.prefill)


BILLIONS = {
    "llava-1.5-7b": 7.06, "llava-0.5b": 0.77, "llava-next-7b": 7.06, "llava-onevision-0.5b": 0.89,
    "qwen2.5-vl-3b": 3.75, "qwen3-vl-2b": 2.13, "internvl3-1b": 0.94, "smolvlm-256m": 0.256,
    "qwen3-vl-30b-a3b": 31.07, "idefics3-8b": 8.46, "gemma3-4b": 4.30, "mistral-small-3.1-24b": 24.01, "glm-4.1v-9b": 10.29,
}  # fmt: skip


@pytest.mark.parametrize("name", BILLIONS)
def test_shapes_have_the_released_sizes(name):
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(SHAPES[name]())
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx(BILLIONS[name], abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-shape", "llava-1.5-8b"], "did you mean 'llava-1.5-7b'"),
        (["--dtype", "float31"], "unknown dtype"),
        (["--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["--budget", "577"], "above the 576 tokens"),
        (["--layers", "9"], "tiny has no 9 decoder layers; give 1 to 7"),
        (["--density", "0.5"], "--density without --attention would change nothing; add it"),
        (["--wings-stride", "2"], "--wings-stride without --wings would"),
        (
            ["--requests", "4", "--concurrency", "2"],
            "--concurrency and --requests without --engine",
        ),
        (["--batch", "0"], "greater than or equal to 1"),
        (
            ["--engine", "vllm", "--method", "zoo,fopru"],
            "measures one method; name one in --method",
        ),
    ],
)
def test_wrong_input_is_one_line(run, arguments, message):
    code, _, err = run("bench", *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_bench_measures_what_learners_cost(run, tmp_path):
    fast = ["--repeats", "1", "--new-tokens", "2"]
    code, out, err = run("bench", "--wings", "8", *fast, "--output", tmp_path)
    assert code == 0, err
    results = json.loads((tmp_path / "bench.json").read_text())
    for phase in ("prefill", "decode"):
        plain, wings = (results["times_ms"][name][phase]["median"] for name in ("plain", "wings"))
        assert 0 < plain and results["overhead"][phase] == pytest.approx(wings / plain - 1)
    assert results["config"]["text"] == 271 and "1000 tokens, 729 of an image" in out
    assert "decode per token" in (tmp_path / "bench.md").read_text() and "learners +" in out


def test_learners_of_a_7b_model_cost_what_the_paper_s_equations_say():
    from vlm_prune.benchmarks.speed.wings_cost import extra_flops

    shares = extra_flops("llava-1.5-7b", WingsConfig(64))
    width, inner, tokens, rank = 4096, 11008, 1000, 64
    layer = 4 * width**2 + 3 * width * inner + 2 * tokens * width
    # per token: maps of queries and outputs of two learners, of keys and values of one; products
    learners = 12 * width * rank + 2 * tokens * width
    head = 32064 * width / tokens / 32
    assert shares.learners == pytest.approx(learners / (layer + head), rel=1e-6)
    second = 2 * tokens * width / (layer + head)
    assert shares.router_on_gpu == pytest.approx(second, rel=1e-6)
    assert shares.router == pytest.approx(second * 8 / 128, rel=1e-6)
    assert shares.learners + shares.router <= 0.06


@pytest.mark.parametrize("method", ["divprune", pytest.param("adaptinfer", marks=pytest.mark.slow)])
def test_every_family(run, tiny, tmp_path, monkeypatch, method):
    """Times and floors of a picture that has as many tokens as the family gives one of its size."""
    if build(method).needs & family_of(tiny.model).lacks:
        pytest.skip("refused")
    monkeypatch.setitem(SHAPES._entries, "family", lambda: tiny.model.config)
    monkeypatch.setattr("vlm_prune.benchmarks.speed.pictures.SIDE", 112)
    fast = ["--repeats", "1", "--new-tokens", "2", "--batch", "2", "--budget", "0.5"]
    code, _, err = run(
        "bench", "--model-shape", "family", "--method", method, *fast, "--output", tmp_path
    )
    assert code == 0, err
    results = json.loads((tmp_path / "bench.json").read_text())
    before, after = results["unpruned"], results["pruned"]
    assert before["tokens"]["kept"] > 8
    surplus = before["tokens"]["kept"] / 2 - after["tokens"]["layer_mean"]
    assert -0.5 <= surplus < 1 and results["speedup"]["promised"] > 1
    for run_ in (before, after):
        assert all(run_["floors_ms"][phase] > 0 for phase in ("vision", "prefill", "decode"))


@pytest.mark.parametrize("tiny", ["smolvlm"], indirect=True)
def test_what_a_family_lacks_is_said(run, tiny, monkeypatch):
    monkeypatch.setitem(SHAPES._entries, "family", lambda: tiny.model.config)
    for extra, message in (
        ([], "Zoo needs a nonlinear"),
        (["--wings", "8"], "shapes of LLaVA-1.5"),
    ):
        code, _, err = run("bench", "--model-shape", "family", *extra)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
