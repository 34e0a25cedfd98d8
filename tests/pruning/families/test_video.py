"""What every method keeps on videos of every family that takes them; see CONTRIBUTING.md."""

import re
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny_families import FPS, NEEDS, Tiny, failing, leaves_images, snapshot

from vlm_prune.pruning import METHODS
from vlm_prune.pruning.pipeline import PrunedVLM
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.chat import render, video_frames_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.video import VideoClip
from vlm_prune.vlm.families import FAMILIES, family_of

LONG = "What color is the star and is there a 7?"
EQUAL_LENGTHS = ("internvl", "llava_next_video", "llava_onevision", "smolvlm")
"""Families whose processor stacks the videos of a batch."""
VIDEOS_ALONE = ("smolvlm",)
"""Families whose processor takes no images beside videos."""
STAMPED = r"<[0-9.]+.?seconds><\|vision_start\|>((?:<\|video_pad\|>)+)<\|vision_end\|>"
FRAMES = {
    "qwen3_vl": STAMPED,
    "qwen3_vl_moe": STAMPED,
    "internvl": r"Frame[0-9]:.<img>((?:<IMG_CONTEXT>)+)</img>(?:Ċ(?=Frame[2-9]))?",
    "smolvlm": "ĊFrame.from.[0-9:]+<fake_token_around_image><global-img>((?:<image>)+)"
    "<fake_token_around_image>",
}
"""Frames of the families that put text beside them: their placeholders, and what goes with these."""
RAGGED = [
    [(["a"], "Is there a 7?")],
    [([], "What is red?")],
    [([1], "Is it blue?"), ([], "yes"), (["b", "a"], LONG)],
]
BUDGET = 5
EVERY = [*METHODS, "divprune+adaptinfer", "vidcom2+fastv", "fastv+merge"]
STAGES = ["divprune", "visionzip", "fastvid", "vidcom2+fastv", "downsample"]


@pytest.fixture(
    scope="module", params=[n for n, own in FAMILIES.items() if "videos" not in own.lacks]
)
def tiny(request):
    for package in NEEDS.get(request.param, ()):
        if find_spec(package) is None:
            pytest.skip(f"the processor of {request.param} needs {package}")
    return Tiny(request.param)


def rows_of(tiny, rows=RAGGED):
    """The rows as the family's processor takes them: with videos of equal length, or no images."""

    def shown(pictures):
        if tiny.name in EQUAL_LENGTHS:
            pictures = ["c" if p == "b" else p for p in pictures]
        return [p for p in pictures if tiny.name not in VIDEOS_ALONE or p in tiny.clips]

    return [[(shown(pictures), text) for pictures, text in row] for row in rows]


def image_item(tiny):
    """The number of the image among the items of these rows."""
    return None if tiny.name in VIDEOS_ALONE else 1


@lru_cache(maxsize=1)
def unpruned(tiny):
    with torch.no_grad():
        inputs = tiny.inputs(rows_of(tiny))
        # transformers leaves hooks of its own on a tower that is asked for hidden states
        tiny.encode(inputs)
        return inputs, tiny.model(**inputs).logits


def on(name, tiny, budget=BUDGET, **more):
    if name == "icr":  # what it drops is tested beside it
        more = {"keep": 99} | more
    if name == "downsample" and budget == BUDGET:  # no frame is left out
        budget = "1/frame"
    method = build(name, budget=budget, **more)
    family = family_of(tiny.model)
    if method.needs_on(len(family.decoder.layers)) & family.lacks:
        with pytest.raises(InputError, match="give one of none, random"):
            method.admit(tiny.model)
        pytest.skip(f"{name} does not go with {tiny.name}")
    return method


@torch.inference_mode()
def greedy(tiny, inputs, steps=3):
    return tiny.model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip


def assert_close(ours, theirs, atol=2e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


def named(methods):
    """The methods that run by default, and all others behind `slow`."""
    marks = [pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name not in methods]
    return pytest.mark.parametrize("name", [*methods, *marks])


@pytest.mark.parametrize("name", EVERY)
def test_keeping_all_equals_the_unpruned_model_and_the_budget_is_met(name, tiny):
    inputs, expected = unpruned(tiny)
    before = snapshot(tiny.model)
    with (
        on(name, tiny, budget=1.0)(tiny.model, **tiny.frames(rows_of(tiny))) as trace,
        torch.inference_mode(),
    ):
        during = snapshot(tiny.model)
        logits = tiny.model(**inputs).logits
    assert snapshot(tiny.model) == before != during
    valid = inputs["attention_mask"].bool()
    assert_close(logits[valid], expected[valid])
    assert [len(places) for places in trace.kept] == trace.available

    method = on(name, tiny)
    with method(tiny.model, **tiny.frames(rows_of(tiny))) as trace, torch.inference_mode():
        tiny.model(**inputs)
    for item, places in enumerate(trace.kept):
        computed = [counts[item] for counts in trace.computed]
        mean = sum(computed) / len(computed)
        # methods that compare frames leave the image, the second item, whole
        image = item == image_item(tiny)
        whole = name == "none" or (image and leaves_images(method, tiny.model))
        enough = trace.available[item] if whole else BUDGET
        if name == "downsample":
            assert mean == (frames_in_order(tiny, inputs)[item] or (enough if whole else 1))
            continue
        assert enough * 0.9 < mean <= enough
        assert places.tolist() == sorted(set(places.tolist()))


def frames_in_order(tiny, inputs, **frames):
    """Frames of each item in the prompt's order, 0 for the image, which is the second one."""
    shown = tiny.encode(inputs, **frames).frames
    if frames:
        return shown
    image, *videos = shown
    return [videos[0], image, *videos[1:]]


@named(STAGES)
def test_a_budget_per_frame_is_met(name, tiny):
    """An image counts as one frame."""
    inputs, _ = unpruned(tiny)
    method, frames = on(name, tiny, budget="2/frame"), tiny.frames(rows_of(tiny))
    with method(tiny.model, **frames) as trace, torch.inference_mode():
        tiny.model(**inputs)
    for item, count in enumerate(frames_in_order(tiny, inputs, **frames)):
        computed = [counts[item] for counts in trace.computed]
        mean, wanted = sum(computed) / len(computed), 2 * max(1, count)
        image = item == image_item(tiny)
        if name == "none" or (image and leaves_images(method, tiny.model)):
            wanted = trace.available[item]
        # a mean over layers is met up to a tenth, and up to a token where these are few; frames are
        # shrunk to what has two tokens at most
        fewer = max(1, wanted / 10) if name != "downsample" else wanted / 2 + 1
        assert wanted - fewer < mean <= wanted


@pytest.mark.parametrize("name", ["scope", "pool", "flashvid", "fastv", "vidcom2+fastv"])
def test_a_share_below_one_token_of_a_video_is_refused(name, tiny):
    rows = [[(["a"], LONG)]]
    inputs, frames = tiny.inputs(rows), tiny.frames(rows)
    (available,) = tiny.encode(inputs, **frames).counts
    with (
        on(name, tiny, budget=0.001)(tiny.model, **frames),
        torch.inference_mode(),
        pytest.raises(InputError, match=f"below one of the {available} tokens of a video") as said,
    ):
        tiny.model(**inputs)
    least = float(re.search(r"give (0\.[0-9]+) or more", str(said.value))[1])
    assert 1 / available <= least < 1.1 / available
    with on(name, tiny, budget=least)(tiny.model, **frames) as trace, torch.inference_mode():
        tiny.model(**inputs)
    assert 1 <= len(trace.kept[0]) < 4


@named(STAGES)
def test_each_row_equals_its_solo_run(name, tiny):
    method, rows = on(name, tiny), rows_of(tiny)
    with method(tiny.model, **tiny.frames(rows)):
        batch = greedy(tiny, tiny.inputs(rows), steps=2)
    for row, turns in enumerate(rows):
        with method(tiny.model, **tiny.frames([turns])):
            solo = greedy(tiny, tiny.inputs([turns]), steps=2)
        for step, logits in enumerate(batch.logits):
            assert_close(logits[row], solo.logits[step][0])


@named(STAGES)
def test_right_padded_rows_equal_left_padded_ones(name, tiny):
    rows = rows_of(tiny)[::2]
    method = on(name, tiny)
    with method(tiny.model, **tiny.frames(rows)), torch.inference_mode():
        left, right = (tiny.model(**tiny.inputs(rows, side)).logits for side in ("left", "right"))
    with method(tiny.model, **tiny.frames(rows[:1])), torch.inference_mode():
        solo = tiny.model(**tiny.inputs(rows[:1])).logits[0]
    assert_close(left[0, -len(solo) :], solo)
    assert_close(right[0, : len(solo)], solo)


def frames_of(tiny, ids):
    """Token indices that go with each frame of a prompt beside its placeholders, read as text.

    Each frame's placeholders are a run of their own where there are such tokens.
    """
    tokens = tiny.processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    starts = torch.tensor([0, *map(len, tokens)]).cumsum(0).tolist()
    spans, placeholder = [], family_of(tiny.model).placeholder(family_of(tiny.model).kind_of(1))
    for found in re.finditer(FRAMES.get(tiny.name, "(?!)"), "".join(tokens)):
        first, last = starts.index(found.start()), starts.index(found.end())
        pads = [at for at in range(first, last) if ids[at] == placeholder]
        spans.append((sorted({*range(first, last)} - {*pads}), pads))
    return spans


@pytest.mark.parametrize("name", ["scope", "evs", "fastv", "vidcom2+fastv"])
def test_cached_decoding_equals_a_full_forward(name, tiny):
    """The reference walks the layers: one pass, of the tokens that are left of the full prompt with
    the embeddings and positions that these have there.
    """
    method, family = on(name, tiny, budget=2), family_of(tiny.model)
    rows = rows_of(tiny, [[([1], "Is it blue?"), ([], "yes"), (["a", "c"], LONG)]])
    inputs = tiny.inputs(rows)
    with method(tiny.model, **tiny.frames(rows)) as trace:
        out = greedy(tiny, inputs)
    ids, prompt = out.sequences, inputs["input_ids"]
    seen = {}
    hook = family.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    whole = dict(inputs) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(out.logits))], 1)
    with torch.no_grad():
        tiny.model(**whole)
    hook.remove()

    kinds = torch.tensor([family.placeholder(kind) for kind in family.kinds])
    placeholders = torch.isin(prompt[0], kinds)
    items = placeholders.nonzero()[:, 0].split(trace.available)
    spans = frames_of(tiny, prompt[0])
    assert bool(spans) == (tiny.name in FRAMES)
    here, hidden_states = torch.arange(ids.shape[1]), seen["inputs_embeds"][0]
    position = torch.arange(ids.shape[1])

    def drop(kept, part):
        nonlocal here, hidden_states, position
        left = torch.cat([item[own] for item, own in zip(items, kept, strict=True)])
        gone = {*placeholders.nonzero()[:, 0].tolist()} - {*left.tolist()}
        for markers, pads in spans:
            gone |= {*markers} if gone >= {*pads} else set()
        keep = torch.tensor([column not in gone for column in here.tolist()])
        here, hidden_states, position = here[keep], hidden_states[keep], position[keep]
        if part.positions_on(family) != "original":
            position = torch.arange(len(here))

    cuts = {}
    if trace.entered:
        drop(trace.entered, getattr(method, "pre", method))
    if method.stage == "decoder":
        layers = len(family.decoder.layers)
        for count in trace.available:
            cuts |= {cut.layer: None for cut in method.cuts(count, layers)}
        cuts = dict(zip(sorted(cuts), trace.cuts, strict=True))
    for number, layer in enumerate(family.decoder.layers):
        if number in cuts:
            drop(cuts[number], getattr(method, "inside", method))
        at = seen["position_ids"][-3:, :, here] if family.mrope else position[None]
        mask = torch.full((len(here), len(here)), float("-inf")).triu(1)[None, None]
        with torch.no_grad():
            rotary = family.decoder.rotary_emb(hidden_states[None], position_ids=at)
            hidden_states = layer(
                hidden_states[None], attention_mask=mask, position_embeddings=rotary
            )[0]
        if number < len(seen.get("deepstack_visual_embeds") or []):
            deep = torch.zeros_like(seen["inputs_embeds"][0])
            deep[seen["visual_pos_masks"][0]] = seen["deepstack_visual_embeds"][number]
            hidden_states = hidden_states + deep[here]
    if spans:
        markers = {column for own, _ in spans for column in own}
        assert 0 < len(markers - {*here.tolist()}) < len(markers)
    logits = tiny.model.lm_head(family.decoder.norm(hidden_states)).detach()
    for step, ours in enumerate(out.logits):
        assert_close(ours[0], logits[len(logits) - len(out.logits) - 1 + step])


def test_beam_search_repeats_videos_with_their_rows(tiny):
    rows = [rows_of(tiny)[2], rows_of(tiny)[0]]
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 3}
    for name, budget in (("divprune", BUDGET), ("fastv", "2/frame")):
        method, alone = on(name, tiny, budget=budget), []
        with method(tiny.model, **tiny.frames(rows)), torch.inference_mode():
            both = tiny.model.generate(**tiny.inputs(rows), **steps)
        for row in rows:
            with method(tiny.model, **tiny.frames([row])), torch.inference_mode():
                alone.append(tiny.model.generate(**tiny.inputs([row]), **steps))
        for ours, theirs in zip(alone, both, strict=True):
            assert torch.equal(ours[0, -3:], theirs[-3:])


def test_videos_that_are_encoded_beforehand_are_pruned_alike(tiny):
    inputs = tiny.inputs(rows_of(tiny))
    frames = tiny.frames(rows_of(tiny))
    encoded = tiny.encode(inputs, **frames)
    images = [] if tiny.name in VIDEOS_ALONE else [False]
    assert sorted(map(bool, encoded.frames)) == [*images, True, True, True]
    for name in ("divprune", "fastv"):
        method = build(name, budget="2/frame")
        with method(tiny.model, **frames) as trace, torch.inference_mode():
            expected = tiny.model(**inputs).logits
        with method(tiny.model, vision=encoded) as again, torch.inference_mode():
            assert torch.equal(tiny.model(**inputs).logits, expected)
        assert all(map(torch.equal, trace.kept, again.kept))
    # and given to the unpruned model instead of pixels, with positions of their own
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    arguments = family_of(tiny.model).arguments(ids, mask, dict(inputs) | encoded.inputs)
    with torch.inference_mode():
        outputs = family_of(tiny.model).outputs(encoded)
        logits = tiny.model(
            input_ids=ids, attention_mask=mask, mm_encoder_outputs=outputs, **arguments
        ).logits
    valid = mask.bool()
    assert_close(logits[valid], unpruned(tiny)[1][valid])


def test_a_failure_leaves_nothing_on_the_model(tiny):
    inputs = tiny.inputs(rows_of(tiny))
    before = snapshot(tiny.model)
    with failing(family_of(tiny.model).decoder.layers[-1]), build("pool", budget=5)(tiny.model):
        greedy(tiny, inputs)
    assert snapshot(tiny.model) == before


def test_an_image_method_sees_frames_and_shares_the_budget_evenly(tiny):
    """Six frames are six, or three pairs where the tower makes one of two."""
    rows = [[(["a"], LONG)]]
    inputs, shown = tiny.inputs(rows), tiny.frames(rows)
    vision = tiny.encode(inputs, **shown).groups[0].tokens
    frames = vision.in_frames()
    size = vision.projected.shape[1] // vision.frames
    assert frames.projected.shape[:2] == (vision.frames, size) == (len(frames.seeds), size)
    some = vision.in_frames([1])
    assert torch.equal(some.keys()[0], frames.keys()[1])
    assert torch.equal(vision.keys()[0, size : 2 * size], frames.keys()[1])
    assert some.seeds == frames.seeds[1:2]
    method = build("divprune", budget=vision.frames + 1)
    with method(tiny.model, **shown) as trace, torch.inference_mode():
        tiny.model(**inputs)
    shares = torch.bincount(trace.kept[0] // size, minlength=vision.frames)
    assert sorted(shares.tolist()) == [1] * (vision.frames - 1) + [2]


def test_a_model_without_videos_is_named(llava_tiny):
    inputs = llava_tiny.inputs([[([0], "Is there a 7?")]])
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")[None]
    with (
        build("divprune", budget=5)(llava_tiny.model),
        pytest.raises(InputError, match="videos of llava models are not pruned; give their frames"),
    ):
        llava_tiny.model.model(**inputs)


def clip_of(tiny, name="a"):
    frames = tiny.clips[name]
    return VideoClip(frames, tuple(n / FPS for n in range(len(frames))), len(frames) / FPS)


def test_a_clip_is_answered_as_its_frames_are(tiny):
    """Also beside an image, and as many times a second as it says."""
    method = build("divprune", budget=BUDGET)
    vlm = PrunedVLM(tiny.model, tiny.processor, method)
    steps = {"max_new_tokens": 3, "min_new_tokens": 3}
    media = [clip_of(tiny), tiny.pictures[0]][: 1 if tiny.name in VIDEOS_ALONE else 2]
    clip, *images = vlm.replies(media, ["Is it red?", LONG][: len(media)], **steps)
    assert {reply.kept_tokens for reply in (clip, *images)} == {
        BUDGET
    } and clip.image_tokens > BUDGET
    frames, rows, columns = clip.grid
    assert not any(image.grid for image in images) and frames > 1
    # newlines stand behind the grids of some
    assert 0 <= clip.image_tokens - frames * rows * columns <= 1
    turns = [[(["a"], "Is it red?")]]
    inputs = tiny.inputs(turns)
    with method(tiny.model, **tiny.frames(turns)), torch.inference_mode():
        expected = tiny.model.generate(**inputs, **steps)[:, -3:]
    assert tiny.processor.decode(expected[0], skip_special_tokens=True).strip() == clip.text
    assert vlm.answer(clip_of(tiny), "Is it red?", **steps) == clip.text


def test_a_clip_that_a_model_cannot_take_is_refused(tiny, llava_tiny):
    one = VideoClip(tiny.clips["a"][:1], (0.0,), 0.5)
    vlm = PrunedVLM(llava_tiny.model, llava_tiny.processor)
    with pytest.raises(InputError, match="llava models take no videos here; give their frames"):
        vlm.answer(one, "Is it red?")
    vlm = PrunedVLM(tiny.model, tiny.processor)
    if tiny.name in EQUAL_LENGTHS:
        assert vlm.answer(one, "Is it red?", max_new_tokens=1) is not None
        with pytest.raises(
            InputError, match=r"clips of equal length at a time, .* \[4, 6\] frames"
        ):
            vlm.replies([clip_of(tiny), clip_of(tiny, "b")], ["Is it red?"] * 2)
        return
    with pytest.raises(InputError, match="a clip of 1 frame is shorter than the 2"):
        vlm.answer(one, "Is it red?")


def test_frames_that_are_images_are_a_video_where_that_is_said():
    tiny = Tiny("internvl")
    rows = [[([1], "Is it blue?"), ([], "yes"), (["a"], LONG)]]
    inputs, frames = tiny.inputs(rows), tiny.frames(rows)
    assert frames == {"video_frames": [0, 6]}
    with build("divprune", budget=BUDGET)(tiny.model) as trace, torch.inference_mode():
        tiny.model(**inputs)
    assert [*map(len, trace.kept)] == [BUDGET] * 7
    for method in ("vidcom2", "vidcom2+fastv"):
        with pytest.raises(InputError, match="are images to internvl models; give video_frames"):
            build(method, budget=BUDGET)(tiny.model)
    for given, message in (
        ([6], r"video_frames \[6\] stand for 6 images, and the prompt shows 7"),
        ([2, 5], r"a frame of a video has 9 tokens, and these have \[9, 27\]"),
        ([0, -6], "are no counts"),
        ([0, "6"], "are no counts"),
    ):
        for method in ("random", "fastv"):
            with (
                pytest.raises(InputError, match=message),
                build(method, budget=BUDGET)(tiny.model, video_frames=given),
                torch.inference_mode(),
            ):
                tiny.model(**inputs)
    other = Tiny("qwen3_vl")
    with (
        pytest.raises(InputError, match="no images to qwen3_vl models; leave out video_frames"),
        build("random", budget=BUDGET)(other.model, video_frames=[3]),
    ):
        pass


def test_text_of_a_user_makes_no_video_of_images():
    """Frames are counted where a chat template says that there is a video, and nowhere else."""
    tiny = Tiny("internvl")
    text = "Frame1: <img><IMG_CONTEXT></img>\nFrame2: <video> Is it red?"
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": text}]
    shown = render(tiny.processor, [{"role": "user", "content": content}])
    assert video_frames_of(tiny.model, tiny.processor, [shown], [clip_of(tiny)]) == [0, 6]
    vlm = PrunedVLM(tiny.model, tiny.processor, build("vidcom2", budget=BUDGET))
    (reply,) = vlm.replies([tiny.pictures[0]], [text], max_new_tokens=1)
    assert reply.grid is None and reply.kept_tokens == reply.image_tokens


@pytest.mark.parametrize("name", ["smolvlm"])
def test_images_beside_videos_are_refused_where_the_processor_loses_them(name):
    tiny = Tiny(name)
    vlm = PrunedVLM(tiny.model, tiny.processor)
    with pytest.raises(InputError, match="takes either images or videos at a time"):
        vlm.replies([clip_of(tiny), tiny.pictures[0]], ["Is it red?"] * 2)


@pytest.mark.parametrize("name", ["qwen3_vl"])
def test_without_metadata_qwen3_drops_frames_and_invents_their_times(name):
    """What the processor does in silence, and what it does not do where it is told the times."""
    tiny = Tiny(name)
    text, frames = "<|vision_start|><|video_pad|><|vision_end|>", np.repeat(tiny.clips["a"], 8, 0)
    plain = tiny.processor(text=[text], videos=[frames], return_tensors="pt")
    assert plain["video_grid_thw"][0, 0] == 2  # four frames of 48: two seconds at 24 a second
    told = tiny.inputs([[(["a"], LONG)]])
    assert told["video_grid_thw"][0, 0] == 3
    shown = tiny.processor.decode(told["input_ids"][0])
    assert re.findall(r"<([0-9.]+) ?seconds>", shown) == ["0.2", "1.2", "2.2"]


def test_times_of_qwen2_5_are_in_the_positions_and_stay_there():
    tiny, seen = Tiny("qwen2_5_vl"), []
    family = family_of(tiny.model)
    hook = family.decoder.layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    inputs = tiny.inputs([[(["a"], LONG)]])
    slower = inputs | {"second_per_grid_ts": inputs["second_per_grid_ts"] * 3}
    with torch.no_grad():
        for given in (inputs, slower):
            tiny.model(**given)
            with build("evs", budget=12)(tiny.model) as trace:
                tiny.model(**given)
    hook.remove()
    whole, kept, whole_slower, kept_slower = (own[0] for own in seen)
    start = inputs["input_ids"][0].tolist().index(family.video_token)
    columns = torch.tensor(
        [*range(start), *(start + trace.kept[0]).tolist(), *range(start + 27, len(whole))]
    )
    assert torch.equal(kept_slower, whole_slower[columns])
    assert not torch.allclose(kept, kept_slower)
    assert not torch.allclose(whole, whole_slower)
