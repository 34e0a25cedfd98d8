"""Checkpoints whose weight names transformers and vLLM both read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.serving.export import export
from vlm_prune.vlm.stored_weights import TOWERS, rename_weights
from vlm_prune.vlm.tiny import checkpoint_path


def names_in(folder):
    names = []
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            names += list(weights.keys())
    return names


def shared(folder):
    tower = [name for name in names_in(folder) if "vision_tower." in name]
    return tower and all("vision_tower.vision_model." in name for name in tower)


def test_the_packaged_checkpoint_has_names_that_both_read():
    assert shared(checkpoint_path())


def test_every_family_comes_back_the_same(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "saved")
    tiny.processor.save_pretrained(tmp_path / "saved")
    export(str(tmp_path / "saved"), tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    if config["vision_config"]["model_type"] in TOWERS and tiny.name.startswith("llava"):
        assert shared(tmp_path / "exported")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported").state_dict()
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    assert (tmp_path / "exported" / "tokenizer.json").is_file()


def test_sharded_weights_and_their_index_are_renamed(llava, tmp_path):
    llava.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    assert rename_weights(tmp_path) > 0
    assert shared(tmp_path)
    assert rename_weights(tmp_path) == 0
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in llava.state_dict().items())


def test_weights_keep_their_type(llava, tmp_path):
    from transformers import AutoProcessor

    llava.save_pretrained(tmp_path / "saved")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path / "half")
    AutoProcessor.from_pretrained(checkpoint_path()).save_pretrained(tmp_path / "half")
    export(str(tmp_path / "half"), tmp_path / "exported")
    weights = load_file(tmp_path / "exported" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        export("tiny", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    for refused in (Path("/"), Path("")):
        with pytest.raises(InputError, match="no folder of its own"):
            export("nowhere", refused)


def test_the_packaged_checkpoint_holds_its_own_weights_alone():
    # vLLM reads every safetensors file of a folder without an index
    assert [file.name for file in checkpoint_path().glob("*.safetensors")] == ["model.safetensors"]
