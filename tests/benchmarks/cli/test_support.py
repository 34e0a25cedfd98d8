"""The matrix of methods and model families in the documentation is the one the code gives."""

from pathlib import Path

from vlm_prune.benchmarks.cli.support import markdown, support
from vlm_prune.benchmarks.speed.pictures import LAYOUTS
from vlm_prune.pruning import METHODS
from vlm_prune.vlm.families import FAMILIES


def test_the_readme_shows_the_matrix_of_the_registries(run):
    code, printed, _ = run("methods", "--families")
    assert (code, printed) == (0, markdown())
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    shown = readme.split("<!-- matrix -->\n")[1].split("<!-- end -->")[0]
    assert shown == printed, "the README's matrix is stale; make matrix"
    assert list(support()) == list(METHODS)
    assert all(list(works) == list(FAMILIES) for works in support().values())
    assert not support()["zoo"]["smolvlm"] and not support()["downsample"]["qwen3_vl"]


def test_models_lists_families_and_the_methods_that_each_lacks(run):
    code, printed, _ = run("models")
    assert code == 0 and "tiny" in printed
    assert all(family in printed for family in FAMILIES)
    assert list(LAYOUTS) == list(FAMILIES)
    for left in ("all but downsample, best", "all but downsample, zoo, zoo-exact, cascade, best"):
        assert left in " ".join(printed.replace("│", " ").split()), printed
