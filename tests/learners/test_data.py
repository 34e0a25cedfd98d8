"""LLaVA-format data: what is taught, what is mixed in, what is refused."""

import json

import pytest
import torch

from vlm_prune.learners.data import Conversations, Example, collate, encode, order, read_llava
from vlm_prune.vlm.common.errors import InputError


def test_only_the_assistants_turns_are_taught(processor_56, conversations):
    tokenizer = processor_56.tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    example = read_llava(conversations / "data.json", conversations)[2]
    ids, labels = encode(example, processor_56, image, 16, 2048)
    assert int((ids == image).sum()) == 16
    taught = labels != -100
    assert torch.equal(ids[taught], labels[taught])
    assert tokenizer.decode(ids[taught]) == " yes</s> red</s>"
    prompt = processor_56.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a 7?"}]}],
        add_generation_prompt=True,
    )  # fmt: skip
    at_inference = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    shortened = [int(t) for n, t in enumerate(ids) if t != image or ids[n - 1] != image]
    assert shortened[: len(at_inference)] == at_inference


def test_a_batch_pads_what_no_one_sees(processor_56, conversations):
    examples = read_llava(conversations / "data.json", conversations)[:3]
    image = processor_56.tokenizer.convert_tokens_to_ids("<image>")
    data = Conversations(examples, processor_56, image, 16, 2048)
    rows = [data[n] for n in range(3)]
    batch = collate(rows)
    assert batch["pixel_values"].shape == (2, 3, 56, 56)
    for n, row in enumerate(rows):
        valid = batch["attention_mask"][n].bool()
        assert torch.equal(batch["input_ids"][n, valid], row["input_ids"])
        assert (batch["labels"][n, ~valid] == -100).all()
    assert "pixel_values" not in collate(rows[1:2])


@pytest.mark.parametrize(("ratio", "text"), [(0, 0), (0.2, 2), (0.5, 8), (0.8, 32), (None, 3)])
def test_text_is_mixed_in_at_any_ratio(ratio, text):
    has_image = [True] * 8 + [False] * 3
    drawn = order(has_image, ratio, epochs=2, seed=0)
    for epoch in (drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]):
        assert sorted(n for n in epoch if has_image[n]) == list(range(8))
        assert sum(not has_image[n] for n in epoch) == text
        counts = [epoch.count(n) for n in (8, 9, 10)]
        assert max(counts) - min(counts) <= 1
    assert drawn == order(has_image, ratio, epochs=2, seed=0)
    assert drawn != order(has_image, ratio, epochs=2, seed=1)


def test_a_ratio_of_one_is_text_alone():
    assert sorted(order([True, False, False], 1, 1, 0)) == [1, 2]


def test_ratios_that_cannot_be():
    with pytest.raises(InputError, match="give 0 to 1"):
        order([True, False], 1.5, 1, 0)
    with pytest.raises(InputError, match="needs samples without an image"):
        order([True], 0.5, 1, 0)
    with pytest.raises(InputError, match="nothing to train on"):
        order([False], 0, 1, 0)


def test_an_image_is_never_cut(processor_56, conversations):
    image = processor_56.tokenizer.convert_tokens_to_ids("<image>")
    example = read_llava(conversations / "data.json", conversations)[0]
    ids, _ = encode(example, processor_56, image, 16, 26)
    assert len(ids) == 26
    with pytest.raises(InputError, match="do not fit into 12 tokens"):
        encode(example, processor_56, image, 16, 12)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "a.png"}, "needs 'conversations'"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "must alternate"),
        (
            {
                "image": "a.png",
                "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
            },
            "0 <image> placeholders for 1 images",
        ),
    ],
)
def test_entries_in_another_format_are_named(entry, message, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    with pytest.raises(InputError, match=message) as caught:
        read_llava(tmp_path / "data.json")
    assert "data.json[0]" in str(caught.value)


def test_files_that_are_no_data(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_llava(tmp_path / "data.json")
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(InputError, match="must hold a JSON list"):
        read_llava(tmp_path / "data.json")


def test_a_template_that_rewrites_its_prompt_is_refused(processor_56, monkeypatch):
    monkeypatch.setattr(
        processor_56, "apply_chat_template", lambda chat, **more: f"{len(chat)}{more}"
    )
    with pytest.raises(InputError, match="chat template"):
        encode(Example("x", (), (("a", "b"),)), processor_56, 5, 16, 64)


CHAT = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", r"data.jsonl:2 is no JSON"),
        ('"text"', r"data.jsonl:2 needs 'conversations'"),
        (json.dumps({"id": "a7", "conversations": []}), r"data.jsonl:2 \(id 'a7'\): turns must"),
        (json.dumps({"id": 7, "conversations": CHAT, "image": [3]}), "'image' must be a file name"),
        (
            json.dumps({"id": 7, "conversations": [CHAT[0], {"from": "gpt", "value": None}]}),
            r"\(id 7\): every 'value' must be a text",
        ),
        (
            json.dumps({"conversations": [{"from": "human", "value": "<image> x"}, CHAT[1]]}),
            "1 <image> placeholders for 0 images",
        ),
        (
            json.dumps(
                {
                    "id": "b",
                    "image": "gone.png",
                    "conversations": [{"from": "human", "value": "<image> x"}, CHAT[1]],
                }
            ),
            r"\(id 'b'\): there is no image file .*gone.png",
        ),
    ],
)
def test_a_line_that_is_no_conversation_is_named(line, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": CHAT}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        read_llava(path, tmp_path)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps({"conversations": CHAT}) + "\n\n")
    assert [example.turns for example in read_llava(path)] == [(("x", "y"),)]
