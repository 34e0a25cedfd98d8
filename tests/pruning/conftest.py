"""One row per method: its registered name and the arguments it is tested with."""

import pytest

from vlm_prune.vlm.families import family_of

CASES = [
    ("none", {}),
    ("random", {}),
    ("pool", {}),
    ("downsample", {}),
    ("fopru", {}),
    ("fopru", {"strategy": "row", "queries": "cls"}),
    ("adaptinfer", {}),
    ("zoo", {"directions": 4}),
    ("zoo-exact", {}),
    ("fastv", {}),
    ("sparsevlm", {}),
    ("pyramiddrop", {}),
    ("dart", {}),
    ("visionzip", {}),
    ("vispruner", {}),
    ("divprune", {}),
    ("cdpruner", {}),
    ("cascade", {}),
    ("merge", {}),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def case(request):
    return request.param


@pytest.fixture(scope="session")
def vision(llava, images, make_inputs):
    """The encoded tokens of two images."""
    return family_of(llava).encode(make_inputs([(2, "Is there a 7?")], images)["pixel_values"])
