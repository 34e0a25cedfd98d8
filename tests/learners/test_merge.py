"""Merging a VLM with its language model, by value."""

import json
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, AutoProcessor

from vlm_prune.learners.merge import merge, merge_adapter, sweep
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import load

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
LANGUAGE = ("language_model", "lm_head")


def moved_by_one(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def language_of(model, vocabulary=None):
    """The text-only model of a LLaVA's configuration, its weights the LLaVA's own."""
    text = AutoModelForCausalLM.from_config(deepcopy(model.config.text_config)).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    if vocabulary is not None:
        text.resize_token_embeddings(vocabulary)
    return text


@pytest.fixture
def saved(checkpoint, tmp_path):
    """The checkpoint with one more in every weight, in bfloat16, and the base's language model."""
    tuned, processor = load(str(checkpoint), "cpu")
    base = language_of(tuned, len(processor.tokenizer) - 1)
    base.save_pretrained(tmp_path / "base")
    processor.tokenizer.save_pretrained(tmp_path / "base")
    moved_by_one(tuned).bfloat16().save_pretrained(tmp_path / "tuned")
    processor.save_pretrained(tmp_path / "tuned")
    return tmp_path


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("first_layer", [0, 1])
def test_merging_interpolates_the_language_model_from_a_layer_on(text_only, first_layer, build):
    untouched, tuned = build("qwen2"), moved_by_one(build("qwen2"))
    merge(language_of(untouched) if text_only else build("qwen2"), tuned, 0.25, first_layer)
    before = dict(untouched.named_parameters())
    for name, parameter in tuned.named_parameters():
        share = 0.25 if any(part in name for part in LANGUAGE) else 1
        if first_layer and ("layers.0." in name or "embed_tokens" in name):
            share = 1
        expected = torch.full_like(parameter, share)
        torch.testing.assert_close(parameter - before[name], expected)


def test_what_does_not_fit_is_refused(build):
    base, tuned = build("qwen2"), build("qwen2")
    with pytest.raises(InputError, match="merge a model with its own base"):
        merge(build("llama"), tuned, 0.5)
    with pytest.raises(InputError, match=r"alpha 1.5 is out of range; give 0"):
        merge(base, tuned, 1.5)
    with pytest.raises(InputError, match="layer 3 is out of range; give 0 to 2"):
        merge(base, tuned, 0.5, first_layer=3)


def test_a_sweep_leaves_a_checkpoint_for_each_alpha_in_the_tuned_models_type(saved, checkpoint):
    """Tokens that the base does not have keep their rows."""
    folders = sweep(str(saved / "base"), str(saved / "tuned"), saved / "merged", [0, 0.5])
    assert [folder.name for folder in folders] == ["alpha-0", "alpha-0.5"]
    base = load(str(checkpoint), "cpu")[0].lm_head.weight
    for folder, share in zip(folders, (0, 0.5), strict=True):
        model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        assert model.dtype == torch.bfloat16
        expected = (base + share).bfloat16()
        expected[-1] = (base[-1] + 1).bfloat16()
        torch.testing.assert_close(model.lm_head.weight, expected, atol=0.04, rtol=0.02)
        assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()


def test_another_vocabulary_is_refused(saved):
    file = saved / "base" / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    one, other = sorted(word for word in vocabulary if word.isalpha())[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(described))
    with pytest.raises(InputError, match=f"token '({one}|{other})' is number .* own base"):
        sweep(str(saved / "base"), str(saved / "tuned"), saved / "merged", [0.5])
    assert not list(saved.glob("merged/*"))


@pytest.mark.parametrize("alpha", [0.0, 0.75])
def test_an_adapter_of_the_text_only_model_is_added(alpha, build, tmp_path):
    vlm, ids = build("llama"), torch.randint(6, 64, (2, 9))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(language_of(vlm), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path)
    expected = language_of(vlm)
    for (name, ours), theirs in zip(
        expected.named_parameters(), adapted.merge_and_unload().parameters(), strict=True
    ):
        changed = "q_proj" in name or "down_proj" in name
        assert torch.equal(ours, theirs) != changed
        ours.data.lerp_(theirs.data, 1 - alpha)
    merge_adapter(str(tmp_path), vlm, alpha)
    assert {type(m).__module__.split(".")[0] for m in vlm.modules()} <= {"torch", "transformers"}
    with torch.no_grad():
        torch.testing.assert_close(vlm(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_sweep_writes_to_a_folder_of_its_own():
    for refused in (Path("/"), Path("")):
        with pytest.raises(InputError, match="no folder of its own"):
            sweep("nowhere", "nowhere", refused, [0.5])
