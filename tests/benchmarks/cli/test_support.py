"""What works on what: methods and model families."""

from vlm_prune.benchmarks.cli.support import serving_support, support, support_table
from vlm_prune.benchmarks.speed.pictures import LAYOUTS
from vlm_prune.pruning import METHODS
from vlm_prune.vlm.families import FAMILIES


def test_methods_prints_the_matrix_of_the_registries(run):
    code, printed, _ = run("methods", "--families")
    assert (code, printed) == (0, support_table())
    assert list(support()) == list(METHODS)
    assert all(list(works) == list(FAMILIES) for works in support().values())
    assert not support()["zoo"]["smolvlm"] and not support()["downsample"]["smolvlm"]
    assert support()["downsample"]["qwen3_vl"] and not serving_support()["downsample"]["qwen3_vl"]


def test_models_lists_families_and_the_methods_that_each_lacks(run):
    code, printed, _ = run("models")
    assert code == 0 and "tiny" in printed
    assert all(family in printed for family in FAMILIES)
    assert list(LAYOUTS) == list(FAMILIES)
    for left in ("all but downsample ", "all but frames, evs, vidcom2, fastvid,"):
        assert left in " ".join(printed.replace("│", " ").split()), printed
