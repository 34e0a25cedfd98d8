"""How a pruned model may be called: each form gives what it gives without pruning, or one line.

`PYTHONPATH=tests python tests/pruning/test_call_forms.py` writes docs/call_forms.md from what is tested here.
"""

import copy
import threading
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import tiny_families
import torch
import transformers as hf
from tiny_families import Tiny, failing, refused_on_images, rounding, snapshot

from vlm_prune.pruning.attention import Pooled
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.cache import CACHE, cache_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.forwards import Forwards

METHODS = ["divprune", "visionzip", "downsample", "fastv", "sparsevlm", "divprune+adaptinfer"]
ROWS = [[([0], "Is there a 7?")], [([], "What is red?")], [([1, 2], "What color is the star?")]]
ALONE = ROWS[:1]
PAGE = Path(__file__).parents[2] / "docs" / "call_forms.md"


@dataclass(frozen=True)
class Form:
    """One line of the table: what a call looks like, whether it is exact or refused, and how."""

    call: str
    outcome: str
    how: str


FORMS: list[Form] = []


def form(call, outcome, how):
    """The test below is that of this call form."""
    FORMS.append(Form(call, outcome, how))
    return lambda test: test


built = cache(Tiny)


def loaded(kind):
    """The family's model, without what Qwen remembers of the last prompt's positions."""
    tiny = built(kind)
    if hasattr(tiny.model.model, "rope_deltas"):
        tiny.model.model.rope_deltas = None
    return tiny


@pytest.fixture
def llava():
    return loaded("llava")


@pytest.fixture(
    params=[
        "llava", "qwen2_5_vl", "qwen3_vl",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3_5", "gemma4_sharing")),
    ]
)  # fmt: skip
def family(request):
    return loaded(request.param)


@pytest.fixture
def tiny(request):
    """The model of a case of `on_families`."""
    return loaded(request.param)


def on_families():
    """All methods on LLaVA; where positions have rows one inside the model, and where images are crops
    with newlines one before it, the others of the two in the slow tests; there also decoders of other
    layers.
    """
    cases = [("llava", name) for name in METHODS]
    cases += [("qwen2_5_vl", "fastv"), ("llava_next", "divprune")]
    more = [("qwen2_5_vl", "divprune"), ("llava_next", "fastv"), ("qwen3_5", "fastv")]
    more += [("gemma4", "sparsevlm"), ("gemma4_sharing", "fastv")]
    cases += [pytest.param(kind, name, marks=pytest.mark.slow) for kind, name in more]
    return pytest.mark.parametrize(("tiny", "name"), cases, indirect=["tiny"])


def image_inputs(inputs):
    """What describes a prompt's images."""
    texts = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: value for name, value in inputs.items() if name not in texts}


def method(name, tiny, budget=None, **more):
    """The method; the test ends here on families that it is refused on."""
    if budget is None:  # Qwen3.5 cannot be cut before its first layer of softmax attention has run
        budget = 8 if tiny.name.startswith("qwen3_5") else 4
    built = build(name, budget=budget, **more)
    if refused_on_images(built, tiny.model):
        pytest.skip("refused on this family")
    return built


def greedy(tiny, inputs, steps=4, **more):
    with torch.inference_mode():
        return tiny.model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, return_dict_in_generate=True,
            output_logits=True, **more,
        )  # fmt: skip


def close(ours, theirs, atol=2e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


def refused(call, *words):
    """One line that says what is wrong and what would be right."""
    with pytest.raises(InputError) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)


def behind(inputs, count):
    """The prompt, whose mask says that `count` tokens of text stand before it."""
    mask = inputs["attention_mask"]
    return inputs | {"attention_mask": torch.cat([mask.new_ones(len(mask), count), mask], 1)}


def cache_from(output):
    return cache_of(dict(output))


@form("a decoding loop by hand, with and without a mask", "exact", "as `generate`, padded or not")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("masked", [True, False])
@torch.inference_mode()
def test_decoding_by_hand(name, masked, family):
    pruner, rows = method(name, family), ROWS if masked else ALONE
    inputs = family.inputs(rows)
    if not masked:
        del inputs["attention_mask"]
    with pruner(family.model):
        expected = greedy(family, inputs)
        step = family.model(**inputs)
        # another prompt between must not matter
        family.model(**family.inputs(ROWS[2:]))
        mask = inputs.get("attention_mask")
        for number, logits in enumerate(expected.logits):
            close(step.logits[:, -1], logits)
            token = expected.sequences[:, number - 4, None]
            more = {} if mask is None else {"attention_mask": mask.new_ones(len(mask), 1)}
            if mask is not None:
                mask = torch.cat([mask, more["attention_mask"]], 1)
                more = {"attention_mask": mask}
            step = family.model(input_ids=token, **more, **{CACHE: cache_from(step)})


@form("`use_cache=False`", "exact", "the question stays that of the prompt")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("positions", ["auto", "original"])
def test_decoding_without_a_cache(name, positions, family):
    pruner, inputs = method(name, family, positions=positions), family.inputs(ROWS)
    with pruner(family.model) as trace:
        cached = greedy(family, inputs)
        kept = [indices.tolist() for indices in trace.kept]
        anew = greedy(family, inputs, use_cache=False)
    assert [indices.tolist() for indices in trace.kept] == kept
    for ours, theirs in zip(anew.logits, cached.logits, strict=True):
        close(ours, theirs, rounding(family))


@form(
    "prompt lookup whose drafts repeat image placeholders", "refused", "the model refuses them too"
)
@on_families()
def test_drafts_of_placeholders(name, tiny):
    inputs = tiny.inputs(ALONE)
    if tiny.name == "qwen3_5":
        pytest.skip("transformers has no drafts for models that keep a state")
    with method(name, tiny)(tiny.model):
        refused(lambda: greedy(tiny, inputs, steps=8, prompt_lookup_num_tokens=3), "do not fit")


@form("assisted decoding", "exact", "drafts are not taken for the question")
@on_families()
def test_assisted_decoding(name, tiny):
    pruner, inputs = method(name, tiny), tiny.inputs(ALONE)
    if family_of(tiny.model).mrope:
        pytest.skip("transformers hands Qwen's positions of four rows to the assistant")
    if "mm_token_type_ids" in inputs:
        pytest.skip("transformers hands the types of tokens to the assistant")
    config = hf.LlamaConfig(**tiny_families.text_of(tiny.processor.tokenizer))
    torch.manual_seed(0)
    more = {"assistant_model": hf.LlamaForCausalLM(config).eval()}
    with pruner(tiny.model) as trace:
        expected = greedy(tiny, inputs, steps=8)
        kept = [indices.tolist() for indices in trace.kept]
        drafted = greedy(tiny, inputs, steps=8, **more)
    assert [indices.tolist() for indices in trace.kept] == kept
    assert torch.equal(drafted.sequences, expected.sequences)


@form("`max_length`, `min_length`, stopping criteria, `prefix_allowed_tokens_fn`, streamers", "exact",
      "they count the full prompt")  # fmt: skip
@on_families()
def test_what_counts_the_prompt(name, tiny):
    pruner, inputs = method(name, tiny), tiny.inputs(ALONE)
    length, seen = inputs["input_ids"].shape[1], []

    class Stop(hf.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            seen.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] >= length + 2])

    class Streamer(hf.generation.BaseStreamer):
        def put(self, value):
            seen.append(value.numel())

        def end(self):
            pass

    with pruner(tiny.model), torch.inference_mode():
        generate = tiny.model.generate
        config = hf.GenerationConfig(
            max_length=length + 6, min_length=length + 6, eos_token_id=1, pad_token_id=0
        )
        assert generate(**inputs, generation_config=config).shape[1] == length + 6
        out = generate(**inputs, max_new_tokens=9, min_new_tokens=9, stopping_criteria=[Stop()])
        assert out.shape[1] == length + 2 and seen == [length + 1, length + 2]
        seen.clear()
        allowed = generate(
            **inputs, max_new_tokens=3, min_new_tokens=3,
            prefix_allowed_tokens_fn=lambda _, ids: [40 + len(ids) - length],
        )  # fmt: skip
        assert allowed[0, length:].tolist() == [40, 41, 42]
        generate(**inputs, max_new_tokens=2, min_new_tokens=2, streamer=Streamer())
        assert seen == [length, 1, 1]


@form(
    "a later turn with the cache of the first",
    "exact",
    "equal to the full prompt, same tokens kept",
)
@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_a_second_turn(name, family):
    pruner, first = method(name, family), family.inputs(ALONE)
    with pruner(family.model):
        out = greedy(family, first)
    more = torch.tensor([[50, 51, 52]])
    ids = torch.cat([out.sequences, more], 1)
    mask = torch.ones_like(ids)
    extra = {k: v for k, v in first.items() if k not in ("input_ids", "attention_mask")}
    whole = extra | {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in whole:
        kinds = whole["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat(
            [kinds, kinds.new_zeros(1, ids.shape[1] - kinds.shape[1])], 1
        )
    with pruner(family.model):
        expected = family.model(**whole, logits_to_keep=8).logits[:, -1]
        later = greedy(
            family,
            {"input_ids": ids, "attention_mask": mask},
            **{CACHE: copy.deepcopy(cache_from(out))},
        )
    close(later.logits[0], expected)
    with method(name, family, budget=1.0)(family.model):
        again = family.model(
            input_ids=ids[:, first["input_ids"].shape[1] + 3 :], attention_mask=mask,
            **{CACHE: cache_from(out)},
        )  # fmt: skip
    close(again.logits[:, -1], expected)


@form("that cache outside a block", "refused", "masks and positions would be the full prompt's")
@torch.inference_mode()
def test_a_pruned_cache_outside_a_block(llava):
    with method("fastv", llava)(llava.model):
        cache = cache_from(llava.model(**llava.inputs(ALONE)))
    token = torch.tensor([[50]])
    refused(lambda: llava.model(input_ids=token, **{CACHE: cache}), "pruning block")


@form(
    "a text prefix in the cache, then the image", "exact", "the same tokens are kept as in one pass"
)
@on_families()
@torch.inference_mode()
def test_a_prefix_in_the_cache(name, tiny):
    pruner, inputs = method(name, tiny), tiny.inputs(ALONE)
    ids = torch.cat([torch.tensor([[60, 61, 62, 63, 64]]), inputs["input_ids"]], 1)
    shown = image_inputs(inputs)
    if tiny.name == "qwen3_5":
        pytest.skip("the model wants the types of all tokens, of those in the cache too")
    with pruner(tiny.model) as trace:
        expected = tiny.model(input_ids=ids, **shown).logits[:, -1]
        kept = [indices.tolist() for indices in trace.kept]
        prefix = tiny.model(input_ids=ids[:, :5])
        later = tiny.model(input_ids=ids[:, 5:], **shown, **{CACHE: cache_from(prefix)})
    assert [indices.tolist() for indices in trace.kept] == kept
    close(later.logits[:, -1], expected)


@form(
    "a new image in a later turn, with the cache of the first",
    "exact",
    "methods before the model: as the full prompt; inside it: chosen by this turn's question",
)
@on_families()
@torch.inference_mode()
def test_a_new_image_in_a_later_turn(name, tiny):
    pruner = method(name, tiny)
    if tiny.name == "qwen3_5":
        pytest.skip("the model wants the types of all tokens, of those in the cache too")
    one, two = tiny.inputs(ALONE), tiny.inputs([[([3], "What is red?")]])
    for inputs in (one, two):
        # plain positions, where a turn's rows and columns are not known to the next one
        inputs.pop("mm_token_type_ids", None)
    shown = image_inputs(two)
    both = {name: torch.cat([value, shown[name]]) for name, value in image_inputs(one).items()}
    both["input_ids"] = torch.cat([one["input_ids"], two["input_ids"]], 1)
    with pruner(tiny.model) as trace:
        first = tiny.model(**one)
        later = tiny.model(
            input_ids=two["input_ids"], **shown, **{CACHE: cache_from(first)},
        )  # fmt: skip
        kept = trace.kept[0].tolist()
        length = one["input_ids"].shape[1] + two["input_ids"].shape[1]
        assert cache_from(later).get_seq_length() == length
        more = tiny.model(input_ids=torch.tensor([[50]]), **{CACHE: cache_from(later)})
        assert torch.isfinite(more.logits).all()
        if name in ("divprune", "visionzip", "downsample"):
            whole = tiny.model(**both)
            assert trace.kept[1].tolist() == kept
            close(later.logits[:, -1], whole.logits[:, -1])
    whole = tiny.model(**both)
    with method(name, tiny, budget=1.0)(tiny.model):
        first = tiny.model(**one)
        later = tiny.model(
            input_ids=two["input_ids"], **shown, **{CACHE: cache_from(first)},
        )  # fmt: skip
    close(later.logits, whole.logits[:, -two["input_ids"].shape[1] :])


@form("`position_ids` that the caller gives", "exact", "pruned positions are renumbered from them")
@on_families()
@torch.inference_mode()
def test_positions_that_the_caller_gives(name, tiny):
    inputs = tiny.inputs(ALONE)
    given = torch.arange(inputs["input_ids"].shape[1])[None] * 3 + 5
    if family_of(tiny.model).mrope:
        given = torch.stack([given, given + 1, given * 2])
    plain = tiny.model(**inputs, position_ids=given).logits
    with method(name, tiny, budget=1.0)(tiny.model):
        close(tiny.model(**inputs, position_ids=given).logits, plain)
    # a shift of all positions changes nothing in rotary attention
    with method(name, tiny)(tiny.model) as trace:
        ours = tiny.model(**inputs, position_ids=given).logits
        assert len(trace.kept[0]) < trace.available[0]
        close(tiny.model(**inputs, position_ids=given + 7).logits, ours, atol=1e-4)


@form(
    "several sequences packed into one row, by position ids or `cu_seq_lens_q`",
    "refused",
    "give each a row of its own",
)
@on_families()
@torch.inference_mode()
def test_packed_sequences(name, tiny):
    inputs = tiny.inputs(ALONE)
    del inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    text = torch.arange(length)[None]
    restarts = torch.cat([text[:, :4], text[:, 4:] - 4], 1)
    mrope = family_of(tiny.model).mrope
    # Gemma 4 takes gaps for the ends of sequences
    gapped = not mrope and tiny.name != "gemma4"

    def rows(positions):
        return positions.expand(4, 1, -1) if mrope else positions

    alone = tiny.model(**inputs, position_ids=rows(text)).logits
    packed = tiny.model(**inputs, position_ids=rows(restarts), use_cache=False).logits
    assert (packed - alone).abs().max() > 0.1
    lengths = torch.tensor([0, 4, length], dtype=torch.int32)
    with method(name, tiny)(tiny.model):
        for more in (
            {"position_ids": rows(restarts)},
            {"position_ids": rows(restarts), "use_cache": False},
            {"position_ids": rows(text * 3), "use_cache": False},
            {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths},
        ):
            refused(lambda more=more: tiny.model(**inputs, **more), "pack", "row of its own")
    with method(name, tiny, budget=1.0)(tiny.model):
        close(tiny.model(**inputs, position_ids=rows(text)).logits, alone)
        if gapped:
            gaps = tiny.model(**inputs, position_ids=text * 3).logits
    if gapped:
        close(gaps, tiny.model(**inputs, position_ids=text * 3).logits)


@form(
    "`inputs_embeds` with `pixel_values`", "exact", "placeholders are recognized by their embedding"
)
@on_families()
@torch.inference_mode()
def test_embeddings_instead_of_ids(name, tiny):
    inputs, pruner = tiny.inputs(ROWS), method(name, tiny)
    if tiny.name in ("gemma4", "qwen3_5"):
        pytest.skip("the model wants ids, or the types of tokens")
    # without ids Qwen takes plain positions
    inputs.pop("mm_token_type_ids", None)
    embeds = tiny.model.get_input_embeddings()(inputs["input_ids"])
    more = {name: value for name, value in inputs.items() if name != "input_ids"}
    plain = tiny.model(inputs_embeds=embeds, **more).logits
    with method(name, tiny, budget=1.0)(tiny.model):
        close(tiny.model(inputs_embeds=embeds, **more).logits[:, -1], plain[:, -1])
    with pruner(tiny.model):
        close(
            tiny.model(inputs_embeds=embeds, **more).logits[:, -1],
            tiny.model(**inputs).logits[:, -1],
        )


@form("`inputs_embeds` without `pixel_values`, of text or merged with image features", "refused",
      "it is unknown which tokens are an image's; a cached prompt may continue with one token at a time")  # fmt: skip
@on_families()
@torch.inference_mode()
def test_embeddings_alone(name, tiny):
    inputs, pruner, merged = tiny.inputs(ALONE), method(name, tiny), []
    if tiny.name == "gemma4":
        pytest.skip("the model wants ids")
    language, embed = tiny.model.model.language_model, tiny.model.get_input_embeddings()
    handle = language.register_forward_pre_hook(
        lambda _, args, kwargs: merged.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    tiny.model(**inputs)
    handle.remove()
    token = torch.tensor([[50]])
    with pruner(tiny.model):
        for embeds in (merged[0], embed(torch.tensor([[50, 51, 52]]))):
            refused(lambda given=embeds: tiny.model(inputs_embeds=given), "inputs_embeds")
            refused(
                lambda given=embeds: tiny.model.generate(inputs_embeds=given, max_new_tokens=2),
                "inputs_embeds",
            )
        caches = [cache_from(tiny.model(**inputs)) for _ in range(2)]
        expected = tiny.model(input_ids=token, **{CACHE: caches[0]}).logits
        close(tiny.model(inputs_embeds=embed(token), **{CACHE: caches[1]}).logits, expected)


@form("image tokens that `attention_mask` masks", "exact", "never scored, kept or attended")
@on_families()
@torch.inference_mode()
def test_masked_image_tokens(name, tiny):
    inputs = tiny.inputs(ALONE)
    # transformers cannot count rows and columns of an image that is masked in part
    inputs.pop("mm_token_type_ids", None)
    at = (inputs["input_ids"][0] == tiny.model.config.image_token_id).nonzero()[:, 0]
    inputs["attention_mask"][0, at[3:9]] = 0
    plain = greedy(tiny, inputs)
    with method(name, tiny, budget=1.0)(tiny.model):
        out = greedy(tiny, inputs)
    for ours, theirs in zip(out.logits, plain.logits, strict=True):
        close(ours, theirs)
    with method(name, tiny)(tiny.model) as trace:
        greedy(tiny, inputs)
    assert not set(trace.kept[0].tolist()) & set(range(3, 9))
    inputs["attention_mask"][0, at] = 0
    plain = greedy(tiny, inputs)
    with method(name, tiny)(tiny.model) as trace:
        out = greedy(tiny, inputs)
    assert not len(trace.kept[0])
    close(out.logits[-1], plain.logits[-1])


MIXED = ["full_attention", "sliding_attention"] * 2
SLIDING = {
    "mistral": partial(hf.MistralConfig, sliding_window=9, head_dim=16),
    "qwen2": partial(
        hf.Qwen2Config, use_sliding_window=True, sliding_window=9, max_window_layers=0,
        layer_types=["sliding_attention"] * 4,
    ),
    "mixed": partial(
        hf.Qwen2Config, use_sliding_window=True, sliding_window=9, max_window_layers=0,
        layer_types=MIXED,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SLIDING))
def sliding(request):
    """The tiny LLaVA around another decoder."""
    return Tiny("llava", text=SLIDING[request.param])


@form(
    "decoders with sliding windows, in all layers or some",
    "exact",
    "each layer keeps its kind of mask",
)
@pytest.mark.parametrize("name", METHODS)
def test_sliding_windows(name, sliding):
    inputs = sliding.inputs(ROWS)
    plain = greedy(sliding, inputs)
    with method(name, sliding, budget=1.0)(sliding.model):
        kept_all = greedy(sliding, inputs)
    for ours, theirs in zip(kept_all.logits, plain.logits, strict=True):
        close(ours, theirs)
    with method(name, sliding)(sliding.model):
        cached = greedy(sliding, inputs)
        anew = greedy(sliding, inputs, use_cache=False)
        alone = greedy(sliding, sliding.inputs(ALONE))
    for ours, theirs, one in zip(anew.logits, cached.logits, alone.logits, strict=True):
        close(ours, theirs)
        close(one[0], theirs[0])


@form(
    "scores of attention in a sliding window",
    "exact",
    "as in the layer: tokens outside the window get none",
)
@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "pyramiddrop", "adaptinfer"])
@torch.inference_mode()
def test_scores_are_of_the_layers_own_attention(name, sliding, monkeypatch):
    """At each cut against the maps that the layer before it computes inside the block, or the layer
    after it without pruning."""
    schedule = {"layers": 4, "places": [1, 2, 3], "shares": [4, 2, 1]}
    pruner = method(name, sliding, budget=14, schedule=schedule)
    model, inputs, maps, scored = sliding.model, sliding.inputs(ROWS), {}, []
    layers, cuts = model.model.language_model.layers, [1, 2, 3]

    def note(number):
        def keep(module, args, output):
            maps[number] = output[1]

        return keep

    def score(tokens, scores=pruner.score):
        scored.append((tokens, scores(tokens)))
        return scored[-1][1]

    monkeypatch.setattr(pruner, "score", score, raising=False)
    hooks = [
        layer.self_attn.register_forward_hook(note(number)) for number, layer in enumerate(layers)
    ]
    model.set_attn_implementation("eager")
    try:
        with pruner(model):
            model(**inputs)
        if pruner.reads == "after":
            model(**inputs)
    finally:
        model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    if pruner.reads == "after":
        # of later cuts the layer after them sees what these keep alone
        cuts, scored = cuts[:1], scored[:1]
    assert len(cuts) == len(scored)
    windowed = False
    for cut, (tokens, scores) in zip(cuts, scored, strict=True):
        weights = maps[cut if pruner.reads == "after" else cut - 1]
        rows = tokens.question_rows(slice(None))
        if name == "fastv":
            rows, reads = tokens.prompt_rows(), tokens.prompt_rows().columns
        else:
            reads = rows.columns.masked_fill(~tokens.query_mask, -1)
        if name == "pyramiddrop":
            reads = rows.columns.clone()
            reads[:, :-1] = -1
        windowed |= rows.window is not None
        for image, row in enumerate((0, 2, 2)):
            at = [int(column) for column in reads[image] if column >= 0]
            pays = weights[row][:, at].double()
            if name == "adaptinfer":
                # how much each token of the question matters to the question, per head
                prior = torch.zeros(pays.shape[:2], dtype=torch.float64)
                for head in range(len(pays)):
                    for n, one in enumerate(at):
                        for m, other in enumerate(at):
                            prior[head, n] += pays[head, m, one] + (n != m) * pays[head, n, other]
                expected = (prior[..., None] * pays).sum((0, 1))
            else:
                expected = pays.mean((0, 1))
            for token, column in enumerate(rows.image[image].tolist()):
                close(scores[image, token].double(), expected[column], atol=1e-6)
    assert windowed


@form(
    "static caches, masks made beforehand (4-D)", "refused", "give a growing cache and a 2-D mask"
)
@on_families()
@torch.inference_mode()
def test_static_caches_and_masks(name, tiny):
    inputs, pruner = tiny.inputs(ALONE), method(name, tiny)
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with pruner(tiny.model):
        refused(lambda: tiny.model.generate(**inputs, cache_implementation="static"), "static")
        refused(lambda: tiny.model(**inputs | {"attention_mask": mask}), "(batch, length)")


@form("a quantized cache (`cache_implementation=\"quantized\"`)", "exact",
      "methods inside the model refuse an image after a cached prefix")  # fmt: skip
@on_families()
@torch.inference_mode()
def test_quantized_caches(name, tiny):
    try:
        hf.QuantizedCache("fp8", tiny.model.config)
    except ValueError:
        pytest.skip("this transformers quantizes caches with other libraries only")
    inputs, pruner = tiny.inputs(ALONE), method(name, tiny)
    coded = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    plain = greedy(tiny, inputs, **coded)
    with method(name, tiny, budget=1.0)(tiny.model):
        kept_all = greedy(tiny, inputs, **coded)
    for ours, theirs in zip(kept_all.logits, plain.logits, strict=True):
        close(ours, theirs)
    entered = []
    first = tiny.model.model.language_model.layers[0]
    with pruner(tiny.model) as trace:
        # what the first layer gets after the cut in front of it
        handle = first.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        fine = greedy(tiny, inputs, steps=2)
        handle.remove()
        kept = [indices.tolist() for indices in trace.kept]
        coarse = greedy(tiny, inputs, steps=2, **coded)
        assert [indices.tolist() for indices in trace.kept] == kept
        assert isinstance(cache_from(coarse), hf.QuantizedCache)
        close(coarse.logits[0], fine.logits[0])
        close(coarse.logits[1], fine.logits[1], atol=0.5)
        assert not torch.equal(coarse.logits[1], fine.logits[1])
        prefix = hf.QuantizedCache("fp8", tiny.model.config)
        tiny.model(input_ids=torch.tensor([[60, 61, 62]]), **{CACHE: prefix})
        if "fastv" in name or "sparsevlm" in name or "adaptinfer" in name:
            refused(lambda: tiny.model(**behind(inputs, 3), **{CACHE: prefix}), "quantized")
    if name in ("divprune", "visionzip", "downsample") and not family_of(tiny.model).mrope:
        short = greedy(tiny, {"inputs_embeds": entered[0]}, steps=2, **coded)
        for ours, theirs in zip(coarse.logits, short.logits, strict=True):
            close(ours, theirs)


class NoStream:
    """Stands for an accelerator's stream where there is none: the CPU does one thing at a time."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, other):
        pass


@form("an offloaded cache (`cache_implementation=\"offloaded\"`)", "exact",
      "methods inside the model refuse an image after a cached prefix")  # fmt: skip
@on_families()
@torch.inference_mode()
def test_offloaded_caches(name, tiny, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: NoStream())
    inputs, pruner = tiny.inputs(ALONE), method(name, tiny)
    with pruner(tiny.model):
        expected = greedy(tiny, inputs)
        found = greedy(tiny, inputs, cache_implementation="offloaded")
        assert cache_from(found).offloading
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            close(ours, theirs)
        prefix = hf.DynamicCache(config=tiny.model.config, offloading=True)
        tiny.model(input_ids=torch.tensor([[60, 61, 62]]), **{CACHE: prefix})
        if "fastv" in name or "sparsevlm" in name or "adaptinfer" in name:
            refused(lambda: tiny.model(**behind(inputs, 3), **{CACHE: prefix}), "offloaded")


@pytest.mark.slow
@form("a model or module that is compiled before, inside or after the block", "refused inside it",
      "hooks do not run in compiled code; after the block it is the unpruned model")  # fmt: skip
@pytest.mark.parametrize(
    ("name", "way"),
    [("divprune", "language"),
     *(("fastv", way) for way in ("wrapped", "model", "language", "forward", "function", "replaced"))],
)  # fmt: skip
@torch.inference_mode()
def test_compiled_models(name, way, monkeypatch):
    """A model of one layer, as tracing a whole one takes its time."""
    monkeypatch.setattr(tiny_families, "LAYERS", 1)
    tiny = Tiny("llava")
    model, inputs, pruner = tiny.model, tiny.inputs(ALONE), method(name, tiny)
    plain = model(**inputs).logits
    multimodal, language = model.model, model.model.language_model
    compiled = partial(torch.compile, backend="eager")

    def make():
        if way in ("model", "language"):
            (model if way == "model" else language).compile(backend="eager")
        elif way == "forward":
            model.forward = compiled(model.forward)
        elif way == "replaced":
            multimodal.language_model = compiled(language)
        elif way == "wrapped":
            return compiled(model)
        else:
            return compiled(lambda **given: model(**given))
        return model

    def undo():
        vars(model).pop("forward", None)
        multimodal.language_model = language
        for module in (model, language):
            vars(module).pop("_compiled_call_impl", None)

    for before in (True, False):
        torch._dynamo.reset()
        if before:
            call = make()
            close(call(**inputs).logits, plain)
        try:
            with pruner(model):
                if not before:
                    call = make()
                refused(lambda call=call: call(**inputs), "compiled")
        except InputError as refusal:
            assert before and "compiled" in str(refusal)
        close(call(**inputs).logits, plain)
        undo()
    torch._dynamo.reset()
    with pruner(model):
        assert model(**inputs).logits.shape[1] < plain.shape[1]


@form("a copy of the model, made inside a block", "exact", "the copy is not pruned")
@on_families()
@torch.inference_mode()
def test_copies(name, tiny):
    inputs = tiny.inputs(ALONE)
    plain = tiny.model(**inputs).logits
    with method(name, tiny)(tiny.model):
        copied = copy.deepcopy(tiny.model)
        pruned = tiny.model(**inputs).logits
        close(copied(**inputs).logits, plain)
        with method(name, tiny)(copied):
            close(copied(**inputs).logits, pruned)
    close(copied(**inputs).logits, plain)


@form("several threads in one block", "exact", "a forward carries its own state")
@on_families()
def test_threads(name, tiny):
    prompts = [tiny.inputs([[([n], text)]]) for n in range(4) for text in ("red?", "Is it a 7?")]
    with method(name, tiny)(tiny.model):
        expected = [greedy(tiny, inputs).sequences for inputs in prompts]
        found = [None] * len(prompts)

        def run(first):
            for number in range(first, len(prompts), 4):
                found[number] = greedy(tiny, prompts[number]).sequences

        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@form(
    "leaving the block while another thread generates", "refused", "that thread's cache is pruned"
)
def test_a_block_left_while_a_thread_generates(llava):
    inputs, errors = llava.inputs(ALONE), []
    started, left = threading.Event(), threading.Event()

    class Wait(hf.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            started.set()
            left.wait(30)
            return torch.tensor([False])

    def run():
        try:
            greedy(llava, inputs, stopping_criteria=[Wait()])
        except InputError as error:
            errors.append(str(error))

    with method("fastv", llava)(llava.model):
        thread = threading.Thread(target=run)
        thread.start()
        started.wait(30)
    left.set()
    thread.join()
    assert len(errors) == 1 and "pruning block" in errors[0]


def test_an_interrupted_end_leaves_the_model_as_it_was(llava, monkeypatch):
    """Ctrl-C while a block waits for the forward of another thread, as in a loop over a streamer."""

    def interrupted(_):
        raise KeyboardInterrupt

    before = snapshot(llava.model)
    for block in (method("divprune", llava), Pooled()):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Forwards, "wait", interrupted)
            with block(llava.model):
                pass
        assert snapshot(llava.model) == before
        with block(llava.model):
            pass


@torch.inference_mode()
def test_hooks_of_others_keep_what_they_were_given(llava):
    kept = []
    hook = llava.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append((kwargs, set(kwargs))), with_kwargs=True
    )
    try:
        with method("divprune", llava)(llava.model):
            llava.model.generate(**llava.inputs(ALONE), max_new_tokens=3, min_new_tokens=3)
    finally:
        hook.remove()
    assert len(kept) == 3
    for kwargs, names in kept[1:]:
        assert set(kwargs) == names


@form("a block inside a block of the same model", "refused", "combine methods: `divprune+fastv`")
@pytest.mark.parametrize("outer", METHODS)
@pytest.mark.parametrize("inner", ["divprune", "fastv", "divprune+adaptinfer"])
@torch.inference_mode()
def test_nested_blocks(outer, inner, llava):
    inputs, before = llava.inputs(ALONE), snapshot(llava.model)
    with method(outer, llava)(llava.model):
        expected = llava.model(**inputs).logits
        refused(lambda: method(inner, llava)(llava.model).__enter__(), "divprune+fastv")
        close(llava.model(**inputs).logits, expected)
    assert snapshot(llava.model) == before


@form(
    "a model with its own `generate`, hooks and forwards",
    "exact",
    "they are used, and restored after the block",
)
@on_families()
@torch.inference_mode()
def test_what_was_there_comes_back(name, tiny):
    model, calls, inputs = tiny.model, [], tiny.inputs(ALONE)
    plain = model.generate(**inputs, max_new_tokens=2)
    generate, encode = model.generate, model.model.get_image_features

    def own_generate(*args, **kwargs):
        calls.append("generate")
        return generate(*args, **kwargs)

    def own_encode(pixel_values, *args, **kwargs):
        calls.append("encode")
        return encode(pixel_values, *args, **kwargs)

    def hook(*_):
        calls.append("hook")

    model.generate, model.model.get_image_features = own_generate, own_encode
    handle = model.model.language_model.register_forward_pre_hook(hook)
    try:
        before = snapshot(model)
        for layer in (None, model.model.language_model.layers[3].self_attn.q_proj):
            if layer is None:
                with method(name, tiny)(model):
                    model.generate(**inputs, max_new_tokens=2)
            else:
                with failing(layer), method(name, tiny)(model):
                    model.generate(**inputs, max_new_tokens=2)
            assert snapshot(model) == before
            assert model.generate is own_generate
            assert model.model.get_image_features is own_encode
        assert set(calls) == {"generate", "encode", "hook"}
    finally:
        handle.remove()
        del model.generate, model.model.get_image_features
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), plain)


@form(
    "`labels`, `Trainer`",
    "exact",
    "labels are shortened with the prompt; gradients flow to the tower",
)
@on_families()
def test_labels_and_gradients(name, tiny):
    model, inputs = copy.deepcopy(tiny.model), tiny.inputs(ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == model.config.image_token_id] = -100
    # padding in front would predict a row's first token
    labels[torch.arange(len(labels)), inputs["attention_mask"].argmax(1)] = -100
    given = labels.clone()

    def gradients(block=None):
        model.zero_grad()
        if block is None:
            loss = model(**inputs, labels=labels).loss
        else:
            with block(model):
                loss = model(**inputs, labels=labels).loss
        loss.backward()
        own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), own

    loss, plain = gradients()
    kept_all, ours = gradients(method(name, tiny, budget=1.0))
    close(kept_all, loss)
    assert ours.keys() == plain.keys()
    for parameter, gradient in plain.items():
        torch.testing.assert_close(ours[parameter], gradient, atol=1e-4, rtol=1e-3, msg=parameter)
    assert torch.equal(labels, given)
    _, pruned = gradients(method(name, tiny))
    tower, projector = "vision_tower", "multi_modal_projector"
    if family_of(tiny.model).mrope:
        tower, projector = "visual.blocks", "visual.merger"
    if tiny.name == "gemma4":
        projector = "embed_vision"
    for part in (tower, projector, "language_model"):
        assert any(part in n and float(g.abs().sum()) > 0 for n, g in pruned.items())
    with method(name, tiny)(model) as trace, torch.no_grad():
        out = model(**inputs, labels=labels)
    assert out.logits.shape[1] < labels.shape[1]
    # by hand: each kept token predicts the label of the one that is kept after it
    kept, available, terms = iter(trace.kept), iter(trace.available), []
    for logits, ids, own, valid in zip(
        out.logits, inputs["input_ids"], labels, inputs["attention_mask"].bool(), strict=True
    ):
        stays = valid & (ids != model.config.image_token_id)
        images = (ids == model.config.image_token_id).nonzero()[:, 0]
        while len(images):
            count = next(available)
            stays[images[:count][next(kept)]] = True
            images = images[count:]
        wanted, chances = own[stays][1:], logits[-int(stays.sum()) : -1].log_softmax(-1)
        terms += [-chances[at, label] for at, label in enumerate(wanted) if label != -100]
    close(out.loss, torch.stack(terms).mean())


@form(
    "`Trainer.train` and `Trainer.evaluate` inside a block",
    "exact",
    "any model of a supported family",
)
@pytest.mark.parametrize("name", ["divprune", "fastv"])
def test_a_trainer_inside_a_block(name, family, tmp_path):
    pytest.importorskip("accelerate")
    model, samples = copy.deepcopy(family.model), [family.inputs(ALONE) for _ in range(2)]
    for sample in samples:
        sample["labels"] = sample["input_ids"].clone()
    options = hf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, per_device_eval_batch_size=1, max_steps=2,
        report_to=[], save_strategy="no", learning_rate=0.01, use_cpu=True, disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    trainer = hf.Trainer(
        model, options, train_dataset=samples, eval_dataset=samples,
        data_collator=lambda rows: dict(rows[0]),  # Qwen's pixels have no dimension of a batch
    )  # fmt: skip
    with method(name, family)(model):
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@form("a PEFT model", "exact", "the model inside is pruned, adapters included")
@pytest.mark.parametrize("name", ["divprune", "fastv", "divprune+adaptinfer"])
@torch.inference_mode()
def test_a_peft_model(name, family):
    peft = pytest.importorskip("peft")
    inputs, model = family.inputs(ALONE), copy.deepcopy(family.model)
    layers = r".*language_model.*\.(q|v)_proj"
    config = peft.LoraConfig(target_modules=layers, r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with method(name, family)(adapted):
        ours = adapted(**inputs).logits
        generated = adapted.generate(**inputs, max_new_tokens=3)
    merged = adapted.merge_and_unload()
    with method(name, family)(merged):
        close(ours, merged(**inputs).logits, atol=1e-4)
        assert torch.equal(generated, merged.generate(**inputs, max_new_tokens=3))


@form("`torch.autocast`", "exact", "within bfloat16's error, with a cache and without one")
@on_families()
@torch.inference_mode()
def test_autocast(name, tiny):
    inputs = tiny.inputs(ALONE)
    with torch.autocast("cpu", torch.bfloat16):
        plain = tiny.model(**inputs).logits
        with method(name, tiny, budget=1.0)(tiny.model):
            close(tiny.model(**inputs).logits.float(), plain.float(), atol=0.2)
        with method(name, tiny)(tiny.model) as trace:
            cached = greedy(tiny, inputs, steps=2)
            kept = [indices.tolist() for indices in trace.kept]
            anew = greedy(tiny, inputs, steps=2, use_cache=False)
            assert [indices.tolist() for indices in trace.kept] == kept
    for ours, theirs in zip(cached.logits, anew.logits, strict=True):
        close(ours, theirs, atol=0.2)


@form("beams, `num_return_sequences`", "exact", "rows repeat with their images")
@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_repeated_rows(name, family):
    inputs, pruner = family.inputs([ROWS[2]]), method(name, family)
    steps = {"max_new_tokens": 4, "min_new_tokens": 4}
    with pruner(family.model):
        beams = family.model.generate(**inputs, **steps, num_beams=3, num_return_sequences=2)
        anew = family.model.generate(
            **inputs, **steps, num_beams=3, num_return_sequences=2, use_cache=False
        )
    assert torch.equal(beams, anew)


@form("Qwen without `mm_token_type_ids`", "exact", "plain positions, as transformers then uses")
@pytest.mark.parametrize("name", ["divprune", "fastv"])
@torch.inference_mode()
def test_qwen_without_token_types(name):
    tiny = Tiny("qwen2_5_vl")
    inputs = tiny.inputs(ALONE)
    del inputs["mm_token_type_ids"]
    plain = greedy(tiny, inputs)
    with method(name, tiny, budget=1.0)(tiny.model):
        out = greedy(tiny, inputs)
    for ours, theirs in zip(out.logits, plain.logits, strict=True):
        close(ours, theirs)


def page():
    """docs/call_forms.md."""
    lines = [f"| {one.call} | {one.outcome} | {one.how} |" for one in FORMS]
    return "\n".join([
        "# How a pruned model may be called", "",
        "Inside `with pruner(model):` a call is *exact*, which means that it gives what the same call",
        "gives for the kept tokens, or it is *refused*, with one line that says what to do instead.",
        "Each row of this table is a test of `tests/pruning/test_call_forms.py`, which writes this page.",
        "",
        "- Logits, hidden states and labels of a direct forward have the length of what is kept;",
        "  `generate`, stopping rules, streamers and caches see the full prompt.",
        "- `logits_to_keep=k` means that the last k - 1 tokens are not part of the prompt: assisted",
        "  decoding passes its drafts so. Without a cache, a longer prompt with the same image tensor",
        "  counts as the same prompt.",
        "",
        "| call | outcome | how |", "|---|---|---|", *lines, "",
    ])  # fmt: skip


def test_the_page_says_what_is_tested():
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
