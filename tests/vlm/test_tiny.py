"""The packaged checkpoint: small, offline, a real LLaVA, and the same answer alone and in a batch."""

import time

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from vlm_prune.benchmarks.tasks import TASKS, VISUAL, Sample
from vlm_prune.vlm.tiny import checkpoint_path

Loaded = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    begin = time.perf_counter()
    processor = AutoProcessor.from_pretrained(checkpoint_path())
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint_path()).eval()
    print(f"loaded in {time.perf_counter() - begin:.1f} s")
    return model, processor


def _answers(loaded: Loaded, samples: list[Sample]) -> list[str]:
    model, processor = loaded
    prompts = [
        processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
        for sample in samples
    ]
    images = [image for sample in samples for image in sample.images]
    inputs = processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=8)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [str(text).strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def test_checkpoint_is_small_safetensors_and_nothing_else_holds_weights() -> None:
    files = {path.suffix for path in checkpoint_path().iterdir()}
    assert not files & {".bin", ".pt", ".pth", ".pkl"}
    weights = checkpoint_path() / "model.safetensors"
    assert weights.stat().st_size <= 24_000_000
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_architecture_is_that_of_llava_1_5(loaded: Loaded) -> None:
    model, processor = loaded
    config = model.config
    assert sum(parameter.numel() for parameter in model.parameters()) <= 12_000_000
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (336, 14)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.text_config.num_hidden_layers >= 6
    assert model.dtype == torch.float32
    assert processor.tokenizer.padding_side == "left"


def test_chat_template_writes_turns_images_and_the_generation_prompt(loaded: Loaded) -> None:
    messages = TASKS["iit"].sample(0, split="val").messages()
    text = loaded[1].apply_chat_template(messages, add_generation_prompt=True)
    assert text.startswith("<s>USER: ")
    assert text.endswith(" ASSISTANT:")
    assert text.count("USER:") == sum(message["role"] == "user" for message in messages)
    picture = TASKS["exist"].sample(0, split="val")
    text = loaded[1].apply_chat_template(picture.messages(), add_generation_prompt=True)
    assert text == f"<s>USER: <image>\n{picture.turns[0].text} ASSISTANT:"


def test_an_image_becomes_576_tokens(loaded: Loaded) -> None:
    model, processor = loaded
    sample = TASKS["ocr"].sample(0, split="val")
    prompt = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
    inputs = processor(text=prompt, images=list(sample.images), return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 576


def test_any_text_survives_the_tokenizer(loaded: Loaded) -> None:
    tokenizer = loaded[1].tokenizer
    text = "Zürich, 42 naïve 日本 emoji 🙂?"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_two_answers_in_a_batch_are_those_given_alone(loaded: Loaded) -> None:
    samples = [TASKS["choice"].sample(1, split="val"), TASKS["exist"].sample(2, split="val")]
    alone = [_answers(loaded, [sample])[0] for sample in samples]
    assert _answers(loaded, samples) == alone


def test_text_only_prompts_are_answered_and_end(loaded: Loaded) -> None:
    answer = _answers(loaded, [TASKS["text"].sample(0, split="val")])[0]
    assert answer
    assert "ASSISTANT" not in answer


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VISUAL, "text"])
def test_held_out_accuracy_beats_the_prior(loaded: Loaded, name: str) -> None:
    task = TASKS[name]
    samples = [task.sample(index, seed=1, split="test") for index in range(48)]
    given = [text for i in range(0, 48, 8) for text in _answers(loaded, samples[i : i + 8])]
    scores = [task.score(text, s.answer) for text, s in zip(given, samples, strict=True)]
    print(f"{name}: {sum(scores) / 48:.3f}")
    most_common = max(sum(s.answer == t.answer for s in samples) for t in samples)
    assert sum(scores) > most_common
