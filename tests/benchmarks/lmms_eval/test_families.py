"""The plug-in on the model families, most of which take images of any size."""

import json

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from vlm_prune.benchmarks.evaluation.records import PromptRecord
from vlm_prune.benchmarks.lmms_eval.catalog import TASK_FOLDER
from vlm_prune.benchmarks.lmms_eval.chat import user_turn
from vlm_prune.benchmarks.lmms_eval.model import Ask, PrunedChat
from vlm_prune.vlm.families import FAMILIES

NAMES = ["exist", "text", "iit"]
FEW = ["llava", "qwen3_vl"]
EVERY = [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in FEW)]


@pytest.mark.parametrize("tiny", EVERY, indirect=True)
def test_both_roads_give_the_same_accuracy(run, tiny, folder, tmp_path):
    tasks = [f"vlm_prune_{name}" for name in NAMES]
    found = simple_evaluate(
        "vlm_prune", f"pretrained={folder},method=divprune,budget=6", batch_size=3, tasks=tasks,
        task_manager=TaskManager(include_path=str(TASK_FOLDER), include_defaults=False), limit=4,
        device="cpu", bootstrap_iters=0,
    )  # fmt: skip
    code, _, err = run(
        "eval", "--model", folder, "--method", "divprune", "--budget", "6", "--tasks",
        ",".join(NAMES), "--limit", "12", "--batch-size", "3", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    ours = json.loads((tmp_path / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    said = {row["id"]: row["prediction"] for row in rows}
    assert len(set(said.values())) > 1
    for name, task in zip(NAMES, tasks, strict=True):
        assert found["results"][task]["exact_match,none"] == ours["tasks"][name]["accuracy"]
        for sample in found["samples"][task]:
            (reply,) = sample["filtered_resps"]
            assert reply.strip() == said[f"{name}/{sample['doc_id']:06d}"]
    (full,) = {tokens for row in rows for tokens in row["image_tokens"]}
    throughput = found["throughput"]
    assert throughput["avg_visual_tokens"] == full > 6
    for counted in ("kept", "layer", "papers"):
        assert throughput[f"avg_{counted}_visual_tokens"] == 6
    assert 0 < throughput["avg_tower_share"] < 1
    assert throughput["avg_prefill_ms"] > 0 and throughput["avg_selection_ms"] > 0
    assert found["efficiency"]["overall"]["docs_with_token_counts"] == len(rows) == 12


@pytest.mark.parametrize("tiny", FEW[1:], indirect=True)
@pytest.mark.parametrize("method", ["divprune", "adaptinfer"])
def test_a_batch_of_several_sizes_equals_its_questions_alone(tiny, folder, method):
    """Answered, by beam search too, which repeats a question's images, and scored."""
    lm = PrunedChat(str(folder), method, 0.5, batch_size=4, device="cpu")
    lm.keep_loaded = True
    answer = {"max_new_tokens": 4, "do_sample": False}
    for options, forced in ((answer, None), (answer | {"num_beams": 2}, None), ({}, " yes")):
        asks = [
            Ask(
                f"boxes/{number}", user_turn([tiny.pictures[p] for p in shown], "Is it red?"),
                options, forced=forced,
            )
            for number, shown in enumerate(([0], [1, 2], [], [2]))
        ]  # fmt: skip
        together = lm._rows(asks)
        for row, ask in zip(together, asks, strict=True):
            (alone,) = lm._rows([ask])
            for key in ("reply", "output_tokens", *PromptRecord.__struct_fields__):
                assert getattr(row, key) == getattr(alone, key), key
            assert (row.nll or 0.0) == pytest.approx(alone.nll or 0.0, rel=1e-4)
            for whole, kept in zip(row.image_tokens, row.kept, strict=True):
                assert len(kept) <= whole / 2 + 1
