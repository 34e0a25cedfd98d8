"""`vlm-prune models`."""

import sys


def models() -> None:
    """List model families, which methods work on each, and the embedded models."""
    from vlm_prune.benchmarks.cli.support import support
    from vlm_prune.benchmarks.stats.table import as_table, show
    from vlm_prune.vlm.families import FAMILIES

    matrix = support()
    rows = [["model", "what", "methods"]]
    rows.append(["tiny", "the embedded LLaVA; needs no download", "as llava"])
    rows.append(["smol", "the embedded LLaVA over SmolLM2-135M-Instruct", "as llava"])
    rows.append(["tiny-video", "the embedded LLaVA-OneVision, for videos", "as llava_onevision"])
    for name, family in FAMILIES.items():
        what = (sys.modules[family.__module__].__doc__ or "").strip().split("\n\n")[0]
        without = [method for method, works in matrix.items() if not works[name]]
        rows.append([name, what, f"all but {', '.join(without)}" if without else "all"])
    show(as_table(rows))
