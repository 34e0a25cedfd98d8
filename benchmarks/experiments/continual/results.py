"""The experiment's results: JSON, a page in Markdown, and a picture."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from vlm_prune.benchmarks.evaluation.environment import command_line, device_name, versions
from vlm_prune.benchmarks.experiments.continual.compare import (
    Runs,
    cell,
    draw_comparison,
    figures,
    metric_differences,
    values,
)
from vlm_prune.benchmarks.experiments.continual.experiment import (
    ARMS,
    OUTSIDE,
    SEARCHED,
    Experiment,
    read_report,
    read_search,
    read_step_ms,
)
from vlm_prune.benchmarks.experiments.continual.learn import accuracy_matrix, method_of
from vlm_prune.benchmarks.experiments.continual.timing import step_times
from vlm_prune.benchmarks.stats.table import as_markdown
from vlm_prune.continual.clip import load_clip
from vlm_prune.continual.data import prompts
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.diagnostics import survival
from vlm_prune.continual.prox import total_shrinkage
from vlm_prune.continual.results import read_results
from vlm_prune.continual.streams import open_stream
from vlm_prune.vlm.common.files import atomic_path, write_json, write_text
from vlm_prune.vlm.common.folder import check_settings

GAIN = "codyra", "lora"
WHICH = "codyra", "random-rank, codyra's counts and norms"
SMALLER = "lora, codyra's norms", "lora"
BUDGETED = "codyra-plus", "codyra"
QUESTIONS = (
    ("What does CoDyRA gain over LoRA of the same rank?", *GAIN),
    ("Does it matter which ranks survive? Against as many at random",
     "codyra", "random-rank, codyra's counts"),
    ("The same, at equal norms too", *WHICH),
    ("Is a smaller update enough? LoRA with CoDyRA's norms against LoRA", *SMALLER),
    ("What is left of the gain at equal norms?", "codyra", "lora, codyra's norms"),
    ("Is the budgeted variant better than CoDyRA?", *BUDGETED),
    ("Is our closed-form text tower better than KeepLoRA?", "lda-text", "keeplora"),
    ("Does it cost what CLIP knew?", "lda-text", "zero-shot"),
)  # fmt: skip
FILES = ("README.md", "results.json", "methods.png")
SHOWN = ("transfer", "average", "last", "forgetting")


def collect(experiment: Experiment) -> dict[str, Any]:
    """Returns all figures of the runs that are finished, as plain numbers."""
    rows: dict[str, Any] = {}
    runs: dict[str, Runs] = {}
    for label in experiment.arms:
        folders = {seed: experiment.folder(label, seed) for seed in range(experiment.seeds)}
        found = {seed: read_report(folder) for seed, folder in folders.items()}
        reports = [report for report in found.values() if report is not None]
        done = {seed: folders[seed] for seed, report in found.items() if report is not None}
        if not done:
            continue
        runs[label] = {seed: accuracy_matrix(read_results(f)) for seed, f in done.items()}
        first = reports[0]
        rows[label] = {
            "seeds": list(done),
            "lr": first.recipe.lr if ARMS[label].rate else None,
            "metrics": figures(runs[label]),
            "metrics_by_seed": values(runs[label]),
            "retention": [report.retention[OUTSIDE] for report in reports],
            "trainable_parameters": first.trainable_parameters[0],
            "added_parameters": first.added_parameters[-1],
            "update_norms": [report.update_norms for report in reports],
            "drift": [report.drift for report in reports],
            "kept_rank": kept_rank(done.values()),
        }
    differences = [
        {"question": text, "of": one, "minus": other, **metric_differences(runs[one], runs[other])}
        for text, one, other in QUESTIONS
        if one in runs and other in runs
    ]
    everything = {
        "settings": {k: v for k, v in asdict(experiment).items() if k != "output"},
        "finished": sum(len(row["seeds"]) for row in rows.values()),
        "planned": experiment.seeds * len(experiment.arms),
        "search": read_search(experiment.output),
        "step_ms": read_step_ms(experiment.output),
        "methods": rows,
        "differences": differences,
        "initial_gates": initial_gates(experiment),
        "command": command_line(),
        "device": device_name(torch.device("cpu")),
        "versions": versions("open_clip_torch", "timm", "peft"),
    }
    plain: dict[str, Any] = msgspec.to_builtins(everything)
    return plain | {"verdicts": verdicts(plain)}


def kept_rank(folders: Iterable[Path]) -> float | None:
    """Returns the mean components per site that runs merged, over tasks and
    seeds; None without factors.
    """
    ranks = [factors.rank for delta in deltas(folders) for factors in delta.factors.values()]
    return float(np.mean(ranks)) if ranks else None


def deltas(folders: Iterable[Path]) -> list[Delta]:
    """Returns the changes of all tasks of some runs."""
    return [Delta.load(p) for f in folders for p in sorted((f / "deltas").glob("*.safetensors"))]


def initial_gates(experiment: Experiment) -> dict[str, float | None]:
    """Returns how far CoDyRA's initial gates alone tell which components
    stay; means over tasks and seeds.

    The correlation is None where all components of every task, or none, survived.
    """
    folders = [experiment.folder("codyra", seed) for seed in range(experiment.seeds)]
    found = [survival(delta, total_shrinkage(500, 0.5, 0.005)) for delta in deltas(folders)]
    if not found:
        return {}
    defined = [one.correlation for one in found if not math.isnan(one.correlation)]
    return {
        "agreement": float(np.mean([one.agreement for one in found])),
        "correlation": float(np.mean(defined)) if defined else None,
        "kept_share": float(np.mean([one.mean_rank_share for one in found])),
    }


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """Returns what the paired differences say about the two questions, in sentences."""
    pairs = {(one["of"], one["minus"]): one for one in found["differences"]}
    lines = []
    if all(pair in pairs and "last" in pairs[pair] for pair in (GAIN, WHICH, SMALLER)):
        for name in ("transfer", "average", "last"):
            gain, which, smaller = (pairs[pair].get(name) for pair in (GAIN, WHICH, SMALLER))
            if gain is None or which is None or smaller is None:
                continue
            text = (
                f"{name.capitalize()}: CoDyRA gains {cell(gain, '+')} over LoRA; a smaller update "
                f"alone gains {cell(smaller, '+')}, and which ranks survive {cell(which, '+')}"
            )
            if gain["low"] > 0:
                shares = (100 * one["value"] / gain["value"] for one in (smaller, which))
                text += "; that is {:.0f} % and {:.0f} % of the gain.".format(*shares)
            else:
                text += "; the gain is within its interval, so there is nothing to divide."
            lines.append(text)
    plus = pairs.get(BUDGETED, {})
    if "transfer" in plus:
        wins = all(plus[name]["low"] > 0 for name in ("transfer", "last"))
        ranks = [found["methods"][label]["kept_rank"] for label in BUDGETED]
        lines.append(
            f"CoDyRA-plus {'beats' if wins else 'does not beat'} CoDyRA on both Transfer "
            f"({cell(plus['transfer'], '+')}) and Last ({cell(plus['last'], '+')}), with a mean "
            "rank of {:.2f} against {:.2f}.".format(*ranks)
        )
    return lines


def time_steps(experiment: Experiment, rounds: int = 10) -> None:
    """Records the milliseconds of a step on the first task, all methods
    in turn, unless it is done; for an arm more all are measured anew.
    """
    known = read_step_ms(experiment.output)
    wanted = {arm for arm in experiment.arms if ARMS[arm].rate and not ARMS[arm].follows}
    if wanted <= set(known):
        return
    stream, clip = open_stream(experiment.stream), load_clip("tiny")
    task = stream.tasks[0]
    items = [task.train[k] for k in range(min(experiment.batch, len(task.train)))]
    pixels = torch.stack([clip.eval_transform(image) for image, _ in items])
    labels = torch.tensor([label for _, label in items])
    methods = {
        label: method_of(stream, ARMS[label].method, dict(ARMS[label].options))
        for label in ARMS
        if label in wanted | set(known)
    }
    make, words = (lambda: load_clip("tiny")), prompts(task)
    found = step_times(methods, make, words, pixels, labels, rounds)
    write_json(experiment.output / "step_ms.json", found)


def results_page(found: Mapping[str, Any]) -> str:
    """Returns the results in Markdown."""
    settings, rows = found["settings"], found["methods"]
    head = (
        f"# Continual learners on the {settings['stream']} stream\n\n"
        f"{found['finished']} of {found['planned']} runs; {settings['steps']} steps per task of "
        f"{settings['batch']} images; {settings['test_per_class']} test images per class, scored "
        "against the classes of all tasks. Per cent; 95 % bootstrap intervals over seeds and test "
        "images (images alone where there is one seed). Forgetting: lower is better. Retention: "
        "change on `scenes`, which is no task, mean over seeds; ZSCL's reference images are other "
        "drawings of `scenes`. Drift: Frobenius distance of all weights from the initial ones at the "
        "end; rank: mean components per adapted matrix that were merged.\n\n"
        f"`{found['command']}`; {found['device']}.\n\n"
    )
    lines = []
    times = found["step_ms"]
    for label, row in rows.items():
        kept = [100 * one["difference"] for one in row["retention"]]
        step = times.get(label)
        lines.append([
            label, len(row["seeds"]),
            *(cell(row["metrics"][name]) if name in row["metrics"] else "" for name in SHOWN),
            f"{np.mean(kept):+.1f}", f"{np.mean([d[-1] for d in row['drift']]):.2f}",
            "" if row["kept_rank"] is None else f"{row['kept_rank']:.2f}", f"{row['trainable_parameters']:,}",
            f"{row['added_parameters']:,}", "" if step is None else f"{step:.0f}",
        ])  # fmt: skip
    columns = [
        "method",
        "seeds",
        *SHOWN,
        "retention",
        "drift",
        "rank",
        "trained",
        "added at inference",
        "step ms",
    ]
    table = as_markdown([columns, *lines])
    differences = [
        [
            one["question"],
            f"{one['of']} − {one['minus']}",
            *(cell(one[name], "+") if name in one else "" for name in SHOWN),
        ]
        for one in found["differences"]
    ]
    pairs = as_markdown([["question", "difference", *SHOWN], *differences])
    gates = found["initial_gates"]
    about = "".join(f"- {line}\n" for line in found["verdicts"])
    if gates:
        correlation = gates["correlation"]
        about += (
            f"- CoDyRA keeps {100 * gates['kept_share']:.1f} % of its components. The rule "
            '"|initial gate| > total shrinkage" alone tells '
            f"{100 * gates['agreement']:.1f} % of them right (correlation "
            f"{'undefined' if correlation is None else format(correlation, '.2f')}).\n"
        )
    candidates = [
        [
            label,
            ", ".join(f"{k} {v}" for k, v in one.items() if k != "average"),
            f"{100 * one['average']:.1f}",
        ]
        for label, scores in found["search"].items()
        for one in scores
    ]
    tried = as_markdown([["arm", "candidate", "Average % on val"], *candidates])
    return (
        f"{head}{table}\n## Paired differences\n\n{pairs}\n{about}\n## Search\n\n"
        f"Validation images of the first {settings['search_tasks']} tasks of `{SEARCHED}`, seed 0.\n\n{tried}"
    )


def write(experiment: Experiment, folder: Path) -> None:
    """Writes `results.json`, `README.md` and `methods.png` in `folder`."""
    check_settings(experiment.file, experiment.settings())
    found = collect(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", found)
    write_text(folder / "README.md", results_page(found))
    metrics = {label: row["metrics"] for label, row in found["methods"].items()}
    with atomic_path(folder / "methods.png") as partial:
        draw_comparison(metrics, partial)
