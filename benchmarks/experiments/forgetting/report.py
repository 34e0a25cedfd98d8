"""The experiment's JSON, table and plot."""

import operator
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from vlm_prune.benchmarks.embedded_models.text_skills import same_meaning
from vlm_prune.benchmarks.experiments.forgetting.arms import ARMS, NEEDED
from vlm_prune.benchmarks.experiments.forgetting.measure import (
    ArmRecord,
    FirstToken,
    accuracy_difference,
    accuracy_over_kinds,
    interval,
    mean_over_seeds,
)
from vlm_prune.benchmarks.experiments.forgetting.records import (
    ArmSummary,
    Estimate,
    ForgettingResults,
    LanguageSkills,
    SeedAccuracies,
    SkillDifferences,
)
from vlm_prune.benchmarks.stats.bootstrap import mean_interval
from vlm_prune.benchmarks.stats.table import as_markdown, percent, percent_interval, points
from vlm_prune.benchmarks.tasks.iit import SETTINGS
from vlm_prune.learners.laws import GROUPS
from vlm_prune.vlm.common.files import atomic_path, write_text
from vlm_prune.vlm.common.records import to_json

NAME = "forgetting"
KEPT, MAX_POINTS_BEHIND = 0.98, 1  # share of text-only accuracy, points of visual accuracy
COLORS = ("#4477aa", "#cc6677", "#228833")


def write_report(results: ForgettingResults, folder: Path) -> None:
    """Writes `forgetting.json`, `forgetting.md` and `forgetting.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    # on one line: there are thousands of single answers
    write_text(folder / f"{NAME}.json", to_json(results, indent=None))
    write_text(folder / f"{NAME}.md", report_markdown(results))
    with atomic_path(folder / f"{NAME}.png") as partial:
        plot(results.arms, results.summary, partial)


def summarize_arms(arms: dict[str, list[ArmRecord]]) -> dict[str, ArmSummary]:
    """Returns means and 95 % intervals over seeds and scenes, for each arm."""
    summary: dict[str, ArmSummary] = {}
    wings = [run.hits for run in arms["wings"]]
    for arm, runs in arms.items():
        found = [run.hits for run in runs]
        in_setting = {
            name: interval([{name: seed["iit"][name]} for seed in found]) for name in SETTINGS
        }
        shift = {key: _mean_shift(runs, key) for key in get_args(FirstToken)}
        summary[arm] = ArmSummary(
            text=interval([seed["text"] for seed in found]),
            visual=interval([seed["visual"] for seed in found]),
            by_seed=SeedAccuracies(
                text=[accuracy_over_kinds(seed["text"]) for seed in found],
                visual=[accuracy_over_kinds(seed["visual"]) for seed in found],
            ),
            wings_minus_it=SkillDifferences(
                text=accuracy_difference(
                    [seed["text"] for seed in wings], [seed["text"] for seed in found]
                ),
                visual=accuracy_difference(
                    [seed["visual"] for seed in wings], [seed["visual"] for seed in found]
                ),
            ),
            t=in_setting["T"],
            t_t=in_setting["T,T"],
            t_t_t=in_setting["T,T,T"],
            t_t_v=in_setting["T,T,V"],
            t_v=in_setting["T,V"],
            v=in_setting["V"],
            with_first_token=shift["with first token"],
            without_first_token=shift["without first token"],
            trainable=float(np.median([run.cost.trainable for run in runs])),
            step_s=float(np.median([run.cost.step_s for run in runs])),
            memory_bytes=float(np.median([run.cost.memory_bytes for run in runs])),
            alpha=[run.alpha for run in runs if run.alpha is not None],
            language=summarize_language(runs, arms) if runs[0].text_losses else None,
        )
    return summary


def summarize_language(runs: list[ArmRecord], arms: dict[str, list[ArmRecord]]) -> LanguageSkills:
    """Returns what an arm's runs left of the language model's own skills."""
    base, wings = arms["base"], arms["wings"]

    def losses(of: list[ArmRecord]) -> NDArray[np.float64]:
        return np.array([run.text_losses for run in of])

    def alike(of: list[ArmRecord], rule: Callable[[str, str], bool]) -> NDArray[np.float64]:
        both = zip(of, base, strict=True)
        return np.array([list(map(rule, run.answers, own.answers)) for run, own in both], float)

    kept = alike(runs, same_meaning)
    return LanguageSkills(
        loss=mean_over_seeds(losses(runs)),
        loss_above_base=mean_over_seeds(losses(runs) - losses(base)),
        same_meaning=mean_over_seeds(kept),
        identical=float(alike(runs, operator.eq).mean()),
        wings_loss_minus_it=mean_over_seeds(losses(wings) - losses(runs)),
        wings_same_meaning_minus_it=mean_over_seeds(alike(wings, same_meaning) - kept),
    )


def language_table(summary: dict[str, ArmSummary]) -> list[list[str]]:
    """Returns header and one row per arm: loss on text, and answers that kept their meaning."""
    rows = [
        [
            "arm", "loss on text", "above the base's", "Wings' less its own", "same meaning %", "identical %",
            "Wings' same meaning minus it",
        ]
    ]  # fmt: skip
    for name, entry in summary.items():
        skills = entry.language
        if skills is None:
            continue
        base, others = name == "base", name not in ("base", "wings")
        rows.append(
            [
                ARMS[name].title,
                f"{skills.loss[0]:.3f}",
                "" if base else nats(skills.loss_above_base),
                nats(skills.wings_loss_minus_it) if others else "",
                "" if base else percent_interval(*skills.same_meaning),
                "" if base else percent(skills.identical),
                points(*skills.wings_same_meaning_minus_it) if others else "",
            ]
        )
    return rows


def nats(value: Estimate) -> str:
    """Returns a difference of losses with its interval."""
    point, (low, high) = value
    return f"{point:+.3f} [{low:+.3f}, {high:+.3f}]"


def _mean_shift(runs: list[ArmRecord], key: FirstToken) -> Estimate | None:
    """Returns the mean attention shift over prompts and seeds, where any prompt has one."""
    values = np.array([shift for run in runs for shift in run.shift[key]])
    return (float(values.mean()), mean_interval(values)) if len(values) else None


def _shift_cell(value: Estimate | None) -> str:
    return f"{value[0]:.2f} [{value[1][0]:.2f}, {value[1][1]:.2f}]" if value else "undefined"


def target_verdict(summary: dict[str, ArmSummary]) -> str:
    """Says whether Wings is as good as it should be: text kept, and
    sight next to the best baseline.
    """
    kept = summary["wings"].text[0] / summary["base"].text[0]
    baselines = [name for name in summary if name != "base" and not name.startswith("wings")]
    best = max(baselines, key=lambda name: summary[name].visual[0])
    ahead = summary[best].wings_minus_it.visual
    behind = -100 * ahead[0]
    met = kept >= KEPT and behind <= MAX_POINTS_BEHIND
    return (
        f"Target: {percent(KEPT)} % of the base's text-only accuracy, at most {MAX_POINTS_BEHIND} point behind "
        f"the best baseline's visual accuracy. Wings keeps {percent(kept)} % and is {behind:.1f} points "
        f"behind {ARMS[best].title} (Wings minus it: {points(*ahead)}): {'met' if met else 'not met'}."
    )


def report_markdown(results: ForgettingResults) -> str:
    """Returns two tables in Markdown: skills, then attention and cost."""
    summary, plan = results.summary, results.plan
    before = summary["base"].text[0]
    skills = [
        [
            "arm", "language model's LR", "text-only % before", "after", "by seed", "change", "visual %",
            "by seed", "Wings' visual minus it",
        ]
    ]  # fmt: skip
    settings = [["arm", *SETTINGS, "mean"]]
    costs = [
        ["arm", "attention shift", "without first token", "trainable", "ms per step", "memory MB"]
    ]
    for name, entry in summary.items():
        title = ARMS[name].title
        after = entry.text
        skills.append(
            [
                title,
                plan.rate(ARMS[name]),
                percent(before),
                percent_interval(*after),
                ", ".join(map(percent, entry.by_seed.text)),
                f"{round(100 * (after[0] - before), 1) + 0:+.1f}",
                percent_interval(*entry.visual),
                ", ".join(map(percent, entry.by_seed.visual)),
                "" if name == "wings" else points(*entry.wings_minus_it.visual),
            ]
        )
        mean = percent(float(np.mean([point for point, _ in entry.settings])))
        settings.append([title, *(percent_interval(*one) for one in entry.settings), mean])
        shifts = [_shift_cell(entry.with_first_token), _shift_cell(entry.without_first_token)]
        cost = ["0", "", ""]
        if entry.trainable:
            cost = [
                f"{entry.trainable / 1e6:.2f} M",
                f"{1e3 * entry.step_s:.0f}",
                f"{entry.memory_bytes / 1e6:.0f}",
            ]
        costs.append([title, *shifts, *cost])
    rates = f"projector, learners and LoRA have {plan.new_lr}"
    if plan.projector_lr is not None:
        rates = f"the projector has {plan.projector_lr}, learners and LoRA {plan.new_lr}"
    language = ""
    if len(rows := language_table(summary)) > 1:
        language = f"""
The language model's own skills: next-token loss on {plan.text_tokens} tokens of each of {len(results.arms["base"][0].text_losses)} texts that come with
packages, in nats, and answers to {plan.instructions} instructions, which mean the same as the base's if they share half of their words:

{as_markdown(rows)}"""
    merged = ""
    if "merge" in summary:
        alphas = ", ".join(map(str, summary["merge"].alpha))
        merged = f"Merging chose alpha {alphas} on validation scenes.\n"
    return f"""# Text skills before and after learning to see

`{results.command}`, {results.device}; base: {results.base}; seeds {", ".join(map(str, plan.seeds))}.

Brackets are 95 % bootstrap intervals over seeds and scenes; there are few seeds, so their spread is
poorly known; a difference's is paired by question. All arms share tower, data, projector, {plan.stage1_steps} steps of stage 1 and
{plan.stage2_steps} of stage 2 on visual questions alone. The language model's rate is
{plan.stock_lr} (stock) or {plan.wings_lr} (Wings'); {rates}.
An image is shown by {plan.patches} of its 576 tokens, those of all objects among them.
{merged}
{as_markdown(skills)}
{target_verdict(summary) if len(summary) > len(NEEDED) and before else ""}
{language}

Interleaved conversations, last turn, right answers % (T text, V image, earlier replies given):

{as_markdown(settings)}
Attention shift is 1 minus the correlation over layers of attention before and after the image (0 is
best, 2 worst); its interval is over prompts. Memory: weights, gradients, Adam's moments and
saved activations of a step.

{as_markdown(costs)}
![attention by layer, and accuracy]({NAME}.png)
"""


def plot(arms: dict[str, list[ArmRecord]], summary: dict[str, ArmSummary], path: Path) -> None:
    """Draws attention by layer of every arm, and bars of text-only and visual accuracy.

    Args:
        arms: for each arm what was measured with each seed.
        summary: figures with intervals, of `summarize_arms`.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(3 * columns, 2.2 * rows + 3.5), layout="constrained")
    grid = figure.add_gridspec(rows + 2, columns)
    for number, (name, runs) in enumerate(arms.items()):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        curves = np.array([run.curves["with first token"] for run in runs], float)
        layers = range(1, curves.shape[-1] + 1)
        for group, label in enumerate(GROUPS):
            for one in curves:
                axes.plot(layers, one[group], color=COLORS[group], alpha=0.3, lw=0.8)
            axes.plot(layers, curves[:, group].mean(0), color=COLORS[group], label=label)
        value = summary[name].with_first_token
        shift = f"\nshift {value[0]:.2f}" if value else ""
        axes.set_title(f"{ARMS[name].title}{shift}", fontsize=8)
        axes.tick_params(labelsize=7)
        if number == 0:
            axes.legend(fontsize=7)
            axes.set_ylabel("share of attention", fontsize=8)
    axes = figure.add_subplot(grid[rows:, :])
    centers = np.arange(len(arms))
    for offset, (part, color) in enumerate(zip(("text", "visual"), COLORS, strict=False)):
        means = np.array([getattr(summary[name], part)[0] for name in arms])
        limits = np.array([getattr(summary[name], part)[1] for name in arms]).T
        errors = np.abs(limits - means)
        axes.bar(
            centers + 0.4 * offset - 0.2, 100 * means, 0.38, yerr=100 * errors, color=color,
            label={"text": "text-only", "visual": "visual"}[part], capsize=2,
        )  # fmt: skip
    axes.set_xticks(centers, [fill(ARMS[name].title, 14) for name in arms], fontsize=7)
    axes.set_ylabel("right answers %")
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.savefig(path, format="png", dpi=110)
