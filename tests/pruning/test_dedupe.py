"""What an image shows twice is kept once, and nothing else goes."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vlm_prune.pruning import Dedupe, Restore
from vlm_prune.pruning.dedupe import first_of_their_kind
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.block import pruned
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.distinct_views import DistinctViews, first_equal
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.serving.settings import Settings
from vlm_prune.vlm.tokens import VisionTokens


def slow_first(patches, threshold):
    """Of one image, patch by patch."""
    seen, new = [], []
    for own in patches:
        rounded = [round(value / threshold) if threshold else value for value in own]
        new.append(rounded not in seen)
        seen.append(rounded)
    return new


@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_repeated_patches_are_found_as_by_a_loop(threshold):
    torch.manual_seed(0)
    kinds = torch.randn(6, 5)
    patches = kinds[torch.randint(6, (3, 20))] + torch.randint(2, (3, 20, 1)) * 0.001
    patches[0, 3], patches[0, 7] = 0.0, -0.0
    new = first_of_their_kind(patches, threshold)
    for image, own in enumerate(patches):
        assert new[image].tolist() == slow_first(own.tolist(), threshold)
    assert int(new.sum()) < 60


def test_pixels_are_alike_where_they_round_to_the_same_multiple_of_the_threshold():
    patches = torch.tensor([[0.24, 1.0], [0.26, 1.0], [0.36, 1.0], [0.40, 1.0]])[None]
    assert first_of_their_kind(patches, 0.25).tolist() == [[True, False, False, True]]


@contextmanager
def showing(tiny, picture):
    """The first picture of a tiny model is another one."""
    before, tiny.pictures[0] = tiny.pictures[0], picture
    try:
        yield tiny
    finally:
        tiny.pictures[0] = before


def page(width, height):
    """White, with a black box."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).rectangle((20, 20, 45, 30), fill="black")
    return image


def test_all_patches_are_still_there(tiny):
    """Lossless at threshold 0, on every family: each dropped patch is one of the kept ones, and of an
    image without repetitions nothing goes."""
    with showing(tiny, page(84, 84)):
        inputs = tiny.inputs([[([0, 1], "red?")]])
    with Dedupe(budget=1.0)(tiny.model) as trace, torch.no_grad():
        tiny.model(**inputs)
    dropped = 0
    for group in tiny.encode(inputs).groups:
        patches = group.tokens.patches()
        assert patches.shape[:2] == group.tokens.projected.shape[:2]
        for place, image in enumerate(group.members):
            own, kept = patches[place], trace.kept[image].tolist()
            if group.indices is not None:
                at = {token: n for n, token in enumerate(group.indices.tolist())}
                kept = [at[token] for token in kept if token in at]
            assert kept == [i for i, new in enumerate(slow_first(own.tolist(), 0)) if new]
            distinct = own.unique(dim=0)
            assert torch.equal(own[kept].unique(dim=0), distinct)
            dropped += group.size - len(kept)
    assert dropped


@pytest.mark.parametrize("name", ["dedupe", "fopru+dedupe"])
def test_equal_views_pass_through_the_tower_once(name, tiny):
    """With the same result on every family; where views see each other all of them pass."""
    with showing(tiny, page(84, 84)):
        inputs = tiny.inputs([[([0, 1], "red?")], [([0], "Is there a 7?")]])
    pruner = build(name, budget=0.5)
    family, rows = family_of(tiny.model), []
    layer = family.tower_layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].numel()))
    try:
        with pruner(tiny.model) as once, torch.no_grad():
            logits = tiny.model(**inputs).logits
        before = pruner.before_model(family, None)
        with (
            pruned(tiny.model, before=replace(before, distinct_views=False)) as apart,
            torch.no_grad(),
        ):
            expected = tiny.model(**inputs).logits
    finally:
        hook.remove()
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(once.kept, apart.kept, strict=True):
        assert torch.equal(ours, theirs)
    once_seen, all_seen = (sum(half) for half in np.split(np.array(rows), 2))
    assert (once_seen < all_seen) == (family.view_tower is not None)


def test_views_are_equal_where_all_that_belongs_to_them_is():
    views, masks = torch.tensor([[1.0], [2.0], [1.0], [1.0], [2.0]]), torch.tensor([0, 0, 0, 1, 0])
    seen = DistinctViews()
    given = seen.chosen({"pixel_values": views, "mask": masks[:, None], "other": 3})
    assert given["pixel_values"][:, 0].tolist() == [1, 2, 1]
    assert given["mask"][:, 0].tolist() == [0, 0, 1] and given["other"] == 3
    assert seen.expanded((given["pixel_values"], None))[0].equal(views)
    assert first_equal(views).tolist() == [0, 1, 0, 0, 1]


def test_patches_are_the_pixels_behind_a_token(tiny):
    """A picture that is changed in one corner has few other patches, the first one among them."""
    (group,) = tiny.encode(tiny.inputs([[([0], "red?")]])).groups
    changed = tiny.pictures[0].copy()
    ImageDraw.Draw(changed).rectangle((0, 0, 9, 9), fill=(255, 0, 0))
    with showing(tiny, changed):
        (other,) = tiny.encode(tiny.inputs([[([0], "red?")]])).groups
    moved = (group.tokens.patches() != other.tokens.patches()).any(-1)[0]
    assert moved[0] and 0 < int(moved.sum()) <= group.size / 2
    assert not moved[-1]


def test_a_budget_is_a_ceiling(llava_tiny):
    with showing(llava_tiny, page(70, 70)) as tiny:
        inputs = tiny.inputs([[([0, 1], "Is there a 7?")], [([0], "red?")]])
    kept = {}
    for budget in (2, 12, 25, 0.5, 1.0):
        with Dedupe(budget=budget)(tiny.model) as trace, torch.no_grad():
            assert tiny.model(**inputs).logits.isfinite().all()
        kept[budget] = [len(own) for own in trace.kept]
    distinct = kept[1.0][0]
    assert 2 < distinct < 12 and kept[1.0] == [distinct, 25, distinct] == kept[25]
    assert kept[12] == [distinct, 12, distinct] == kept[0.5] and kept[2] == [2, 2, 2]


@pytest.mark.parametrize("name", ["fopru+dedupe", "dedupe+merge", "dedupe+restore", "dedupe+fastv"])
def test_other_methods_before_and_behind(name, llava_tiny):
    """Images of different numbers of tokens, in a batch and alone."""
    rows = [[([0], "Is there a 7?")], [([1], "Is there a 7?")]]
    with showing(llava_tiny, page(70, 70)) as tiny:
        both, one = tiny.inputs(rows), [tiny.inputs([row]) for row in rows]
    with build(name, budget=10)(tiny.model), torch.no_grad():
        logits = tiny.model(**both).logits
        for row, inputs in enumerate(one):
            alone = tiny.model(**inputs).logits
            torch.testing.assert_close(logits[row, -1], alone[0, -1], atol=2e-5, rtol=1e-4)


def test_a_threshold_forgives_noise(llava_tiny):
    noise = np.random.default_rng(0).integers(-1, 2, (70, 70, 3))
    with showing(llava_tiny, Image.fromarray((128 + noise).astype(np.uint8))) as tiny:
        tokens = tiny.encode(tiny.inputs([[([0], "red?")]])).groups[0].tokens
    assert len(Dedupe(budget=1.0).reduce(tokens).indices[0]) == 25
    assert len(Dedupe(budget=1.0, threshold=1.0).reduce(tokens).indices[0]) == 1


def test_where_pixels_are_not_known_it_says_so():
    features = torch.randn(1, 4, 3)
    tokens = VisionTokens(features, features, ((2, 2),), (0,), lambda x: x, query_key=None)
    with pytest.raises(InputError, match="compares pixels"):
        Dedupe(budget=2).reduce(tokens)
    with pytest.raises(InputError, match="dedupe is not served: this method compares pixels"):
        Settings.read({"method": "dedupe", "budget": 8})
    with pytest.raises(InputError, match="threshold -1 is negative"):
        Dedupe(threshold=-1)
    with pytest.raises(InputError, match="name it last"):
        Dedupe(Restore())
