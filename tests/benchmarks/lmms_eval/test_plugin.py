"""The plug-in as lmms-eval finds and drives it."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlm_prune.benchmarks.lmms_eval.catalog import TASK_FOLDER
from vlm_prune.benchmarks.lmms_eval.model import PrunedChat, PrunedSimple
from vlm_prune.vlm.common.errors import InputError


@pytest.fixture(scope="module")
def lm(checkpoint):
    model = PrunedChat(str(checkpoint), "zoo", 16, batch_size=2, device="cpu")
    model.keep_loaded = True
    return model


def test_the_entry_point_names_the_model_without_torch():
    code = (
        "import sys; from importlib.metadata import entry_points;"
        "from vlm_prune.benchmarks.lmms_eval import manifests;"
        "points = entry_points(group='lmms_eval.models');"
        "print('torch' in sys.modules, points['vlm_prune'].load() is manifests)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/"
    )
    assert out.stdout.split() == ["False", "True"]


def test_lmms_eval_finds_both_modes():
    from lmms_eval.models import MODEL_REGISTRY_V2

    assert MODEL_REGISTRY_V2.get_model_class("vlm_prune") is PrunedChat
    assert MODEL_REGISTRY_V2.get_model_class("vlm_prune", force_simple=True) is PrunedSimple


@pytest.mark.slow
def test_lmms_eval_s_own_command(checkpoint, tmp_path):
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "vlm_prune", "--model_args",
        f"pretrained={checkpoint},method=zoo,budget=16", "--tasks", "vlm_prune_exist",
        "--include_path", TASK_FOLDER, "--limit", "2", "--batch_size", "2", "--device", "cpu",
        "--output_path", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("*results.json")
    results = json.loads(file.read_text())
    assert 0 <= results["results"]["vlm_prune_exist"]["exact_match,none"] <= 1
    assert results["throughput"]["avg_kept_visual_tokens"] == 16


def simple(lm, kind, *arguments, doc=0):
    metadata = {"task": "boxes", "doc_id": doc, "repeats": 1}
    return Instance(kind, (*arguments, doc, "boxes", "test"), 0, metadata)


@pytest.fixture
def boxes(lm, images):
    lm.task_dict["boxes"] = {"test": [{"image": image} for image in images]}
    return lambda doc: [doc["image"]]


CHOICES = [" red", " yes", " Is there a 7?", " What color is the star? yes"]


def test_loglikelihood_is_that_of_a_full_forward(lm, boxes, images):
    lm.pruner, pruner = None, lm.pruner
    requests = [simple(lm, "loglikelihood", "What?", choice, boxes) for choice in CHOICES]
    scored = [result.text for result in lm.loglikelihood(requests)]
    lm.pruner = pruner
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    prompt = lm.processor.apply_chat_template([message], add_generation_prompt=True)
    for choice, (nll, greedy) in zip(CHOICES, scored, strict=True):
        whole = lm.processor(text=[prompt + choice], images=images[:1], return_tensors="pt")
        length = len(lm.processor.tokenizer(choice, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            logits = lm.model(**whole).logits[0, -length - 1 : -1].double()
        wanted = whole["input_ids"][0, -length:]
        expected = -logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
        assert math.isclose(nll, float(expected), rel_tol=1e-4)
        assert greedy == bool((logits.argmax(-1) == wanted).all())


def test_what_is_scored_cannot_steer_the_pruning(lm, boxes):
    """Each choice's tokens are those of the prompt alone, in any batch."""
    requests = [simple(lm, "loglikelihood", "What?", choice, boxes) for choice in CHOICES]
    together = [result.text[0] for result in lm.loglikelihood(requests)]
    alone = [lm.loglikelihood([one])[0].text[0] for one in requests]
    assert together == pytest.approx(alone, rel=1e-4)
    longer = [simple(lm, "loglikelihood", "What?", " red" + choice, boxes) for choice in CHOICES]
    first = lm.loglikelihood(requests[:1])[0].text[0]
    assert all(result.text[0] > first for result in lm.loglikelihood(longer))


def test_a_text_alone_is_scored_and_answered(lm):
    metadata = {"task": "boxes", "doc_id": 0, "repeats": 1}
    (scored,) = lm.loglikelihood([Instance("loglikelihood", ("", " red"), 0, metadata)])
    assert scored.text[0] > 0
    lm.task_dict["boxes"] = {"test": [{}]}
    request = simple(lm, "generate_until", "Is there a 7?", {"max_new_tokens": 3}, None)
    (answer,) = lm.generate_until([request])
    assert answer.token_counts.output_tokens <= 3


def test_multiple_choice_in_simple_mode(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"query": f"Is {n} odd?", "label": n % 2, "options": ["no", "yes"]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "odd",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "label",
        "doc_to_choice": "options",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "odd.yaml").write_text(json.dumps(config))  # JSON is YAML
    results = simple_evaluate(
        "vlm_prune", f"pretrained={checkpoint},method=zoo,budget=16", tasks=["odd"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=4, device="cpu", bootstrap_iters=0, force_simple=True,
    )  # fmt: skip
    for sample in results["samples"]["odd"]:
        (no, _), (yes, _) = sample["filtered_resps"]
        assert no > 0 and yes > 0
        assert sample["acc"] == float((yes < no) == bool(sample["target"]))


def talk(doc, round_idx=None, previous_output=None, previous_round_info=None):
    def turn(text):
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    if round_idx is None:
        return turn("Is there a 7?")
    return turn(f"{previous_output[-1]}?"), round_idx >= 3, None, None


def test_multi_round(lm, boxes):
    options = {"max_new_tokens": 4}
    kind = "generate_until_multi_round"
    chat = [simple(lm, kind, "", talk, options, doc=number) for number in (0, 1, 2)]

    def text(doc, round_idx, previous_output, previous_round_info):
        return boxes(doc), f"{previous_output[-1]}?", round_idx >= 3, None, None

    plain = [simple(lm, kind, "Is there a 7?", options, boxes, text, doc=n) for n in (0, 1, 2)]
    answers = lm.generate_until_multi_round(chat)
    assert [len(rounds) for rounds in answers] == [3, 3, 3]
    assert answers == lm.generate_until_multi_round(plain)
    once = [simple(lm, "generate_until", "Is there a 7?", options, boxes)]
    assert lm.generate_until(once)[0].text == answers[0][0]


def test_a_task_s_own_image_marker_is_text(lm, boxes):
    options = {"max_new_tokens": 3}
    requests = [
        simple(lm, "generate_until", f"{mark}What?", options, boxes) for mark in ("<image>", "")
    ]
    marked, plain = lm.generate_until(requests)
    characters = lm.processor.tokenizer("<image>", split_special_tokens=True)["input_ids"]
    more = marked.token_counts.input_tokens - plain.token_counts.input_tokens
    assert 0 < more <= len(characters)
    scored = [
        simple(lm, "loglikelihood", "What?", choice, boxes) for choice in (" a", " <image></s>")
    ]
    plain, marked = lm.loglikelihood(scored)
    assert marked.token_counts.output_tokens > 2 + plain.token_counts.output_tokens
    assert math.isfinite(marked.text[0])


PARAGRAPHS = " First I count the cars.\n\nThe answer is 5.\nASSISTANT: 6 "


@pytest.fixture
def says(monkeypatch):
    """Whatever a model generates, its text is `PARAGRAPHS`."""

    def decoded(self, sequences, *_, **__):
        return [PARAGRAPHS] * len(sequences)

    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_decode", decoded)


@pytest.mark.parametrize("stops", [None, "\n\n", ["\n\n"], ["ASSISTANT:"], ["\n", "ASSISTANT:"]])
def test_replies_are_those_of_lmms_eval_s_own_class(
    lm, boxes, checkpoint, says, stops, monkeypatch
):
    """Its LLaVA class in chat mode; its others there do the same, whatever a task's stops are."""
    monkeypatch.setitem(sys.modules, "decord", SimpleNamespace(VideoReader=None, cpu=None))
    from lmms_eval.models.chat.llava_hf import LlavaHf

    theirs = LlavaHf(str(checkpoint), device="cpu", dtype="float32", device_map="cpu")

    def messages(doc):
        shown = [{"type": "image", "url": image} for image in boxes(doc)]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": "How many?"}]}]

    options = {"max_new_tokens": 3} | ({} if stops is None else {"until": stops})
    found = []
    for model in (lm, theirs):
        model.task_dict = lm.task_dict
        requests = [simple(model, "generate_until", "How many?", messages, dict(options))]
        found.append(model.generate_until(requests)[0].text)
    assert found == [PARAGRAPHS, PARAGRAPHS]


def test_in_simple_mode_a_named_stop_ends_a_reply_and_a_blank_line_does_not(
    lm, boxes, says, monkeypatch
):
    monkeypatch.setattr(lm, "is_simple", True)
    for stops, reply in (
        (None, PARAGRAPHS),
        (["\n\n"], PARAGRAPHS),
        (["\n\n", "ASSISTANT:"], PARAGRAPHS.split("ASSISTANT:")[0]),
    ):
        options = {"max_new_tokens": 3} | ({} if stops is None else {"until": stops})
        requests = [simple(lm, "generate_until", "How many?", options, boxes)]
        assert lm.generate_until(requests)[0].text == reply


def test_generation_arguments(lm, boxes):
    whole, beams = (
        simple(lm, "generate_until", "What?", {"max_new_tokens": 8, "temperature": 0} | more, boxes)
        for more in ({}, {"num_beams": 2, "image_aspect_ratio": "original"})
    )
    reply = lm.generate_until([whole])[0].text
    assert lm.generate_until([beams])[0].text
    sampled = simple(
        lm, "generate_until", "What?", {"max_new_tokens": 8, "temperature": 5.0}, boxes
    )
    torch.manual_seed(0)
    assert lm.generate_until([sampled])[0].text != reply


@pytest.mark.parametrize("size", ["auto", "auto:4", "0", -1, "1.5", "", "²"])
def test_batch_sizes_that_are_no_number_of_questions(checkpoint, size):
    with pytest.raises(
        InputError, match=r"batch_size .* is not a number of questions; give 1 or 8"
    ):
        PrunedChat(str(checkpoint), batch_size=size, device="cpu")


def test_videos_are_refused(lm):
    def messages(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    lm.task_dict["boxes"] = {"test": [{}]}
    with pytest.raises(InputError, match="videos"):
        lm.generate_until([simple(lm, "generate_until", "", messages, {})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "zo"}, "did you mean 'zoo'"),
        ({"budget": 5000}, "above the 576"),
        ({"steps": 3}, "steps"),
        ({"batch_size": "auto"}, "number of questions"),
    ],
)
def test_wrong_arguments(checkpoint, arguments, message):
    with pytest.raises(InputError, match=message):
        PrunedChat(str(checkpoint), device="cpu", **arguments)


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_a_picture_that_would_become_too_large_is_refused_before_the_processor(lm, kind):
    """lmms-eval's own command opens images itself; the model looks at their size in any case."""
    lm.task_dict["boxes"] = {"test": [{"image": Image.new("RGB", (10_000, 1))}]}
    given = {"generate_until": ({},), "loglikelihood": (" red",)}[kind]
    ask = simple(lm, kind, "What?", *given, lambda doc: [doc["image"]])
    with (
        mock.patch.object(lm.processor.image_processor, "preprocess") as preprocess,
        pytest.raises(InputError, match="above 16 million pixels; crop it"),
    ):
        getattr(lm, kind)([ask])
    assert not preprocess.called
