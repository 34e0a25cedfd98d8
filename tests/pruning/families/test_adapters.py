"""What each adapter says about its tower and projector, against the model itself."""

import sys
from contextlib import contextmanager
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
import transformers as hf
from tiny_families import Tiny
from torch.nn.functional import avg_pool2d
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipConfig

from vlm_prune.pruning import DivPrune, FastV, NoPruning, Random
from vlm_prune.pruning.pipeline import PrunedVLM
from vlm_prune.pruning.received import in_tower
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import FAMILIES, base, family_of, qwen2_5_vl
from vlm_prune.vlm.load import load


def test_runs_of_image_tokens_are_numbered_in_each_row():
    is_image = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1]]).bool()
    expected = torch.tensor([[-1, 0, 0, -1, 1, -1], [0, -1, -1, 1, 1, 1]])
    for length in (6, 3):
        assert torch.equal(base.image_blocks(is_image, length), expected[:, -length:])


def skip_refused(tiny, pruner):
    if pruner is not None and pruner.needs & family_of(tiny.model).lacks:
        pytest.skip("refused on this family")


def encode(tiny, rows):
    inputs = tiny.inputs(rows)
    return inputs, tiny.encode(inputs)


def test_features_projected_are_what_the_language_model_gets(tiny):
    inputs, images = encode(tiny, [[([0], "red?")], [([1, 2], "blue?")]])
    family, seen = family_of(tiny.model), []
    hook = family.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        tiny.model(**inputs)
    hook.remove()
    is_image = inputs["input_ids"] == family.image_token
    torch.testing.assert_close(torch.cat(images.projected), seen[0][is_image])
    for group in images.groups:
        tokens = group.tokens
        assert group.size == sum(rows * columns for rows, columns in tokens.grids)
        if (4, 4) not in tokens.grids or tiny.name != "llava_onevision":  # shrunk behind it
            torch.testing.assert_close(tokens.projector(tokens.features), tokens.projected)


@contextmanager
def nothing_seen(*modules):
    """Stands in for `outputs_of` where modules run without their hooks."""
    yield [None] * len(modules)


@pytest.mark.parametrize("hooks", ["run", "are not run"])
def test_attention_received_is_that_of_the_towers_maps(hooks, tiny, monkeypatch):
    """In an image's first tile; a token of several patches takes their mean."""
    if hooks != "run":
        for family_module in (base, qwen2_5_vl):
            monkeypatch.setattr(family_module, "outputs_of", nothing_seen)
    last = -2 if tiny.name in ("llava", "llava_next", "llava_next_video") else -1
    layer = family_of(tiny.model).tower_layers[last]
    attention = next(
        getattr(layer, n) for n in ("self_attn", "attention", "attn") if hasattr(layer, n)
    )
    module, maps = sys.modules[type(attention).__module__], []

    def record(owner, *args, eager=module.eager_attention_forward, **kwargs):
        out = eager(owner, *args, **kwargs)
        if owner is attention:
            maps.append(out[1])
        return out

    monkeypatch.setattr(module, "eager_attention_forward", record)
    tiny.model.set_attn_implementation("eager")
    try:
        _, images = encode(tiny, [[([0], "red?")]])
    finally:
        tiny.model.set_attn_implementation("sdpa")
    (group,) = images.groups
    rows, columns = group.tokens.grids[0]
    ours = in_tower(group.tokens, "all")[0, : rows * columns]
    patches = maps[0][0].mean((0, 1))[int(group.tokens.has_cls) :]
    if family_of(
        tiny.model
    ).mrope:  # four patches follow one another, tokens in the order of windows
        assert len(ours) * 4 == len(patches)
        theirs = patches.view(-1, 4).mean(1)
        ours, theirs = ours.sort().values, theirs.sort().values
    elif tiny.name == "gemma4":  # padded on the right
        side = family_of(tiny.model).side
        count = len(ours) * side**2
        grid = maps[0][0, :, :count, :count].mean((0, 1)).view(1, rows * side, columns * side)
        theirs = avg_pool2d(grid, side).flatten()
    else:
        side = round(len(patches) ** 0.5)
        theirs = avg_pool2d(patches.view(1, side, side), side // rows).flatten()
    torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_is_recognized_by_its_config(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    model, processor = load(str(tmp_path))
    assert type(family_of(model)) is FAMILIES[tiny.name]
    assert type(processor) is type(tiny.processor)


def test_an_unsupported_model_is_told_what_is_supported():
    class Other:
        config = BlipConfig()

    with pytest.raises(InputError) as refusal:
        family_of(Other())
    assert (
        str(refusal.value)
        == f"model type 'blip' is not supported; supported: {', '.join(FAMILIES)}"
    )


def test_positions_of_three_rows_are_not_renumbered(tiny):
    if not family_of(tiny.model).mrope:
        pytest.skip("positions of one row can be")
    with pytest.raises(InputError, match="give 'auto' or 'original'"):
        Random(budget=4, positions="contiguous")(tiny.model).__enter__()


def test_videos_are_refused_where_they_are_not_pruned(tiny):
    if "video" in family_of(tiny.model).kinds:
        pytest.skip("they are pruned")
    if "pixel_values_videos" not in signature(tiny.model.forward).parameters:
        pytest.skip("the model refuses them itself")
    inputs = tiny.inputs([[([0], "red?")]])
    with Random(budget=4)(tiny.model), pytest.raises(InputError, match="frames as images"):
        tiny.model(**inputs, pixel_values_videos=inputs["pixel_values"])


def test_the_wrapper_answers_as_the_unpruned_model(tiny):
    vlm = PrunedVLM(tiny.model, tiny.processor, NoPruning())
    unpruned = PrunedVLM(tiny.model, tiny.processor)
    picture, options = tiny.pictures[2], {"max_new_tokens": 5}
    expected = unpruned.answer(picture, "red?", **options)
    assert vlm.answer(picture, "red?", **options) == expected
    assert vlm.answer(np.asarray(picture), "red?", **options) == expected


@pytest.mark.parametrize("pruner", [None, DivPrune(budget=4), FastV(budget=0.5)])
def test_replies_are_what_the_images_get_alone(tiny, pruner):
    skip_refused(tiny, pruner)
    vlm = PrunedVLM(tiny.model, tiny.processor, pruner)
    questions = ["red?", "What color is the star and is there a 7?", "7?"]
    together = vlm.replies(tiny.pictures[:3], questions, max_new_tokens=5)
    alone = [
        vlm.replies([p], [q], max_new_tokens=5)
        for p, q in zip(tiny.pictures, questions, strict=False)
    ]
    assert together == [reply for (reply,) in alone]
    if pruner is not None:
        for reply in together:
            assert 0 < reply.kept_tokens < reply.image_tokens


def test_the_wrapper_takes_a_question_for_each_image():
    with pytest.raises(InputError, match="2 images do not go with 1 questions"):
        PrunedVLM(None, None).replies(["one.jpg", "two.jpg"], ["red?"])


@pytest.mark.parametrize("pruner", [None, DivPrune(budget=4), FastV(budget=0.5)])
def test_the_wrapper_serves_beams_and_outputs_and_refuses_several_replies(tiny, pruner):
    skip_refused(tiny, pruner)
    vlm, questions = PrunedVLM(tiny.model, tiny.processor, pruner), ["red?", "7?"]
    (one, two) = vlm.replies(tiny.pictures[:2], questions, max_new_tokens=3)
    given = vlm.replies(
        tiny.pictures[:2], questions, max_new_tokens=3, num_beams=1, return_dict_in_generate=True
    )
    assert given == [one, two]
    beams = vlm.replies(tiny.pictures[:2], questions, max_new_tokens=3, num_beams=3)
    assert [reply.kept_tokens for reply in beams] == [one.kept_tokens, two.kept_tokens]
    with pytest.raises(InputError, match="num_return_sequences"):
        vlm.answer(tiny.pictures[0], "red?", num_beams=2, num_return_sequences=2)


@torch.inference_mode()
def test_images_encoded_beforehand_and_prompts_without_any(tiny):
    """Both inside one block; the first equals pixels, the second the unpruned model."""
    inputs, images = encode(tiny, [[([0], "red?")], [([1, 2], "blue?")]])
    family, pruner = family_of(tiny.model), DivPrune(budget=4)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    kinds = ("token_type_ids", "mm_token_type_ids")
    positions = [name for name in (*kinds, *family.image_inputs) if name in inputs]
    text = {
        name: value
        for name, value in tiny.inputs([[([], "What is red?")]]).items()
        if name in prompt
    }
    steps = {"max_new_tokens": 3, "min_new_tokens": 3}
    unpruned = tiny.model.generate(**text, **steps)
    with pruner(tiny.model):
        pixels = tiny.model.generate(**inputs, **steps)
        assert torch.equal(tiny.model.generate(**text, **steps), unpruned)
    with pruner(tiny.model, images) as trace:
        output = family.output(images.projected, images.deepstack)
        prompt |= {name: inputs[name] for name in positions}
        before = tiny.model.generate(**prompt, mm_encoder_outputs=output, **steps)
    assert torch.equal(before, pixels)
    assert [len(places) for places in trace.kept] == [4, 4, 4]


def test_the_tower_s_flops_are_those_that_it_spends_on_each_picture(tiny):
    """Of all its layers and the embedding of patches; the projector is not the tower."""
    outside = ("merger", "Merger", "Projector", "Connector")
    tiny.model.set_attn_implementation("eager")
    try:
        for picture in range(3):
            with FlopCounterMode(display=False) as counter:
                _, images = encode(tiny, [[([picture], "red?")]])
            counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
            projector = sum(
                spent for name, spent in counts.items()
                if any(part in name.split(".")[-1] for part in outside)
                and not any(part in name.rpartition(".")[0] for part in outside)
                or "deepstack_merger_list" in name and name.count(".") == 2
            )  # fmt: skip
            assert images.flops == [pytest.approx(counts["Global"] - projector, rel=1e-3)]
    finally:
        tiny.model.set_attn_implementation("sdpa")


SIGLIP = partial(hf.SiglipVisionConfig, vision_use_head=False)
TOWERS = [
    ("llava", {"vision": SIGLIP}),
    ("llava", {"vision_feature_layer": [-3, 1, -2]}),
    ("llava", {"vision": SIGLIP, "vision_feature_layer": [2, -1]}),
    ("llava_next", {"vision_feature_layer": [1, 2]}),
]


@pytest.mark.parametrize(
    ("kind", "options"), TOWERS, ids=["siglip", "three", "siglip-two", "tiles"]
)
def test_towers_of_other_checkpoints(kind, options):
    """With and without a CLS token, of one layer's output or of several side by side."""
    tiny = Tiny(kind, **options)
    test_the_tower_s_flops_are_those_that_it_spends_on_each_picture(tiny)
    test_features_projected_are_what_the_language_model_gets(tiny)
    inputs = tiny.inputs([[([0], "red?")], [([1], "blue?")]])
    with torch.no_grad():
        plain = tiny.model(**inputs).logits
        for name in ("divprune", "zoo", "visionzip", "vispruner", "fopru", "fastv"):
            with build(name, budget=1.0)(tiny.model):
                torch.testing.assert_close(tiny.model(**inputs).logits, plain, atol=2e-5, rtol=1e-4)
            with build(name, budget=4)(tiny.model) as trace:
                assert tiny.model(**inputs).logits.isfinite().all()
                assert 0 < len(trace.kept[0]) < trace.available[0]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("llava", {"vision_feature_select_strategy": "full"}, "shows the CLS token"),
        ("llava", {"vision": SIGLIP, "vision_feature_select_strategy": "default"}, "first patch"),
        ("llava", {"vision": hf.PixtralVisionConfig}, "vision tower 'pixtral'"),
        ("llava", {"vision_feature_layer": 0}, "output of no layer"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "shows the CLS token"),
        ("internvl", {"vision_feature_select_strategy": "full"}, "shows the CLS token"),
        ("internvl", {"vision_feature_layer": [-1, -2]}, "give a number"),
    ],
    ids=["cls", "no-cls", "pixtral", "layer-0", "next-cls", "internvl-cls", "internvl-two"],
)
def test_towers_that_methods_cannot_read_are_refused_in_one_line(kind, options, words):
    tiny = Tiny(kind, **({} if kind == "internvl" else options))
    if kind == "internvl":
        for name, value in options.items():
            setattr(tiny.model.config, name, value)
    with (
        pytest.raises(InputError, match=words) as refusal,
        torch.no_grad(),
        DivPrune(budget=4)(tiny.model),
    ):
        tiny.model(**tiny.inputs([[([0], "red?")]]))
    assert "\n" not in str(refusal.value)


@torch.no_grad()
def test_features_of_another_layer_than_the_configurations_are_refused(llava_tiny):
    """Methods read the layer of the configuration, whatever the call says."""
    inputs = llava_tiny.inputs([[([0], "red?")]])
    with DivPrune(budget=4)(llava_tiny.model):
        expected = llava_tiny.model(**inputs).logits
        same = llava_tiny.model(**inputs, vision_feature_layer=-2).logits
        assert torch.equal(same, expected)
        for more in ({"vision_feature_layer": -1}, {"vision_feature_select_strategy": "full"}):
            with pytest.raises(InputError, match="configuration"):
                llava_tiny.model(**inputs, **more)


@pytest.mark.parametrize("tiny", ["smolvlm"], indirect=True)
def test_smolvlm_names_the_transformers_that_it_needs(tiny, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.20.2")
    with pytest.raises(InputError, match="transformers 5.21 or newer, this is 5.20.2"):
        family_of(tiny.model)


@pytest.mark.parametrize("tiny", ["gemma3"], indirect=True)
def test_crops_of_pan_and_scan_are_images_of_their_own(tiny):
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20}
    inputs = tiny.processor(
        text="<start_of_image> red?", images=[[tiny.pictures[2]]], return_tensors="pt", **crops
    )
    counts = tiny.encode(inputs).counts
    assert len(counts) == len(inputs["pixel_values"]) > 1 and set(counts) == {25}
    with Random(budget=6)(tiny.model) as trace, torch.inference_mode():
        assert tiny.model(**inputs).logits.isfinite().all()
    assert [len(kept) for kept in trace.kept] == [6] * len(counts)
