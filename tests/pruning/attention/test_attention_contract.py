"""Contracts that every method of sparse attention keeps on real models."""

import math
from copy import deepcopy

import pytest
import torch
from attention_cases import PREFILL, TAIL, short
from tiny_families import Tiny, failing, snapshot

from vlm_prune.learners import WingsConfig, attach, detach
from vlm_prune.pruning import METHODS, DivPrune, FastV
from vlm_prune.pruning.attention import ATTENTION, Local, Pooled, Prism, build_attention
from vlm_prune.vlm.attention import scored_layers, turns_neighbors, window_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.sparse_attention import frame_numbers, replaced_attention, tokens_behind_images

RAGGED = [
    [([0, 1, 2], "Is there a 7?")],
    [([1, 2, 3, 0, 1], "What color is the star?")],
    [([], 6 * "What color is the star? Is there a 7? yes no green blue ")],
]
FAMILIES = ("llava", "qwen2_5_vl", "gemma4", "qwen3_5")
"""Of one kind each: plain, of positions in rows and columns, of sliding windows, of linear attention."""


def by_family(names):
    """Each method on LLaVA, one of them on the other families; the rest is slow."""
    return [
        pytest.param(
            family, name, marks=() if family == "llava" or name == "pooled" else pytest.mark.slow
        )
        for family in FAMILIES
        for name in names
    ]


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture
def model_case(family, models):
    if family != "llava":
        pytest.importorskip("torchvision")
    if family not in models:
        models[family] = Tiny(family)
    return models[family]


@pytest.fixture
def llava_case(models):
    return models.setdefault("llava", models.get("llava") or Tiny("llava"))


@torch.inference_mode()
def answered(model, inputs, steps=4, **more):
    return model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


@torch.inference_mode()
def logits_of(model, inputs):
    return model(**inputs).logits


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), by_family(ATTENTION))
def test_all_blocks_equal_dense_attention(name, model_case):
    model, inputs = model_case.model, model_case.inputs(RAGGED)
    dense = answered(model, inputs)
    options = {"keep": 1.0, "dense_layers": 0} if name == "act" else {}
    if name in PREFILL:
        method = short(name, density=1.0)
    else:
        method = build_attention(name, density=1.0, minimum=1, **options)
    with method(model):
        ours = answered(model, inputs)
    assert torch.equal(ours.sequences, dense.sequences)
    for mine, theirs in zip(ours.logits, dense.logits, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(("family", "name"), by_family(PREFILL))
def test_each_row_equals_its_run_alone(name, model_case):
    model, rows = model_case.model, RAGGED
    # rounding to four bits would choose other blocks where rows differ by rounding
    method = short(name, density=0.5, **{"bits": 0} if name == "sale" else {})
    for side in ("left", "right"):
        inputs = model_case.inputs(rows, side)
        with method(model) as trace:
            batch = logits_of(model, inputs)
        assert trace.density < 1 and trace.chosen_density < trace.density
        for row, turns in enumerate(rows):
            with method(model):
                alone = logits_of(model, model_case.inputs([turns]))[0]
            real = inputs["attention_mask"][row].bool()
            # layers of linear attention and of sliding windows themselves round differently in a batch
            others = model_case.name in ("qwen3_5", "gemma4")
            close(batch[row, real], alone, 1e-4 if others else 3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_executors_agree_and_gather_is_not_dense(model_case):
    model, inputs = model_case.model, model_case.inputs(RAGGED)
    dense, found = logits_of(model, inputs), {}
    real = inputs["attention_mask"].bool()
    for executor in ("reference", "gather"):
        with Pooled(density=0.5, block=8, minimum=1, tail=TAIL, executor=executor)(model) as trace:
            found[executor] = logits_of(model, inputs)[real]
        assert 0.45 < trace.density < 0.6
    close(found["gather"], found["reference"])
    assert (found["gather"] - dense[real]).abs().max() > 1e-3


def test_rows_before_a_change_stay(llava_case):
    """What follows an image changes no row of blocks before it, as the prompts' lengths are the same."""
    model, found = llava_case.model, []
    for text in ("Is there a 7?", "Is there a 3?"):
        inputs = llava_case.inputs([[([0, 1], text)]])
        with short("xattention", density=0.5)(model):
            found.append(logits_of(model, inputs)[0, :48])
    assert torch.equal(*found)


@pytest.mark.parametrize(("family", "name"), [("llava", "recycled"), ("qwen2_5_vl", "pooled")])
def test_the_model_is_untouched_afterward(name, model_case):
    model, inputs = model_case.model, model_case.inputs(RAGGED[:1])
    before, method = snapshot(model), build_attention(name, minimum=1)
    with method(model):
        answered(model, inputs)
        copied = deepcopy(model)
    assert snapshot(model) == before
    close(logits_of(copied, inputs), logits_of(model, inputs))
    with failing(family_of(model).decoder.layers[1]), method(model):
        logits_of(model, inputs)
    assert snapshot(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_it_composes_with_pruners(model_case):
    model, inputs = model_case.model, model_case.inputs(RAGGED)
    every, some = short("pooled", density=1.0), short("pooled", density=0.5)
    pruners = [DivPrune(budget=12)]
    if "softmax attention in every decoder layer" not in FastV().needs & family_of(model).lacks:
        pruners.append(FastV(budget=12))
    for pruner in pruners:
        with pruner(model):
            right = answered(model, inputs)
        with pruner(model), every(model):
            inner = answered(model, inputs)
        with every(model), pruner(model):
            outer = answered(model, inputs)
        for step, theirs in enumerate(right.logits):
            close(inner.logits[step], theirs)
            close(outer.logits[step], theirs)
        with pruner(model), some(model) as trace:
            assert torch.stack(answered(model, inputs).logits).isfinite().all()
        assert trace.density < 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "restore" else pytest.mark.slow)
        for name in METHODS
        if "videos" not in METHODS[name]().needs
    ],
)
def test_it_composes_with_every_pruner(name, llava_case):
    model, inputs = llava_case.model, llava_case.inputs(RAGGED)
    pruner = METHODS[name](budget=0.4)
    with pruner(model):
        right = answered(model, inputs)
    with pruner(model), short("pooled", density=1.0)(model) as trace:
        ours = answered(model, inputs)
    for step, theirs in enumerate(right.logits):
        close(ours.logits[step], theirs)
    # of the first layer at least; RESTORE has a mask of its own
    assert trace.computed or trace.dense["a mask of its own"]


def test_chunks_static_caches_and_gradients_run_densely(llava_case):
    model, inputs = llava_case.model, llava_case.inputs(RAGGED)
    for more in ({"prefill_chunk_size": 16}, {"cache_implementation": "static"}):
        dense = answered(model, inputs, **more)
        with short("pooled", density=0.5)(model) as trace:
            ours = answered(model, inputs, **more)
        assert all(map(torch.equal, ours.logits, dense.logits))
        assert not trace.computed and trace.dense
    model.zero_grad()
    with short("pooled", density=0.5)(model) as trace:
        model(**inputs).logits.sum().backward()
    assert trace.dense == {"gradients": 4} and trace.density == 1
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_decoding_steps_choose_nothing(llava_case):
    model, inputs = llava_case.model, llava_case.inputs(RAGGED)
    with short("pooled", density=0.5)(model) as trace:
        answered(model, inputs, steps=6)
    assert len(trace.computed) == 4 * len(RAGGED) and not trace.dense
    assert {computed.layer for computed in trace.computed} == {0, 1, 2, 3}
    with short("pooled", density=0.5, dense_layers=2)(model) as trace:
        answered(model, inputs)
    assert {computed.layer for computed in trace.computed} == {2, 3}
    assert trace.dense == {"first layers": 2}


def test_short_prompts_are_left_to_sdpa(llava_case):
    model, inputs = llava_case.model, llava_case.inputs(RAGGED)
    for method in (Pooled(), Pooled(minimum=1, block=256)):
        with method(model) as trace:
            ours = logits_of(model, inputs)
        real = inputs["attention_mask"].bool()
        close(ours[real], logits_of(model, inputs)[real])
        assert set(trace.dense) == {"a short prompt"}
    # of a batch those alone that are short
    lengths = inputs["attention_mask"].sum(1)
    with short("pooled", density=0.5, minimum=int(lengths.max()))(model) as trace:
        logits_of(model, inputs)
    longest = int((lengths == lengths.max()).sum())
    assert len(trace.computed) == 4 * longest
    assert trace.dense == {"a short prompt": 4 * (len(RAGGED) - longest)}


@pytest.mark.parametrize("length", [19, 20, 21, 27, 28, 29])
def test_any_length_is_dense_where_all_blocks_are_kept(length, llava_case):
    """Shorter than two blocks and a tail, exactly that long, and between whole blocks."""
    decoder = family_of(llava_case.model).decoder
    ids = torch.arange(12, 12 + length)[None]
    with torch.no_grad():
        right = decoder(input_ids=ids).last_hidden_state
        with short("anchor", density=None, theta=1e9)(llava_case.model) as trace:
            close(decoder(input_ids=ids).last_hidden_state, right)
    assert bool(trace.computed) == (length >= 20)


def test_every_layer_of_full_attention_is_reached(tiny):
    model = tiny.model
    if "full_attention" in family_of(model).both_ways:
        with pytest.raises(InputError, match="see each other both ways"), Pooled()(model):
            pass
        return
    inputs = tiny.inputs([[([], RAGGED[2][0][1])]])
    decoder = family_of(model).decoder
    full = [
        number
        for number in scored_layers(decoder.config, len(decoder.layers))
        if window_of(decoder.config, number) is None
    ]
    dense = logits_of(model, inputs)
    with short("pooled", density=1.0)(model) as trace:
        close(logits_of(model, inputs), dense)
    assert [computed.layer for computed in trace.computed] == full
    neighbors = model.config.model_type in ("glm4v", "glm46v")
    assert turns_neighbors(decoder.layers[-1]) is neighbors
    if neighbors:
        with pytest.raises(InputError, match="turn neighbors; give pooled"), Prism()(model):
            pass


def test_frames_are_images_and_frames_of_videos(models, llava_case):
    inputs = llava_case.inputs([[([0, 1], "Is there a 7?")], [([2], "What color is the star?")]])
    family, ids = family_of(llava_case.model), inputs["input_ids"]
    found = frame_numbers(family, ids, None)
    assert torch.equal(found >= 0, ids == family.image_token)
    assert [torch.bincount(row[row >= 0]).tolist() for row in found] == [[25, 25], [25]]
    pytest.importorskip("torchvision")
    case = models.setdefault("qwen2_5_vl", models.get("qwen2_5_vl") or Tiny("qwen2_5_vl"))
    inputs = case.inputs([[(["a", 1], "Is there a 7?")], [(["b"], "What color is the star?")]])
    found = frame_numbers(family_of(case.model), inputs["input_ids"], inputs["video_grid_thw"])
    # two frames are encoded as one, 3 x 3 and 3 x 2 tokens
    image = int((inputs["input_ids"][0] == family_of(case.model).image_token).sum())
    assert [torch.bincount(row[row >= 0]).tolist() for row in found] == [[9, 9, 9, image], [6, 6]]
    # frames between markers, each a run of its own
    other = models.setdefault("qwen3_vl", models.get("qwen3_vl") or Tiny("qwen3_vl"))
    given = other.inputs([[(["a", 1], "Is there a 7?")], [(["b"], "What color is the star?")]])
    own = frame_numbers(family_of(other.model), given["input_ids"], given["video_grid_thw"])
    image = int((given["input_ids"][0] == family_of(other.model).image_token).sum())
    sizes = [math.prod(rows) // 4 for rows in given["video_grid_thw"][:, 1:].tolist()]
    counts = [torch.bincount(row[row >= 0]).tolist() for row in own]
    assert counts == [[sizes[0]] * 3 + [image], [sizes[1]] * 2]
    for name in ("llava_onevision", "llava_next_video"):
        other = Tiny(name)
        family, given = family_of(other.model), other.inputs([[(["a"], "Is there a 7?")]])
        frames, rows, columns = family.video_grids(given)[0]
        own = frame_numbers(family, given["input_ids"], None)[0]
        counts = torch.bincount(own[own >= 0]).tolist()
        # a newline behind the last frame goes with it
        assert counts[:-1] == [rows * columns] * (frames - 1) and len(counts) > 1
        assert counts[-1] - rows * columns == (name == "llava_onevision")
    run, seen = short("dhsa").run(), []
    attend = run.attend
    run.attend = lambda call, prompt, row: seen.append(prompt.frames) or attend(call, prompt, row)
    with torch.no_grad():
        with replaced_attention(case.model, run):
            case.model(**inputs)
        real = zip(found, inputs["attention_mask"].bool(), strict=True)
        rows = [frames[tokens] for frames, tokens in real]
        assert all(map(torch.equal, seen[-2:], rows)) and len(seen) > 2
        with DivPrune(budget=4)(case.model), replaced_attention(case.model, run):
            case.model(**inputs)
    assert seen[-1] is None


def test_frames_are_known_of_rows_of_which_nothing_was_dropped(llava_case):
    """A batch as long as before does not tell that a shorter row of it has lost tokens."""
    model = llava_case.model
    rows = [[([], "What color is the star? " * 20)], [([0, 1], "Is there a 7?")]]
    inputs = llava_case.inputs(rows)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert lengths[0] == inputs["input_ids"].shape[1] > lengths[1] + 8
    method = short("own-frame", density=None)
    with DivPrune(budget=15)(model), method(model):
        batch = logits_of(model, inputs)
        for row, turns in enumerate(rows):
            close(batch[row, -1], logits_of(model, llava_case.inputs([turns]))[0, -1], 3e-5)


def test_rows_behind_the_last_image_see_all_keys(llava_case):
    inputs = llava_case.inputs(RAGGED)
    family, ids = family_of(llava_case.model), inputs["input_ids"]
    tails = tokens_behind_images(family, ids, inputs["attention_mask"])
    shown = ids == family.image_token
    assert tails == (*(ids.shape[1] - 1 - int(row.nonzero()[-1]) for row in shown[:2]), 0)
    right = llava_case.inputs(RAGGED, "right")
    padded = tokens_behind_images(family, right["input_ids"], right["attention_mask"])
    assert padded == tails
    # a first layer that sees its own block alone, but for the tail and the first block
    with Local(density=None, window=8, block=8, minimum=1, tail=1)(llava_case.model) as trace:
        logits_of(llava_case.model, llava_case.inputs(RAGGED[:1]))
    computed = trace.computed[0]
    assert computed.tokens == int(inputs["attention_mask"][0].sum())
    body = (computed.tokens - tails[0]) // 8 * 8
    tail = computed.total - body * (body + 1) // 2
    assert computed.forced == int(computed.kept) == tail + body // 8 * 36 + (body - 8) * 8


def test_learners_read_the_attention_that_was_computed(llava_case):
    model, inputs = llava_case.model, llava_case.inputs(RAGGED)
    attach(model, WingsConfig(rank=2))
    try:
        dense = logits_of(model, inputs)
        with short("xattention", density=1.0)(model) as trace:
            close(logits_of(model, inputs), dense)
        assert trace.computed
        with (
            pytest.raises(InputError, match="detach the learners"),
            build_attention("recycled")(model),
        ):
            pass
    finally:
        detach(model)


def test_what_cannot_work_is_said_in_one_line(llava_case, monkeypatch):
    model = llava_case.model
    with monkeypatch.context() as patch:
        patch.setattr(type(family_of(model).decoder), "_supports_sdpa", False)
        with pytest.raises(InputError, match="stands in for SDPA, which llama models lack"):
            Pooled().admit(model)
    with Pooled()(model), pytest.raises(InputError, match="already"), Local()(model):
        pass
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(InputError, match="load it with --attn sdpa"), Pooled()(model):
            pass
    finally:
        model.set_attn_implementation("sdpa")
    layer = family_of(model).decoder.layers[0]
    layer.compile()
    try:
        with pytest.raises(InputError, match="compiled"), Pooled()(model):
            pass
    finally:
        del layer._compiled_call_impl
