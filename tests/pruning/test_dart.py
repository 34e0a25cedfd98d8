"""DART against a slow loop written from the paper: pivots, then the least similar tokens."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.dart import Dart
from vlm_prune.vlm.cache import CACHE
from vlm_prune.vlm.common.errors import InputError


@pytest.mark.parametrize("keep", [3, 9, 17])
def test_reduce_equals_the_papers_loop(keep):
    torch.manual_seed(0)
    features, question = torch.randn(2, 30, 8), torch.randn(2, 6, 8)
    keys, text_keys = torch.randn(2, 30, 8), torch.randn(2, 6, 8)
    question_mask = torch.tensor([[True] * 6, [False] * 5 + [True]])
    tokens = SimpleNamespace(
        features=features,
        question=question,
        question_mask=question_mask,
        keys=lambda: (keys, text_keys),
    )
    kept = Dart(image_pivots=4, text_pivots=2).reduce(tokens, keep)
    for image in range(2):
        by_norm = sorted(range(30), key=lambda i: -float(keys[image, i].norm()))
        chosen = set(by_norm[: min(4, keep)])
        pivots = [features[image, i] for i in sorted(chosen)]
        words = [j for j in range(6) if question_mask[image, j]]
        longest = sorted(words, key=lambda j: -float(text_keys[image, j].norm()))[:2]
        pivots += [question[image, j] for j in sorted(longest)]
        left = keep - len(chosen)
        for number, pivot in enumerate(pivots):
            share = left * (number + 1) // len(pivots) - left * number // len(pivots)
            for _ in range(share):
                free = [i for i in range(30) if i not in chosen]
                chosen.add(
                    min(free, key=lambda i: float(cosine_similarity(features[image, i], pivot, 0)))
                )
        assert kept.indices[image].tolist() == sorted(chosen)
        assert torch.equal(kept.features[image], features[image, sorted(chosen)])


def test_key_norms_are_those_of_the_cache(llava, images, make_inputs):
    """The pivots are the four tokens with the longest cached keys of the layer before the cut."""
    inputs = make_inputs([(1, "Is there a 7?")], images)
    with torch.no_grad():
        cache = llava(**inputs, use_cache=True)[CACHE]
    image = (inputs["input_ids"][0] == llava.config.image_token_id).nonzero()[:, 0]
    norms = cache.layers[2].keys[0, :, image].norm(dim=(0, 2))
    with Dart(budget=400, layer=16)(llava) as trace, torch.no_grad():
        llava(**inputs)
    assert set(norms.topk(4).indices.tolist()) <= set(trace.kept[0].tolist())


def test_the_released_rule_compares_rotated_keys_and_normed_states(llava, images, make_inputs):
    """Against a loop over the cached keys and the states of the layer before the cut."""
    inputs = make_inputs([(1, "Is there a 7?")], images)
    decoder = llava.model.language_model
    with torch.no_grad():
        out = llava(**inputs, use_cache=True, output_hidden_states=True)
        normed = decoder.norm(out.hidden_states[3])[0]
    keys = out[CACHE].layers[2].keys[0].transpose(0, 1).flatten(1)
    is_image = inputs["input_ids"][0] == llava.config.image_token_id
    image, keep = is_image.nonzero()[:, 0].tolist(), (400 - 576 // 2) * 2
    text = range(image[-1] + 1, len(is_image))
    size = {place: float(keys[place].abs().sum()) for place in [*image, *text]}
    pivots = sorted(sorted(image, key=lambda place: -size[place])[:4])
    chosen = set(pivots)
    pivots += sorted(sorted(text, key=lambda place: -size[place])[:4])
    for number, pivot in enumerate(pivots):
        share = (keep - 4) * (number + 1) // 8 - (keep - 4) * number // 8
        similar = cosine_similarity(normed, normed[pivot], 1).tolist()
        free = sorted((p for p in image if p not in chosen), key=lambda place: similar[place])
        chosen |= set(free[:share])
    kept = {}
    for released in (False, True):
        method = Dart(budget=400, layer=16, released=released)
        with method(llava) as trace, torch.no_grad():
            llava(**inputs)
        kept[released] = {image[index] for index in trace.kept[0].tolist()}
    assert len(chosen) == keep == len(kept[True])
    assert len(chosen ^ kept[True]) <= 2  # rounding may order two like tokens differently
    assert len(kept[False] ^ kept[True]) > 20


@pytest.mark.parametrize("wrong", [{"image_pivots": 0}, {"image_pivots": -1}, {"text_pivots": -1}])
def test_pivots_are_needed(wrong):
    with pytest.raises(InputError, match="pivot"):
        Dart(**wrong)
