"""`eval --suite forgetting` on real checkpoints: a language model, the VLM made of it, Wings."""

import json

import pytest

from vlm_prune.benchmarks.evaluation.language import Language
from vlm_prune.benchmarks.experiments.suite import _row
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.vlm.common.errors import InputError

FAST = ["--limit", "16", "--batch-size", "4", "--tasks", "iit,text,exist"]


def rows(folder, role):
    lines = (folder / role / "samples.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def common(checkpoint, language, adapter):
    return [
        "eval", "--suite", "forgetting", "--model", checkpoint, "--base", language,
        "--wings", adapter, *FAST,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished():
    """What `whole` found, for all tests."""
    return []


@pytest.fixture
def whole(run, common, finished, tmp_path_factory):
    """An undisturbed run's folder, and what it printed."""
    if not finished:
        folder = tmp_path_factory.mktemp("whole")
        code, out, err = run(*common, "--output", folder)
        assert code == 0 and not err, err
        finished.extend((folder, out))
    return finished


def test_three_models_on_the_same_questions(whole):
    folder, out = whole
    base, plain, wings = (rows(folder, role) for role in ("base", "vlm", "wings"))
    text = {name for name in plain if name.startswith("text/")}
    assert len(text) == 5 and set(base) == text and set(wings) == set(plain) and len(plain) == 16
    # the same weights and words: the base is the VLM's own language model
    assert [base[n]["prediction"] for n in base] == [plain[n]["prediction"] for n in base]
    assert len({row["prediction"] for row in plain.values()}) > 1
    for part in ("text/", "exist/", "iit/"):
        own = [name for name in plain if name.startswith(part)]
        assert any(plain[n]["prediction"] != wings[n]["prediction"] for n in own), part
    results = json.loads((folder / "results.json").read_text())
    assert results["suite"] == "forgetting" and list(results["models"]) == ["base", "vlm", "wings"]
    assert list(results["tasks"]) == ["text", "iit", "exist"]
    assert results["text"]["differences"]["vlm - base"] == {"accuracy": 0.0, "ci": [0.0, 0.0]}
    assert set(results["tasks"]["exist"]["differences"]) == {"wings - vlm"}
    assert {"seed", "config", "versions", "device", "command", "skipped"} <= set(results)
    table = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [cells[0].strip() for cells in table] == ["text", "iit", "exist", "mean, images"]
    assert [cells[2].strip() for cells in table][1:] == ["–"] * 3
    assert "VLM + Wings - base LLM" in out


def test_differences_and_intervals_follow_from_the_rows():
    import numpy as np

    from vlm_prune.benchmarks.experiments.suite import _entry

    base, plain = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 0, 0])
    entry = _entry({"vlm": {"a": plain, "b": base}, "base": {"a": base}}, ["a"])
    assert entry.accuracy == {"vlm": 0.25, "base": 0.75} and entry.n == 4
    gain = entry.differences["vlm - base"]
    assert gain.accuracy == -0.5 and gain.ci[0] == -1 and gain.ci[1] <= 0
    whole = _entry({"vlm": {"a": plain, "b": base}, "base": {"a": base}}, ["a", "b"])
    assert whole.accuracy == {"vlm": 0.5} and not whole.differences


def test_a_killed_suite_resumes_and_a_later_model_joins(run, common, whole, tmp_path):
    parts = tmp_path / "parts"
    without = [word for word in common if word not in ("--wings", common[8])]
    assert run(*without, "--output", parts)[0] == 0
    log = parts / "vlm" / "samples.jsonl"
    kept = log.read_text().splitlines(keepends=True)
    log.write_text("".join(kept[:6]) + kept[6][:30])
    (parts / "results.json").unlink()
    untouched = (parts / "base" / "samples.jsonl").stat().st_mtime_ns
    assert run(*common, "--output", parts)[0] == 0
    assert (parts / "base" / "samples.jsonl").stat().st_mtime_ns == untouched
    first, second = (json.loads((f / "results.json").read_text()) for f in (whole[0], parts))
    assert all(first[key] == second[key] for key in ("tasks", "text", "images", "models"))
    code, _, err = run(*common, "--output", parts, "--seed", "1")
    assert code == 2 and "another seed" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "forgeting"], "did you mean 'forgetting'"),
        (["--suite", "forgetting", "--method", "zoo", "--budget", "8"], "out --budget, --method"),
        (
            ["--suite", "forgetting", "--attn", "eager"],
            "without --device-map, --quantization, --attn",
        ),
        (["--suite", "forgetting", "--adapter", "x"], "--attn and --adapter"),
        (["--base", "somewhere"], "add --suite forgetting"),
        (["--suite", "forgetting", "--base", "tiny"], "is a model that sees images"),
        (["--suite", "forgetting", "--base", "/nowhere/llama"], "cannot load model"),
        (["--suite", "forgetting", "--limit", "3"], "below one question for 9 tasks"),
    ],
)
def test_wrong_options(run, checkpoint, tmp_path, options, message):
    code, _, err = run("eval", "--model", checkpoint, *options, "--output", tmp_path)
    assert code == 2 and message in err, err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "results.json").exists()


def test_a_video_is_no_text():
    sample = TASKS["order"].sample(0, 0, "val")
    assert not sample.images and _row(sample, "A").images == 1


TURN = [{"role": "user", "content": [{"type": "text", "text": "Is it red?"}]}]
PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}{% endfor %}"
)


def test_templates_of_strings_and_of_parts(language, tmp_path):
    model = Language(str(language))
    assert model.render(TURN) == "<s>USER: Is it red? ASSISTANT:"
    model.tokenizer.chat_template = PARTS
    assert model.render(TURN) == "[Is it red?]"
    model.tokenizer.chat_template = "hello"
    with pytest.raises(InputError, match="does not take such a conversation"):
        model.render(TURN)
    model.tokenizer.chat_template = None
    model.tokenizer.save_pretrained(tmp_path)
    model.model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no chat template"):
        Language(str(tmp_path))


def test_a_prompt_gives_the_same_alone_and_in_a_batch(language):
    model = Language(str(language))
    texts = ["<s>USER: Is it red? ASSISTANT:", "<s>USER: What color is the star over there?"]
    together, lengths = model.generate(texts, max_new_tokens=5)
    assert lengths[0] < lengths[1]
    assert [model.replies(model.generate([t], max_new_tokens=5)[0])[0] for t in texts] == (
        model.replies(together)
    )
