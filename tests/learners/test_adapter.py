"""Adapters on disk, and what a user can get wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlm_prune.learners import WingsConfig, attach, detach, from_pretrained, save_pretrained
from vlm_prune.vlm.cache import CACHE
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import load

ROWS = [(1, 5), (0, 9)]


@pytest.mark.parametrize("options", [{"stride": 2}, {"router": "sum", "layers": (1,)}], ids=str)
def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_model(options, winged, prompts, tmp_path):
    model, inputs = winged(**options), prompts(ROWS)
    with torch.no_grad():
        expected = model(**inputs).logits
        save_pretrained(model, tmp_path)
        config = model.wings.config
        detach(model)
        from_pretrained(model, tmp_path)
        assert torch.equal(model(**inputs).logits, expected)
    assert model.wings.config == config
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as tensors:
        assert all(name.startswith("layers.") for name in tensors.keys())  # noqa: SIM118


def test_learners_work_on_the_embedded_model(prompts):
    model, processor = load("tiny")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Sort 3 1."}]}],
        add_generation_prompt=True,
    )
    from PIL import Image

    inputs = processor(text=[text], images=[Image.new("RGB", (336, 336))], return_tensors="pt")
    with torch.no_grad():
        base = model(**inputs).logits
        attach(model, WingsConfig())
        assert torch.equal(model(**inputs).logits, base)


def test_an_adapter_for_another_model_is_refused(winged, build, tmp_path):
    model = winged()
    save_pretrained(model, tmp_path)
    kind = model.config.text_config.model_type
    other = build({"llama": "qwen2", "qwen2": "qwen3", "qwen3": "llama"}[kind])
    with pytest.raises(InputError, match=f"adapter is for model_type {kind}.*the model is"):
        from_pretrained(other, tmp_path)
    assert getattr(other, "wings", None) is None


def test_a_damaged_adapter_is_refused(winged, tmp_path):
    model = winged()
    save_pretrained(model, tmp_path)
    detach(model)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    described["wings"]["rank"] = 5
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="do not fit its configuration"):
        from_pretrained(model, tmp_path)
    assert getattr(model, "wings", None) is None
    described["wings"]["rnak"] = 4
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="did you mean 'rank'"):
        from_pretrained(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot read a Wings adapter"):
        from_pretrained(model, tmp_path)
    with pytest.raises(InputError, match="cannot read a Wings adapter"):
        from_pretrained(model, tmp_path / "nothing")


VALUES = (
    None,
    -1,
    10**30,
    1.5,
    float("inf"),
    float("nan"),
    "text",
    "3",
    [],
    {},
    True,
    [0, 0],
    "\ud800",
)


@pytest.mark.parametrize("llava", ["llama"], indirect=True)
def test_no_option_of_another_kind_leaves_anything_but_one_line(winged, tmp_path):
    model = winged()
    save_pretrained(model, tmp_path)
    detach(model)
    path = tmp_path / "adapter_config.json"
    whole = json.loads(path.read_text())
    for part in (whole, whole["wings"], whole["base"]):
        for key in list(part):
            before = part[key]
            for value in VALUES:
                part[key] = value
                path.write_text(json.dumps(whole))
                try:
                    from_pretrained(model, tmp_path)
                    detach(model)
                    assert part is not whole["base"] and key not in (
                        "rank",
                        "max_positions",
                        "base",
                    )
                except InputError as error:
                    assert "\n" not in str(error), (key, value)
                assert getattr(model, "wings", None) is None
            part[key] = before


@pytest.mark.parametrize("llava", ["llama"], indirect=True)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[1]", b"[" * 100_000, b'{"a":' * 100_000, bytes(range(256)), (1 << 60).to_bytes(8, "little")],
    ids=["empty", "null", "list", "brackets", "objects", "bytes", "a header of 2^60 bytes"],
)  # fmt: skip
def test_files_of_other_contents_are_refused(name, content, winged, tmp_path):
    model = winged()
    save_pretrained(model, tmp_path)
    detach(model)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="cannot read a Wings adapter") as caught:
        from_pretrained(model, tmp_path)
    assert "\n" not in str(caught.value) and getattr(model, "wings", None) is None


@pytest.mark.parametrize("llava", ["llama"], indirect=True)
def test_weights_of_another_kind_are_refused(winged, tmp_path):
    model = winged()
    save_pretrained(model, tmp_path)
    detach(model)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    for name in ("layers.0.learners.visual.query.down.weight", "layers.1.router.weight"):
        weight = whole[name]
        for changed, message in (
            (weight * torch.nan, "has values that are not finite"),
            (weight / 0, "has values that are not finite"),
            (weight[:-1].clone(), "do not fit its configuration|which its weights are not for"),
            (torch.tensor(1.0), "do not fit its configuration|which its weights are not for"),
            (None, "do not fit its configuration"),
        ):
            rest = {n: t for n, t in whole.items() if n != name}
            save_file(rest if changed is None else rest | {name: changed}, path)
            with pytest.raises(InputError, match=message) as caught:
                from_pretrained(model, tmp_path)
            assert "\n" not in str(caught.value) and getattr(model, "wings", None) is None


def test_a_misspelled_adapter_is_not_looked_up_in_the_network(llava, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    for name in ("runs/one/wings", "wigns", "", "/nowhere"):
        with pytest.raises(InputError, match="there is no such folder; give one"):
            from_pretrained(llava, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0 is out of range"),
        ({"rank": 33}, "rank 33 is above the model's width; give 1 to 32"),
        ({"layers": (0, 3)}, r"layers \[3\] are outside the stack; give 0 to 2"),
        ({"layers": (-1,)}, "outside the stack"),
        ({"stride": 0}, "stride 0 is out of range; give 1 or more"),
        ({"stride": 4}, "a stride of 4 leaves none of 3 layers with learners"),
        ({"stride": 2, "layers": (1,)}, "give layers or a stride"),
        ({"router": "maen"}, "did you mean 'mean'"),
        ({"modalities": ("visaul",)}, "did you mean 'visual'"),
        ({"modalities": ()}, "each learner once"),
        ({"skip_text": -1}, "skip_text -1"),
    ],
    ids=str,
)
def test_wrong_options_say_what_would_be_right(options, message, llava):
    with pytest.raises(InputError, match=message) as caught:
        attach(llava, WingsConfig(**{"rank": 4, **options}))
    assert "\n" not in str(caught.value)
    assert not any("wings" in name for name, _ in llava.named_modules())
    assert not llava.model._forward_pre_hooks


def test_wrong_calls_say_what_would_be_right(winged, prompts):
    model, inputs = winged(max_positions=20), prompts(ROWS)
    with pytest.raises(InputError, match="26 tokens are more than the router's 20"):
        model(**inputs)
    with pytest.raises(InputError, match="has Wings already"):
        attach(model)
    with pytest.raises(InputError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    detach(model)
    with pytest.raises(InputError, match="no Wings"):
        detach(model)
    cache = model(**inputs, use_cache=True)[CACHE]
    attach(model, WingsConfig(rank=4))
    new = inputs["input_ids"][:, -1:]
    with pytest.raises(InputError, match="filled before Wings"):
        model(input_ids=new, **{CACHE: cache})
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        detach(model)
        attach(model, WingsConfig(rank=4))
        with pytest.raises(InputError, match="filled with other learners"):
            model(input_ids=new, **{CACHE: cache})
