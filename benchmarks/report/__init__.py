"""One HTML page about one or more runs: numbers, plots, and pictures of the kept tokens.

The page needs no network: style, script, plots and pictures stand in it. Its content security
policy runs the one script that is named by its hash; answers and questions are text only.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vlm_prune.benchmarks.evaluation.tables import count, three_ways, with_interval
from vlm_prune.benchmarks.report.gallery import gallery
from vlm_prune.benchmarks.report.load import Run, load_runs
from vlm_prune.benchmarks.report.numbers import CONTROLS, PHASES, bars, budgets
from vlm_prune.benchmarks.report.plot import draw, series_of
from vlm_prune.benchmarks.stats.table import percent
from vlm_prune.vlm.common.files import check_output, write_text
from vlm_prune.vlm.common.paths import DataRoot

FOLDER = Path(__file__).parent


def write_report_page(
    paths: list[Path],
    output: Path | None = None,
    most: int = 60,
    data_root: DataRoot | Path | None = None,
) -> tuple[Path, list[Run]]:
    """Writes the page about the runs in `paths`; returns where, and the runs.

    Args:
        paths: folders of runs, or of several runs each.
        output: an HTML file; `report.html` in the first of `paths` unless given.
        most: questions shown with pictures.
        data_root: copies of data sets, for the pictures of lmms-eval's tasks.

    Raises:
        InputError: if the folders are not runs that can stand on one page.
        OSError: if the page cannot be written; nothing is left half-written.
    """
    runs = load_runs(paths)
    target = output or paths[0] / "report.html"
    check_output(target)
    write_text(target, render_page(runs, most, data_root))
    return target, runs


def render_page(runs: list[Run], most: int = 60, data_root: DataRoot | Path | None = None) -> str:
    """Returns the page as text.

    Args:
        runs: what it shows.
        most: questions with pictures.
        data_root: folder of local data sets, for pictures of lmms-eval's tasks.
    """
    groups, script = budgets(runs), (FOLDER / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "count": count, "percent": percent, "retained": with_interval, "three_ways": three_ways
    }  # fmt: skip
    times = [(group, bars(group)) for group in groups]
    return environment.get_template("page.html.j2").render(
        runs=runs,
        groups=groups,
        times=times,
        slowest=max((bar.total for _, rows in times for bar in rows), default=0) or 1,
        phases=PHASES,
        names=series_of(runs),
        controls={run.label for run in runs if run.method in CONTROLS},
        plots={"wide": draw(runs, 860, 400), "narrow": draw(runs, 360, 340)},
        gallery=gallery(runs, groups, most, data_root),
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
