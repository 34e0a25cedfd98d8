"""Where kept tokens stand for the language model: each method's authors decide, or the user."""

import json

import pytest
import torch

from vlm_prune.pruning import METHODS
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.families import family_of

ORIGINAL = {"fastv", "dart", "restore"}
TURNS = [[([0], "Is there a 7?")]]


def positions_in_layers(tiny, method):
    """The text positions that each decoder layer is given for one prompt with one image."""
    seen, layers = [], family_of(tiny.model).decoder.layers

    def note(_, args, kwargs):
        position_ids = kwargs["position_ids"]
        seen.append(position_ids.reshape(-1, position_ids.shape[-1])[0].tolist())

    with method(tiny.model) as trace:
        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                tiny.model(**tiny.inputs(TURNS))
        finally:
            for hook in hooks:
                hook.remove()
    return seen, trace


def start_of_image(tiny):
    ids = tiny.inputs(TURNS)["input_ids"][0]
    return ids.tolist().index(family_of(tiny.model).image_token)


@pytest.mark.parametrize(
    "name", [n for n in METHODS if n not in ("none", "best") and "videos" not in METHODS[n]().needs]
)
@pytest.mark.parametrize("positions", ["auto", "contiguous", "original"])
def test_positions_are_the_authors_or_the_users(name, positions, llava_tiny):
    method = build(name, budget=6, positions=positions)
    seen, trace = positions_in_layers(llava_tiny, method)
    rule = positions
    if positions == "auto":
        inside = method
        if method.authors_positions == "as its parts":
            inside = getattr(method, "inside", getattr(method, "method", method))
        rule = "original" if name in ORIGINAL else "contiguous"
        assert inside.positions_on(family_of(llava_tiny.model)) == rule
    if rule == "contiguous":
        assert seen[-1] == list(range(len(seen[-1])))
    else:
        start, kept = start_of_image(llava_tiny), trace.kept[0]
        length = llava_tiny.inputs(TURNS)["input_ids"].shape[1]
        shown = [*range(start), *(start + kept).tolist(), *range(start + 25, length)]
        assert seen[-1] == shown != list(range(len(shown)))


@pytest.mark.parametrize("name", ["divprune+fastv", "best"])
def test_each_part_of_a_cascade_follows_its_own_authors(name, llava_tiny, tmp_path):
    """What the first part closes up stays so; what the second one drops leaves gaps."""
    more = {"inside.layer": 16}
    if name == "best":
        path, entry = tmp_path / "best.json", {"method": "divprune+fastv", "arguments": more}
        path.write_text(json.dumps({"layers": 4, "tokens": 25, "budgets": {"6": entry}}))
        more = {"definitions": str(path)}
    seen, trace = positions_in_layers(llava_tiny, build(name, budget=6, **more))
    assert seen[0] == list(range(len(seen[0])))
    entered, kept = trace.entered[0].tolist(), trace.kept[0].tolist()
    dropped = [n for n, token in enumerate(entered) if token not in kept]
    gone = {start_of_image(llava_tiny) + n for n in dropped}
    assert gone and seen[-1] == [p for p in range(len(seen[0])) if p not in gone]


def test_merging_keeps_the_rule_of_its_method(llava_tiny):
    family = family_of(llava_tiny.model)
    for name in ("fastv", "dart", "adaptinfer", "sparsevlm", "divprune"):
        assert build(f"{name}+merge").positions_on(family) == build(name).positions_on(family)


def test_rows_and_columns_stay(tiny):
    family = family_of(tiny.model)
    for name in METHODS:
        method = METHODS[name]()
        if family.mrope:
            assert method.positions_on(family) == "auto"
