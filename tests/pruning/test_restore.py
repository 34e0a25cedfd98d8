"""RESTORE's anchors, groups and attention, by loops."""

import copy

import pytest
import torch
from tiny_families import Tiny
from torch.nn.functional import cosine_similarity

from vlm_prune.kernels.pairwise_cosine import pairwise_cosine
from vlm_prune.pruning import Cascade, DivPrune, Restore
from vlm_prune.pruning.registry import build
from vlm_prune.pruning.restore import anchors_of, grouped
from vlm_prune.vlm.cache import CACHE, cache_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.layer_pruning import additive, last_rows


def slow_groups(tokens, count):
    """Of one image, in float64: anchors by density and distinctness, and the members of each."""
    tokens = tokens.detach().double()
    similarity = torch.stack([cosine_similarity(own, tokens) for own in tokens])
    density = [float(row.sum()) for row in similarity]
    score = []
    for i, own in enumerate(density):
        denser = [float(similarity[i, j]) for j in range(len(density)) if density[j] > own]
        score.append(own * (1 - max(denser) if denser else 1))
    anchors = sorted(sorted(range(len(score)), key=lambda i: -score[i])[:count])
    members = {anchor: [anchor] for anchor in anchors}
    for token in set(range(len(tokens))) - set(anchors):
        members[max(anchors, key=lambda anchor: similarity[token, anchor])].append(token)
    return {anchor: sorted(own) for anchor, own in members.items()}


def test_groups_equal_the_papers_loop():
    torch.manual_seed(0)
    tokens = torch.randn(3, 25, 8) + 0.5
    groups = grouped(tokens, 6)
    anchors = anchors_of(pairwise_cosine(tokens, tokens), 6)
    for image, own in enumerate(tokens):
        expected = slow_groups(own, 6)
        assert anchors[image].tolist() == list(expected)
        for place, members in enumerate(expected.values()):
            assert int(groups.sizes[image, place]) == len(members)
            assert int(groups.medians[image, place]) == members[(len(members) - 1) // 2]
            torch.testing.assert_close(groups.means[image, place], own[members].mean(0))
    assert groups.sizes.sum(1).tolist() == [25] * 3


@pytest.mark.parametrize(("budget", "anchors"), [(7, 0.5), (1, 0.5), (9, 0.01)])
def test_kept_tokens_and_anchors_stand_in_order(budget, anchors, llava_tiny):
    inputs = llava_tiny.inputs([[([0, 1], "red?")]])
    vision = llava_tiny.encode(inputs).groups[0].tokens
    kept = Restore(budget=budget, anchors=anchors).reduce(vision)
    alone = min(budget - 1, round(budget * (1 - anchors)))
    base = DivPrune(budget=alone).reduce(vision).indices if alone else torch.empty(2, 0).long()
    for image, own in enumerate(vision.projected):
        places, chosen = kept.indices[image].tolist(), base[image].tolist()
        assert places == sorted(set(places)) and len(places) == budget
        assert set(chosen) <= set(places) and int(kept.sizes[image].sum()) == 25
        rest = [token for token in range(25) if token not in chosen]
        expected = {token: own[token] for token in chosen}
        for members in slow_groups(own[rest], budget - alone).values():
            tokens = [rest[member] for member in members]
            expected[tokens[(len(tokens) - 1) // 2]] = own[tokens].mean(0)
            at = places.index(tokens[(len(tokens) - 1) // 2])
            assert int(kept.sizes[image][at]) == len(tokens)
        assert places == sorted(expected)
        features = torch.stack([expected[place] for place in places])
        torch.testing.assert_close(kept.features[image], features)


def test_decay_is_that_of_the_rotary_frequencies(llava_tiny):
    """log s + log(2 - mean_j cos(t theta_j)) for the first row of prompt and image, by hand."""
    tiny, seen, hooks = llava_tiny, [], []
    decoder = tiny.model.model.language_model
    inputs, pruner = tiny.inputs([[([0], "Is there a 7?")]]), Restore(budget=6)

    def note(_, args, kwargs):
        seen.append(kwargs["attention_mask"])

    with pruner(tiny.model) as trace, torch.no_grad():
        for layer in decoder.layers:  # behind the block's own hooks
            hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
        tiny.model(**inputs)
    for hook in hooks:
        hook.remove()
    kept = pruner.reduce(tiny.encode(inputs).groups[0].tokens)
    ids = inputs["input_ids"][0]
    start = int((ids == tiny.model.config.image_token_id).nonzero()[0])
    stay = [*range(start), *(start + trace.kept[0]).tolist(), *range(start + 25, len(ids))]
    size = dict(zip((start + kept.indices[0]).tolist(), kept.sizes[0].tolist(), strict=True))
    head = decoder.config.hidden_size // decoder.config.num_attention_heads
    theta = [10000 ** (-2 * j / head) for j in range(head // 2)]
    for number, mask in enumerate(seen):
        assert mask.shape == (1, 1, len(stay), len(stay))
        for m, query in enumerate(stay):
            for n, key in enumerate(stay):
                if n > m:
                    assert mask[0, 0, m, n] == torch.finfo(mask.dtype).min
                    continue
                counted = torch.tensor(float(size.get(key, 1)))
                if number == 0 and key in size:
                    counted = torch.tensor(25 / 6)
                decay = sum(torch.tensor((query - key) * t).cos() for t in theta) / len(theta)
                expected = counted.log() + (2 - decay).log()
                torch.testing.assert_close(mask[0, 0, m, n], expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_later_turns_count_sizes_and_no_distance(name):
    """One token at a time, as decoding does, or several at once."""
    tiny = Tiny(name)
    inputs, more = (
        tiny.inputs([[([0], "Is there a 7?")], [([], "What is red?")]]),
        [[50, 51, 52], [53, 54, 55]],
    )
    with Restore(budget=6)(tiny.model):
        first = cache_of(tiny.model(**inputs))
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3).long()], 1)
        one_by_one = copy.deepcopy(first)
        together = tiny.model(
            input_ids=torch.tensor(more), attention_mask=mask, **{CACHE: copy.deepcopy(first)}
        ).logits
        length = inputs["attention_mask"].shape[1]
        for step in range(3):
            out = tiny.model(
                input_ids=torch.tensor(more)[:, step : step + 1],
                attention_mask=mask[:, : length + step + 1],
                **{CACHE: one_by_one},
            )
            torch.testing.assert_close(out.logits[:, 0], together[:, step], atol=2e-5, rtol=1e-4)
        sizes = first.prompt.layers[0].sizes
        assert sizes.shape[:2] == (2, 2) and not (sizes[:, 1] != 1).any()
        assert (sizes[:, 0] > 1).any(1).all()


def test_a_cut_inside_the_model_takes_sizes_along(llava_tiny):
    method = build("divprune+restore+fastv@16", budget=6)
    assert isinstance(method, Cascade) and isinstance(method.pre, Restore)
    inputs = llava_tiny.inputs([[([0], "Is there a 7?")], [([1, 2], "What color is the star?")]])
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True}
    with method(llava_tiny.model) as trace, torch.no_grad():
        both = llava_tiny.model.generate(**inputs, **steps)
        sizes = both[CACHE if CACHE in both else "past_key_values"].prompt.layers
        alone = llava_tiny.model.generate(
            **llava_tiny.inputs([[([1, 2], "What color is the star?")]]), **steps
        )
    assert torch.equal(both.sequences[1, -3:], alone.sequences[0, -3:])
    assert all(own.sizes.shape[2] == own.valid.shape[1] for own in sizes.values())
    assert list(sizes) == [0, 2] and len(trace.kept) == 2


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_mask_is_refused(name):
    model = Tiny("llava").model
    model.model.language_model.config._attn_implementation = name
    for method in (Restore(budget=4), build("divprune+restore+fastv", budget=4)):
        with pytest.raises(InputError, match="load the model with --attn sdpa"):
            method(model)
    hidden_states = torch.zeros(1, 2, 4)
    with pytest.raises(InputError, match="--attn sdpa"):
        additive(torch.ones(1, 2), torch.zeros(1, 1, 2), hidden_states)


def test_what_does_not_go_together_is_refused():
    for name, message in (
        ("fastv+restore", "FastV does not choose tokens before"),
        ("divprune+fastv+restore", "Cascade does not choose"),
        ("downsample+restore", "Downsample does not choose"),
        ("divprune+restore+merge", "Restore changes attention to what it keeps; name it last"),
        ("restore+restore", "name it last"),
    ):
        with pytest.raises(InputError, match=message):
            build(name)
    with pytest.raises(InputError, match="anchors 0 is out of range"):
        Restore(anchors=0)


def test_masks_of_the_last_queries():
    mask = torch.arange(35.0).view(1, 1, 5, 7)
    assert torch.equal(last_rows(mask, 2), mask[:, :, 3:])
    padding = torch.ones(1, 7)
    assert last_rows(None, 2) is None and last_rows(padding, 2) is padding
