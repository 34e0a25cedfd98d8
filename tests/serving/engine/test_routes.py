"""What is served besides: the unpruned model, embeddings chosen elsewhere, other types."""

import pytest
import torch
import transformers
from served_methods import served

from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.serving import image_embeds
from vlm_prune.vlm.serving.embeds import FAMILIES as BY_ROWS
from vlm_prune.vlm.serving.plugin import CLASSES
from vlm_prune.vlm.serving.selection import weight_of
from vlm_prune.vlm.tiny import checkpoint_path

SPLIT = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.parametrize("method", [None, pytest.param("none", marks=pytest.mark.slow)])
def test_without_settings_it_is_the_class_of_vllm(method, folders, pictures, prompts, start):
    engine = start(folders("llava"), method)
    assert type(engine.served).__name__ in CLASSES
    expected = [engine.reference(p, pictures, build("none"))[0] for p in prompts]
    assert engine.answers(prompts, pictures) == expected


@pytest.mark.parametrize("names", [["zoo"], pytest.param(None, marks=pytest.mark.slow)])
def test_the_embedded_model_answers_the_same(names, start):
    """With `zoo`, or with every method that is served."""
    engine = start(checkpoint_path(), "zoo", 64)
    samples = [TASKS[name].sample(i) for name in ("attribute", "exist", "count") for i in range(4)]
    prompts = [([n], sample.turns[-1].text) for n, sample in enumerate(samples)]
    pictures = [sample.images[0] for sample in samples]
    for name in names or served():
        engine.use(method=name, budget=64)
        pruner = build(name, budget=64)
        expected = [engine.reference(prompt, pictures, pruner)[0] for prompt in prompts]
        assert engine.answers(prompts, pictures) == expected, name


def test_settings_come_from_the_environment_too(folders, pictures, prompts, start, monkeypatch):
    monkeypatch.setenv("VLM_PRUNE", '{"method": "divprune", "budget": 5}')
    engine = start(folders("llava"), None)
    expected = engine.reference(prompts[0], pictures, build("divprune", budget=5))[0]
    assert engine.answers(prompts[:1], pictures) == [expected]


@pytest.mark.slow
def test_a_draft_model_drafts(folders, pictures, prompts, start, tmp_path):
    """Speculative decoding: the draft is a text model of another architecture, without images."""
    folder = folders("llava")
    target = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    transformers.LlamaForCausalLM(target.config.text_config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    draft = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 2}
    engine = start(folder, "zoo", 8, speculative_config=draft)
    expected = [engine.reference(p, pictures, build("zoo", budget=8))[0] for p in prompts]
    assert engine.answers(prompts, pictures) == expected


@pytest.mark.parametrize(
    "family", [BY_ROWS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in BY_ROWS[1:])]
)
def test_a_text_guided_method_over_embeddings(family, folders, pictures, prompts, start):
    """A server without the plug-in's settings, and rows that were chosen here."""
    engine = start(folders(family), None, enable_mm_embeds=True)
    pruner = build("cdpruner", budget=6)
    chosen = [prompts[0], prompts[2]]
    rows = image_embeds(
        engine.model, [[pictures[n] for n in numbers] for numbers, _ in chosen],
        [text for _, text in chosen], pruner, engine.processor,
    )  # fmt: skip
    expected = [engine.reference(prompt, pictures, pruner)[0] for prompt in chosen]
    assert engine.embedded_answers(chosen, rows) == expected


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl"])
def test_embeddings_are_left_whole_by_a_pruning_server(family, folders, pictures, prompts, start):
    engine = start(folders(family), "zoo", 8, enable_mm_embeds=True)
    if family == "qwen3_vl":
        rows = engine.unpruned_rows(prompts[0], pictures)
    else:
        whole = image_embeds(
            engine.model, [pictures[0]], [prompts[0][1]], build("none"), engine.processor
        )
        rows = whole
    expected = engine.reference(prompts[0], pictures, build("none"))[0]
    assert engine.embedded_answers([prompts[0]], rows) == [expected]
    pruned = engine.reference(prompts[1], pictures, build("zoo", budget=8))[0]
    assert engine.answers(prompts[1:2], pictures) == [pruned]


@pytest.mark.parametrize(
    "family",
    [
        "llava",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_5_vl", "qwen3_vl", "internvl")),
    ],
)
def test_weights_are_read_back_from_packed_layers(family, folders, pictures, prompts, start):
    """In bfloat16 vLLM packs weights for the processor and drops the originals."""
    engine = start(folders(family), "zoo", 8, dtype="bfloat16")
    names = {
        "qwen2_5_vl": ("visual.merger.mlp.0", "visual.merger.mlp.2"),
        "qwen3_vl": ("visual.merger.linear_fc1", "visual.merger.linear_fc2"),
    }.get(family, ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"))
    one, two = (engine.model.model.get_submodule(name) for name in names)
    row = torch.zeros(1, one.weight.shape[1], dtype=torch.bfloat16)
    weights = engine.served.projection.weights(row)
    for found, stored in (
        (weights.w1, one.weight), (weights.b1, one.bias),
        (weights.w2, two.weight), (weights.b2, two.bias),
    ):  # fmt: skip
        assert torch.equal(found, stored.to(torch.bfloat16))
    assert len(engine.answers(prompts, pictures)) == len(prompts)


def test_a_layer_of_torch_gives_its_own_weights():
    linear = torch.nn.Linear(3, 2)
    assert weight_of(linear) == (linear.weight, linear.bias)


@pytest.mark.parametrize(
    ("family", "method", "budget", "options", "message"),
    [
        ("llava", "zoo", 26, {}, "above the 25 tokens"),
        ("llava", "fastv", 8, {}, "inside the language model"),
        ("llava", "zoo", 8, SPLIT, "--pipeline-parallel-size"),
        ("qwen3_vl", "zoo", 8, {"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode"),
        ("qwen3_vl", "zoo", 8, {"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ("llava", "zoo", 8, {"model_impl": "transformers"}, "--model-impl"),
    ],
)
def test_an_engine_that_cannot_prune_so_does_not_start(
    family, method, budget, options, message, folders, start
):
    with pytest.raises((InputError, ValueError), match=message):
        start(folders(family), method, budget, **options)
