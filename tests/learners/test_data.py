"""LLaVA-format data: what is taught, what is mixed in, what is refused."""

import json
import os
from io import BytesIO

import pytest
import torch
from PIL import Image

from vlm_prune.learners.data import (
    Conversations,
    Example,
    collate,
    encode,
    leave_out_too_long,
    order,
    read_llava,
)
from vlm_prune.learners.parquet import PackedImage
from vlm_prune.learners.train import data_digest
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.families import family_of


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


def entry(*texts, **more):
    turns = [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]
    return {"conversations": turns} | more


def written(folder, *entries):
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


def test_a_sample_above_the_limit_is_refused_or_left_out(processor_56, conversations):
    """It is never cut: what would be left may teach nothing."""
    layout = processor_56, processor_56.tokenizer.convert_tokens_to_ids("<image>"), 16
    examples = read_llava(conversations / "data.json", conversations)
    lengths = [len(encode(example, *layout, 2048)[0]) for example in examples]
    for limit in sorted({*lengths, *(length - 1 for length in lengths)}):
        left_out = []
        fitting = leave_out_too_long(examples, *layout, limit, left_out)
        assert fitting == [e for e, n in zip(examples, lengths, strict=True) if n <= limit]
        assert len(left_out) == len(examples) - len(fitting)
        for example, length in zip(examples, lengths, strict=True):
            if length <= limit:
                assert len(encode(example, *layout, limit)[0]) == length
                continue
            message = rf"data.json\[.*{length} tokens are above the limit of {limit}.*--skip-bad"
            with pytest.raises(InputError, match=message):
                encode(example, *layout, limit)
    with pytest.raises(InputError, match="above the limit"):
        leave_out_too_long(examples, *layout, max(lengths) - 1)


@pytest.mark.parametrize("image", [False, True])
def test_special_tokens_in_texts_are_text(image, processor_56, conversations, tmp_path):
    """A reply with the image token teaches its characters, and no image tokens."""
    tokenizer = processor_56.tokenizer
    token = tokenizer.convert_tokens_to_ids("<image>")
    first = "<image>\nWhat</s> is this?" if image else "What</s> is this?"
    more = {"image": "0.png"} if image else {}
    path = written(tmp_path, entry(first, "It is an <image> token</s>.", "Why?", "<image>", **more))
    (example,) = read_llava(path, conversations)
    ids, labels = encode(example, processor_56, token, 16, 2048)
    assert int((ids == token).sum()) == (16 if image else 0)
    assert not (labels == token).any()
    assert int((ids == tokenizer.eos_token_id).sum()) == 2  # where the template ends the replies
    taught = "".join(tokenizer.decode(ids[labels != -100]).split())
    assert taught == "Itisan<image>token</s>.</s><image></s>"
    question_text = "".join(tokenizer.decode(ids[labels == -100]).split())
    assert "What</s>isthis?" in question_text
    if image:
        row = Conversations([example], processor_56, token, 16, 2048)[0]
        assert row["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize("kind", ["video", "videos", "audio"])
def test_samples_that_show_something_else_are_named_or_left_out(kind, tmp_path):
    path = written(tmp_path, entry("a", "b", id="v", **{kind: "a.mp4"}), entry("c", "d"))
    with pytest.raises(InputError, match=rf"data.json\[0\] \(id 'v'\) has '{kind}'"):
        read_llava(path)
    left_out = []
    assert [example.turns for example in read_llava(path, left_out=left_out)] == [(("c", "d"),)]
    assert len(left_out) == 1 and kind in left_out[0]


def test_images_lie_in_their_folder_unless_the_user_says_more(conversations, tmp_path):
    outside = str(conversations / "0.png")
    (tmp_path / "link.png").symlink_to(outside)
    question_text = ("<image>\na", "b")
    for name in (outside, f"../{conversations.name}/0.png", "link.png"):
        path = written(tmp_path, entry(*question_text, image=name))
        with pytest.raises(InputError, match=r"data.json\[0\].* leads out of .*--allow-outside"):
            read_llava(path, tmp_path)
        if name != f"../{conversations.name}/0.png":
            (example,) = read_llava(path, DataRoot(tmp_path, allow_outside=True))
            assert example.images[0].is_file()
    for allow in (False, True):
        path = written(tmp_path, entry(*question_text, image="http://127.0.0.1:9/a.png"))
        with pytest.raises(InputError, match="nothing is downloaded"):
            read_llava(path, DataRoot(tmp_path, allow))


def test_an_image_that_the_processor_makes_too_large_is_named(processor_56, build, tmp_path):
    Image.new("RGB", (20_000, 1)).save(tmp_path / "thin.png")
    path = written(tmp_path, entry("<image>\na", "b", id="thin", image="thin.png"))
    family = family_of(build("llama"))
    layout = processor_56.tokenizer.convert_tokens_to_ids("<image>"), 16, 2048
    data = Conversations(read_llava(path, tmp_path), processor_56, *layout, family.check_size)
    with pytest.raises(
        InputError, match=r"\(id 'thin'\): an image of 20000 x 1 becomes 1120000 x 56"
    ):
        data[0]


def test_lines_end_where_json_lines_end(tmp_path):
    texts = ("a\u2028b\x85c", "d")
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\ufeff" + json.dumps(entry(*texts), ensure_ascii=False) + "\r\n\n", encoding="utf-8"
    )
    assert [example.turns for example in read_llava(path)] == [(texts,)]


def test_files_that_would_hang_or_overflow_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="no regular file"):
        read_llava(tmp_path / "pipe.json")
    for name in ("deep.json", "deep.jsonl"):
        (tmp_path / name).write_text("[" * 200_000)
        with pytest.raises(InputError, match=r"cannot read|is no JSON"):
            read_llava(tmp_path / name)
    with pytest.raises(InputError, match="no Unicode"):
        read_llava(written(tmp_path, entry("\ud800", "b")))


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
            "0 <image> placeholders for 1 images; the questions need one for each file",
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


def parquet_of(folder, target, packed=True, group=2):
    """The conversations of a folder in a Parquet file, pictures inside it, or named by it."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = json.loads((folder / "data.json").read_text())
    for row in rows:
        name = row.get("image")
        if name:
            stored = (folder / name).read_bytes() if packed else None
            row["image"] = {"bytes": stored, "path": name}
    parquet.write_table(pyarrow.Table.from_pylist(rows), target, row_group_size=group)
    return target


@pytest.mark.parametrize("packed", [True, False])
def test_parquet_holds_what_json_does(packed, processor_56, conversations, tmp_path):
    """Pictures inside the file, read out of order, or named by it."""
    path = parquet_of(conversations, tmp_path / "data.parquet", packed)
    listed = read_llava(conversations / "data.json", conversations)
    rows = read_llava(path, conversations)
    assert [row.turns for row in rows] == [example.turns for example in listed]
    assert any(isinstance(i, PackedImage) for row in rows for i in row.images) == packed
    assert data_digest(rows) == data_digest(listed)
    layout = processor_56.tokenizer.convert_tokens_to_ids("<image>"), 16, 2048
    ours, theirs = (Conversations(e, processor_56, *layout) for e in (rows, listed))
    for index in (10, 0, 5, 11, 1):
        assert ours[index].keys() == theirs[index].keys()
        assert all(torch.equal(ours[index][name], theirs[index][name]) for name in ours[index])


def test_parquet_of_several_pictures_and_of_none(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    png = BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    shown = [{"bytes": png.getvalue(), "path": None}] * 2
    rows = [
        {"id": 7, "images": shown, **entry("<image><image>\na", "b")},
        {"id": 8, "images": [], **entry("c", "d")},
        {"id": 9, "images": shown, **entry("<image>\na", "b")},
    ]
    path = tmp_path / "several.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    left_out = []
    two, none = read_llava(path, left_out=left_out)
    assert [image.size for image in two.opened()] == [(4, 4)] * 2
    assert none.images == () and "(id 9): 1 <image> placeholders for 2 images" in left_out[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot read .*moved\.parquet again"):
        PackedImage(tmp_path / "moved.parquet", "images", 0, 0).open()
    with pytest.raises(InputError, match=r"cannot read .*several\.parquet"):
        read_llava(path)
