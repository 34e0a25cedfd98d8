"""`vlm-prune report`."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import AllowOutside, DataRoot, data_root_of


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="--output folders of eval or compare.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file; report.html in the first folder unless given.")
    ] = None,
    gallery: Annotated[int, typer.Option(min=0, help="Questions shown with pictures.")] = 60,
    data_root: DataRoot = None,
    allow_outside: AllowOutside = False,
) -> None:
    """Put runs on one self-contained HTML page."""
    from vlm_prune.benchmarks.report import write_report_page

    page, found = write_report_page(runs, output, gallery, data_root_of(data_root, allow_outside))
    print(f"{page}: {len(found)} runs, {page.stat().st_size / 1e6:.1f} MB")
