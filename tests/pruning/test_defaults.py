"""Each method's defaults are its paper's, written here a second time; the pages name the sources."""

from dataclasses import fields

import pytest

from vlm_prune.pruning import METHODS
from vlm_prune.pruning.base import VisionPruner
from vlm_prune.pruning.registry import build

OF_EVERY_METHOD = {f.name for f in fields(VisionPruner)}
DEFAULTS = {
    "none": {},
    "random": {},
    "random@16": {"layer": 16, "schedule": None, "preset": ""},
    "pool": {},
    "downsample": {},
    "frames": {},
    "fopru": {"strategy": "rank", "queries": "all"},
    "adaptinfer": {"schedule": None, "preset": ""},
    "zoo": {
        "directions": 64, "step": 0.01, "combine": "product", "rank": 0, "estimator": "auto",
    },
    "zoo-exact": {
        "directions": 64, "step": 0.01, "combine": "product", "rank": 0, "estimator": "auto",
    },
    "fastv": {"layer": 2, "queries": "all", "schedule": None, "preset": ""},
    "sparsevlm": {
        "recycle": 0.3, "clusters": 0.1, "neighbors": 5, "released": False, "schedule": None,
        "preset": "",
    },
    "pyramiddrop": {"ratio": 0.5, "schedule": None, "preset": ""},
    "dart": {
        "layer": 2, "image_pivots": 4, "text_pivots": 4, "released": False, "schedule": None,
        "preset": "",
    },
    "visionzip": {"contextual": 10 / 64, "released": False},
    "vispruner": {"important": 0.5, "step": 8, "released": False},
    "divprune": {},
    "cdpruner": {"negated": False},
    "mmtok": {"text_temperature": 0.02, "image_temperature": 0.2, "image_weight": 0.5},
    "scope": {"alpha": 1.0},
    "apet": {"basis": 10},
    "apet@16": {"basis": 10, "layer": 16, "schedule": None, "preset": ""},
    "coin": {"alpha": 0.25, "beta": 0.25},
    "evs": {},
    "vidcom2": {"temperature": 0.01},
    "fastvid": {
        "segments": 8, "threshold": 0.9, "context": 0.4, "stride": 4, "weight": 0.6, "neighbors": 4,
    },
    "flashvid": {
        "segments": 8, "threshold": 0.9, "diverse": 0.7, "alike": 0.8, "neighbors": 7,
        "relevance": False,
    },
    "v-cast": {"temperature": 0.7},
    "holitom": {"threshold": 0.8, "neighbors": 7},
}  # fmt: skip
WRAPPERS = {
    "cascade": {"widening": 2.0}, "restore": {"anchors": 0.5}, "dedupe": {"threshold": 0.0},
    "icr": {"keep": 8, "empty": ()},
}  # fmt: skip

PRESETS = {
    "fastv": {"r50": (0.5,), "r75": (0.25,)},
    "pyramiddrop": {"paper": (0.5, 0.25, 0.125)},
    "sparsevlm": {
        "192": (300, 200, 110), "128": (303, 110, 36), "96": (238, 48, 26), "64": (66, 30, 17),
    },
}  # fmt: skip


def settings(name: str) -> dict[str, object]:
    method = build(name)
    return {
        f.name: getattr(method, f.name) for f in fields(method) if f.name not in OF_EVERY_METHOD
    }


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_method_starts_from_its_papers_settings(name):
    assert settings(name) == DEFAULTS[name]
    assert (build(name).budget, build(name).positions, build(name).seed) == (64, "auto", 0)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_starts_from_its_papers_settings(name):
    found = settings(name)
    assert {key: found[key] for key in WRAPPERS[name]} == WRAPPERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_numbers_of_tokens(name):
    assert dict(METHODS[name].presets) == PRESETS[name]


def test_no_methods_defaults_are_left_out():
    assert {*METHODS} <= {*DEFAULTS, *WRAPPERS, "merge", "best"}
