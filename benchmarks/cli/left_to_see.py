"""`vlm-prune left-to-see`: which questions about videos the tokens that methods keep still answer."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import Limit, check_named_once

METHODS_SHOWN = (
    "random,frames,pool,downsample,evs,vidcom2,fastvid,flashvid,holitom,v-cast,divprune,zoo-exact,"
    "fopru,visionzip"
)


def left_to_see_command(
    output: Annotated[Path, typer.Argument(help="Markdown file to write.")],
    method: Annotated[
        str, typer.Option(help="Names, comma-separated; the first is compared with.")
    ] = METHODS_SHOWN,
    budget: Annotated[
        str, typer.Option(help="Shares of the tokens, comma-separated.")
    ] = "0.1,0.05",
    limit: Limit = 600,
) -> None:
    """Measure for each method how many questions about videos its tokens still answer.

    The reader is ideal: it recognizes whatever a kept token shows. No model answers.
    """
    from vlm_prune.benchmarks.experiments.left_to_see import (
        answers,
        left_to_see_table,
        questions,
    )
    from vlm_prune.benchmarks.stats.table import as_markdown
    from vlm_prune.vlm.budget import parse_budget
    from vlm_prune.vlm.common.files import check_output, write_text

    check_output(output)
    methods, budgets = method.split(","), [parse_budget(text) for text in budget.split(",")]
    check_named_once("method", methods)
    check_named_once("budget", budgets)
    found = answers(methods, budgets, questions(limit))
    write_text(output, as_markdown(left_to_see_table(found, methods[0])))
