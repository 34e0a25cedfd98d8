"""`eval --suite forgetting` over lmms-eval's tasks; the base is the VLM's own language model."""

import json

import pytest


@pytest.mark.slow
def test_a_text_model_is_asked_what_shows_no_image(run, checkpoint, language, data_root, tmp_path):
    code, _, err = run(
        "eval", "--suite", "forgetting", "--model", checkpoint, "--base", language,
        "--tasks", "pope,gsm8k,mmlu_anatomy,text", "--limit", "12", "--batch-size", "2",
        "--data-root", data_root, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert err == ("pope skipped by base LLM: it shows images, and this model reads text alone\n")
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["tasks"]) == ["gsm8k", "mmlu_anatomy", "text", "pope"]
    rows = {}
    for role in ("base", "vlm"):
        lines = (tmp_path / role / "samples.jsonl").read_text().splitlines()
        rows[role] = {row["id"]: row for row in map(json.loads, lines)}
    assert {row["task"] for row in rows["base"].values()} == {"gsm8k", "mmlu_anatomy", "text"}
    for name, row in rows["base"].items():
        assert row["prediction"] == rows["vlm"][name]["prediction"]
        assert row["score"] == rows["vlm"][name]["score"]
    assert len({row["prediction"] for row in rows["base"].values()}) > 2
    assert results["text"]["differences"]["vlm - base"] == {"accuracy": 0.0, "ci": [0.0, 0.0]}
    assert results["tasks"]["pope"]["differences"] == {}
