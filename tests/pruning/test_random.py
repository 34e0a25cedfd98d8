"""Random tokens inside the language model: which are drawn is decided by prompt and seed alone."""

import pytest
import torch

from vlm_prune.pruning import Cascade
from vlm_prune.pruning.random import SPREAD, Random, RandomInside, drawn
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.common.errors import InputError

NAMES = ["random@16", "divprune+random@16", "random+random@24"]
QUESTION, LONG = "Is there a 7?", "What color is the star and is there a 7?"
ROWS = [
    [([0], QUESTION)],
    [([], "What is red?")],
    [([1, 2], LONG)],
    [([0], QUESTION), ([], "yes"), ([2], LONG)],
    [([2], LONG)],
]


@torch.inference_mode()
def run(tiny, rows, name, side="left", seed=3, **more):
    """Logits of a direct forward and what was kept of each image."""
    with build(name, budget=6, seed=seed)(tiny.model) as trace:
        out = tiny.model(**tiny.inputs(rows, side), **more)
    return out.logits, [own.tolist() for own in trace.kept]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_draws_what_it_draws_in_a_batch(name, llava_tiny):
    logits, kept = run(llava_tiny, ROWS, name)
    used = 0
    for row, turns in enumerate(ROWS):
        images = sum(len(pictures) for pictures, _ in turns)
        for side in ("left", "right"):
            alone, own = run(llava_tiny, [turns], name, side)
            assert own == kept[used : used + images]
            torch.testing.assert_close(logits[row, -1], alone[0, -1], atol=2e-5, rtol=1e-4)
        used += images
    assert kept[1] != kept[2]  # two images of a prompt
    assert run(llava_tiny, ROWS, name, seed=4)[1] != kept
    assert run(llava_tiny, ROWS, name)[1] == kept


@pytest.mark.parametrize("name", NAMES)
def test_drafts_and_beams_draw_what_the_prompt_draws(name, llava_tiny):
    inputs = llava_tiny.inputs(ROWS[:3])
    kept = []
    for more in ({}, {"use_cache": False}, {"num_beams": 2}):
        with build(name, budget=6)(llava_tiny.model) as trace:
            llava_tiny.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **more)
        images = [own.tolist() for own in trace.kept]
        if "num_beams" in more:
            assert images[0] == images[1] and images[2:4] == images[4:]
            images = [images[0], *images[2:4]]
        kept.append(images)
    assert kept[0] == kept[1]
    assert kept[0] == kept[2]


def test_the_cut_is_the_cascades_second_stage():
    method = build("divprune+random@16", budget=64)
    assert isinstance(method, Cascade) and isinstance(method.inside, RandomInside)
    assert method.entering(576) == 96
    assert [(cut.layer, cut.keep) for cut in method.cuts(576, 32)] == [(16, 32)]
    assert build("random@8").layer == 8 and isinstance(build("random"), Random)


def test_a_draw_is_uniform():
    """Over seeds every token is kept equally often, within five standard deviations."""
    tokens, times = torch.zeros(1, 20, 2), 2000
    hits = torch.zeros(20)
    for seed in range(times):

        class Drawn:
            features, seeds = tokens, (7,)

        hits[RandomInside(seed=seed).score(Drawn).topk(5).indices[0]] += 1
    expected, deviation = times / 4, (times * 0.25 * 0.75) ** 0.5
    assert (hits - expected).abs().max() < 5 * deviation


def test_a_layer_that_is_none_is_refused():
    with pytest.raises(InputError, match="layer 32 is out of range"):
        RandomInside(layer=32)


@pytest.mark.parametrize(
    ("image", "seed", "state"),
    [(5, 0, 5), (5, 1, 5 + SPREAD), (2**32 - 1, 1, SPREAD - 1), (9, 2**32, 9)],
)
def test_a_draw_is_that_of_torchs_generator(image, seed, state):
    expected = torch.rand(7, generator=torch.Generator().manual_seed(state))
    assert torch.equal(drawn(torch.zeros(1, 7, 2), seed, [image])[0], expected)


def test_half_of_the_layers_run_before_a_random_cut():
    assert RandomInside().pattern() == [(16, 1)]
