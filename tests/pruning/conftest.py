"""Every registered method, with the arguments it is tested with."""

import pytest
import torch

from vlm_prune.pruning import METHODS
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.tokens import VisionTokens

ARGUMENTS = {
    "fopru": [{}, {"strategy": "row", "queries": "cls"}],
    "zoo": [{"directions": 4}],
    "vispruner": [{"step": 64}],  # small steps chain near-ties, which rounding decides
}
SLOW = {"restore", "dedupe"}  # the tiny families hold them to the same
CASES = [
    pytest.param((name, more), marks=pytest.mark.slow if name in SLOW else ())
    for name in METHODS
    if "videos" not in METHODS[name]().needs
    for more in ARGUMENTS.get(name, [{}])
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def case(request):
    return request.param


@pytest.fixture(scope="session")
def vision(llava, images, make_inputs):
    """The encoded tokens of two images."""
    pixels = make_inputs([(2, "Is there a 7?")], images)["pixel_values"]
    return family_of(llava).encode(pixels).groups[0].tokens


@pytest.fixture(scope="session")
def question_maps(llava, images, make_inputs):
    """A question about one image, and what each place of the unpruned decoder pays each image token
    in each layer, (layers, heads, places, 576)."""
    inputs = make_inputs([(1, "Is there a 7?")], images)
    llava.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = llava(**inputs, output_attentions=True).attentions
    finally:
        llava.set_attn_implementation("sdpa")
    shown = inputs["input_ids"][0] == llava.config.image_token_id
    return inputs, torch.stack(maps)[:, 0, :, :, shown]


@pytest.fixture(scope="session")
def clips():
    """Two videos of ten frames of 3 x 4 tokens: scenes that last some frames, with noise."""
    draw = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=draw)

    lengths = torch.tensor([[1, 4, 2, 3], [5, 1, 1, 3]])
    scenes, noise = random(2, 4, 12, 16), random(2, 10, 12, 16)
    frames = torch.stack([s.repeat_interleave(n, 0) for s, n in zip(scenes, lengths, strict=True)])
    tokens = (frames + 0.4 * noise).flatten(1, 2)
    query, key = random(20, 2, 12, 4), random(20, 2, 12, 4)
    return VisionTokens(
        features=tokens, projected=tokens, grids=((3, 4),) * 10, seeds=(1, 2), projector=torch.nn.Identity(),
        query_key=lambda: (query, key), has_cls=False, frames=10,
    )  # fmt: skip
