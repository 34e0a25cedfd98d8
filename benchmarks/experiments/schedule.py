"""Find where a model's text-to-vision attention shifts, and propose where to cut."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm_prune.benchmarks.evaluation.engine import samples_of
from vlm_prune.benchmarks.evaluation.environment import command_line, versions
from vlm_prune.benchmarks.evaluation.prompts import make_prompts
from vlm_prune.learners.data import messages, read_llava
from vlm_prune.pruning import AdaptInfer
from vlm_prune.pruning.received import from_rows
from vlm_prune.pruning.schedule import Schedule
from vlm_prune.pruning.shift import change_points, histogram, propose
from vlm_prune.vlm.chat import render
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import atomic_path, write_json
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.probe import question_rows

FILES = ("schedule.json", "schedule.png")


@dataclass(frozen=True)
class Prompt:
    """A conversation in the chat-template format that ends with a question about its images."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]


def prompts_of_tasks(tasks: tuple[str, ...], limit: int, seed: int) -> list[Prompt]:
    """Draws questions with images of the embedded tasks' validation split.

    Args:
        tasks: names of embedded tasks.
        limit: questions in all, those without an image included.
        seed: of the questions.
    """
    samples = samples_of(tasks, limit, seed, "val")
    return [Prompt(s.messages(), list(s.images)) for s in samples if s.images]


def prompts_of_file(path: Path, images: Path | DataRoot, limit: int) -> list[Prompt]:
    """Reads the first questions of conversations in LLaVA's JSON format, those with images.

    Args:
        path: of the JSON.
        images: folder that its image names are in.
        limit: most questions.

    Raises:
        InputError: if the file or an image cannot be read.
    """
    shown = [example for example in read_llava(path, images) if "<image>" in example.turns[0][0]]
    return [
        Prompt(
            messages(e)[:1],
            e.opened(e.turns[0][0].count("<image>")),
        )
        for e in shown[:limit]
    ]


def change_points_of(
    model: Any,
    processor: Any,
    prompts: list[Prompt],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[int], list[int]]:
    """Returns the change points of all images of all prompts, and how many tokens each image has.

    Args:
        model: of a supported family.
        processor: the model's.
        prompts: with images.
        batch_size: prompts per forward pass.
        progress: called with the number of prompts done.
    """
    family, points, sizes = family_of(model), list[int](), list[int]()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        texts = [render(processor, p.messages, add_generation_prompt=True) for p in batch]
        encoded_prompts = make_prompts(model, processor, texts, [prompt.images for prompt in batch])
        assert encoded_prompts.vision is not None
        encoded = family.output(encoded_prompts.vision.projected, encoded_prompts.vision.deepstack)
        # of each layer the attention (m, n) of the images of each number of tokens
        layers = [
            [from_rows(rows, rows.columns).cpu() for rows in groups]
            for groups in question_rows(
                model, encoded_prompts.tensors | {"mm_encoder_outputs": encoded}
            )
        ]
        for group in zip(*layers, strict=True):
            # (m, layers, n)
            for attention in torch.stack(group, 1):
                points += change_points(attention)
        sizes += encoded_prompts.vision.counts
        progress(len(batch))
    return points, sizes


def proposal(model: Any, points: list[int], budget: int, cuts: int, tokens: int) -> dict[str, Any]:
    """Returns what `Schedule.read` reads, the evidence for it, and the cuts that it means.

    Args:
        model: whose layers they are.
        points: change points, of `change_points_of`.
        budget: image tokens kept per image.
        cuts: most cuts.
        tokens: of an image.

    Raises:
        InputError: if attention never shifts where a cut could stand, or the budget is too large.
    """
    layers, pattern = len(family_of(model).decoder.layers), AdaptInfer().pattern()
    counts = histogram(points, layers)
    depths = propose(counts, min(cuts, len(pattern)))
    if not depths:
        raise InputError("no layer stands out, so there is nothing to propose; give more --limit")
    schedule = Schedule(layers, tuple(depths), tuple(share for _, share in pattern[: len(depths)]))
    method = AdaptInfer(budget=budget, schedule=schedule)
    chosen_cuts = method.cuts(tokens, layers)
    computed = [
        float(min([tokens, *(cut.keep for cut in chosen_cuts if cut.layer <= layer)]))
        for layer in range(layers)
    ]
    return {
        **asdict(schedule),
        "histogram": counts,
        "change_points": len(points),
        "budget": budget,
        "tokens": tokens,
        "cuts": [asdict(cut) for cut in chosen_cuts],
        "counts": method.counts(tokens, computed),
        "versions": versions(),
        "command": command_line(),
    }


def draw_schedule(content: dict[str, Any], path: Path) -> None:
    """Draws the histogram of change points with the proposed cuts, as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "the picture needs matplotlib: pip install 'vlm-prune[schedule]'"
        ) from None
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(content["layers"]), content["histogram"], color="#8aa4c8")
    for number, depth in enumerate(content["places"]):
        label = "proposed cuts" if number == 0 else None
        axes.axvline(depth - 0.5, color="#b3261e", linestyle="--", label=label)
    axes.set(
        xlabel="decoder layer where text-to-vision attention changes", ylabel="image tokens",
        title=f"{content['change_points']} change points",
    )  # fmt: skip
    axes.legend()
    figure.savefig(path, format="png")


def save_schedule(content: dict[str, Any], folder: Path) -> None:
    """Writes `schedule.json` and `schedule.png`."""
    with atomic_path(folder / FILES[1]) as partial:
        draw_schedule(content, partial)
    write_json(folder / FILES[0], content)
