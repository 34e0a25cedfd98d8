"""CLIPs from folders that strangers made: no code runs, and damage is said in one line."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_prune.continual.clip import load_clip
from vlm_prune.vlm.common.errors import InputError

OPEN_CLIP = "open_clip_config.json"


@pytest.fixture
def folder(clip, word_tokenizer, tmp_path):
    """An open_clip folder with a tokenizer of its own."""
    clip.config["text_cfg"]["hf_tokenizer_name"] = "tokenizer.json"
    clip.save(tmp_path / "clip")
    word_tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def change(folder, name, edit):
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    edit(content)
    path.write_text(json.dumps(content))


def refused(folder):
    with pytest.raises(InputError) as caught:
        load_clip(str(folder))
    line = str(caught.value)
    assert "\n" not in line and line.startswith("cannot load CLIP")
    return line


def text(**values):
    return lambda content: content["model_cfg"]["text_cfg"].update(values)


def vision(**values):
    return lambda content: content["model_cfg"]["vision_cfg"].update(values)


MAP = {"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"], "AutoConfig": "evil.Slow"}}
CODE = {
    "options of the tokenizer": [(OPEN_CLIP, text(tokenizer_kwargs={"trust_remote_code": True}))],
    "another tokenizer": [(OPEN_CLIP, text(tokenizer_kwargs={"tokenizer_type": "bert"}))],
    "vocabulary elsewhere": [(OPEN_CLIP, text(tokenizer_kwargs={"bpe_path": "/etc/passwd"}))],
    "text tower of another checkpoint": [(OPEN_CLIP, text(hf_model_name="."))],
    "vision tower of another checkpoint": [
        (OPEN_CLIP, vision(timm_model_name="hf-hub:evil/model"))
    ],
    "vision tower of a folder": [(OPEN_CLIP, vision(timm_model_name="local-dir:."))],
    "nothing else": [],
}
REFUSED = {
    "another tokenizer": "tokenizer_kwargs has 'tokenizer_type'; only clean, strip_sep_token",
    "vocabulary elsewhere": "tokenizer_kwargs has 'bpe_path'",
    "text tower of another checkpoint": "text_cfg has hf_model_name",
    "vision tower of another checkpoint": "timm has no model 'hf-hub:evil/model'",
    "vision tower of a folder": "timm has no model 'local-dir:.'",
}  # fmt: skip


@pytest.fixture
def trapped(folder, tmp_path, monkeypatch):
    """The folder with code that its tokenizer asks for, and the marker that this code would leave."""
    marker = tmp_path / "marker"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\nclass Slow: pass\nFast = Slow\n"
    (folder / "evil.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: marker.write_text("asked") and "y")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    monkeypatch.chdir(folder)
    change(
        folder, "tokenizer_config.json", lambda c: c.update(MAP, tokenizer_class="EvilTokenizer")
    )
    change(folder, "special_tokens_map.json", lambda c: c.update(MAP))
    return folder, marker


@pytest.mark.parametrize("case", CODE)
def test_no_code_of_an_open_clip_folder_runs(case, trapped):
    folder, marker = trapped
    for name, edit in CODE[case]:
        change(folder, name, edit)
    try:
        load_clip(str(folder))
    except InputError as error:
        assert "\n" not in str(error)
    assert not marker.exists()


def test_the_same_code_runs_under_open_clip_alone(trapped):
    folder, marker = trapped
    change(folder, OPEN_CLIP, text(tokenizer_kwargs={"trust_remote_code": True}))
    with pytest.raises(AttributeError):  # Fast is no tokenizer
        open_clip.get_tokenizer(f"local-dir:{folder}")
    assert marker.read_text() == "ran"


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_lead_elsewhere_are_refused_by_name(case, folder):
    ((name, edit),) = CODE[case]
    change(folder, name, edit)
    assert REFUSED[case] in refused(folder)


def test_options_that_only_clean_texts_reach_the_tokenizer(folder):
    change(folder, OPEN_CLIP, text(tokenizer_kwargs={"clean": "lower"}))
    tokens = load_clip(str(folder)).tokenize(["A RED disc.", "a red disc."])
    assert torch.equal(tokens[0], tokens[1])


def test_damaged_weights_are_refused(any_clip, tmp_path):
    folder = tmp_path / "clip"
    any_clip.save(folder)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    name = max(weights, key=lambda name: weights[name].numel())
    broken = weights[name].clone()
    broken.view(-1)[3] = torch.nan
    for changed, message in (
        (
            {n: t for n, t in weights.items() if n != name},
            "the weights lack tensors of the configuration (1, first",
        ),
        (weights | {"extra": torch.ones(2)}, "which the configuration does not describe (1, first"),
        (weights | {name: broken}, "values that are not finite"),
        (weights | {name: weights[name][:-1].contiguous()}, "where the configuration describes"),
    ):
        save_file(changed, path, {"format": "pt"})
        assert message in refused(folder)
    for content in (b"", b"x" * 100, (1 << 60).to_bytes(8, "little")):
        path.write_bytes(content)
        refused(folder)
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    path.unlink()
    assert "model.safetensors" in refused(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (vision(layers=1), "which the configuration does not describe"),
        (text(layers=3), "the weights lack"),
        (vision(layers=10**9), "1000000000 layers, but the weights are"),
        (vision(width=10**7), "where the configuration describes"),
        (vision(image_size=64), "where the configuration describes"),
        (text(vocab_size=10**12), "where the configuration describes"),
        (text(tokenizer_kwargs=[1]), "only clean, strip_sep_token are passed on"),
        (vision(layers="two"), "cannot load"),
        (vision(nonsense=1), "nonsense"),
        (lambda c: c.update(model_cfg=None), "describes no model"),
        (lambda c: c["model_cfg"].update(vision_cfg=[]), "describes no model"),
        (lambda c: c["preprocess_cfg"].update(std=[0, 1, 1]), "std"),
        (lambda c: c["preprocess_cfg"].update(mean="no"), "mean"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(edit, message, folder):
    change(folder, OPEN_CLIP, edit)
    assert message in refused(folder)


@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b"\xff\xfe"])
def test_settings_that_are_no_object_are_refused(content, folder):
    (folder / OPEN_CLIP).write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("any_clip", ["hugging face"], indirect=True)
def test_a_hugging_face_clip_of_another_kind_is_refused(any_clip, tmp_path):
    folder = tmp_path / "clip"
    any_clip.save(folder)
    change(folder, "config.json", lambda c: c.update(model_type="align"))
    assert "its model type is 'align'; give a CLIP" in refused(folder)
    change(folder, "config.json", lambda c: c.update(model_type="clip"))
    change(
        folder, "processor_config.json", lambda c: c["image_processor"].update(image_std=[0, 0, 0])
    )
    assert "image_std" in refused(folder)


def test_a_misspelled_name_is_told_its_neighbor():
    assert "did you mean 'ViT-B-16'?" in refused("ViT-B-61")
    assert "did you mean 'tiny'?" in refused("tinny")
