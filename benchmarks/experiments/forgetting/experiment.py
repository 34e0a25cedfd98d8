"""The experiment's course: each (seed, arm) leaves a file and is skipped when that file is there."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed

from vlm_prune.benchmarks.embedded_models.symbols import Symbols, align_projector, word_ids
from vlm_prune.benchmarks.evaluation.environment import command_line, device_name, versions
from vlm_prune.benchmarks.experiments.forgetting.arms import ARMS, Arm, Plan, chosen_arms
from vlm_prune.benchmarks.experiments.forgetting.data import (
    Shown,
    encode_scenes,
    held_out_rows,
    shift_rows,
)
from vlm_prune.benchmarks.experiments.forgetting.measure import (
    ADVICE,
    ArmCost,
    ArmRecord,
    FirstToken,
    Hits,
    accuracy_over_kinds,
    language_skills,
    right_answers,
    shift_curves,
)
from vlm_prune.benchmarks.experiments.forgetting.records import ForgettingResults
from vlm_prune.benchmarks.experiments.forgetting.report import summarize_arms, write_report
from vlm_prune.benchmarks.experiments.forgetting.train import Cost, first_stage, trained
from vlm_prune.benchmarks.tasks.base import SPLITS
from vlm_prune.benchmarks.tasks.scenes import COLORS, NAMES
from vlm_prune.learners.laws import attention_shift
from vlm_prune.learners.merge import merge
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import atomic_path, write_folder, write_text
from vlm_prune.vlm.common.folder import OutputFolder, record_settings
from vlm_prune.vlm.common.records import read_record, to_json
from vlm_prune.vlm.common.terminal import console, quiet
from vlm_prune.vlm.load import load
from vlm_prune.vlm.smol.base import digest, language_folder
from vlm_prune.vlm.tiny import text_language_model

LANGUAGE, PROJECTOR = "model.language_model.", "model.multi_modal_projector."


def run(
    plan: Plan,
    output: Path,
    results: Path,
    base: Path | None = None,
    jobs: int = 1,
    names: Sequence[str] | None = None,
) -> ForgettingResults:
    """Runs what is missing in `output`, then writes JSON, table and plot to `results`.

    Args:
        plan: sizes and rates.
        output: the experiment's folder; a killed experiment goes on there.
        results: where `forgetting.json`, `.md` and `.png` go.
        base: safetensors with a language model that has seen text alone; the packaged one by
            default.
        jobs: processes; each does one arm at a time.
        names: of the arms, all by default; `base` and `wings` are always among them.

    Raises:
        InputError: if there is no such arm, `output` holds an experiment with other settings,
            `base` does not fit, or a package is missing.
    """
    for package in ("matplotlib", "peft"):
        if find_spec(package) is None:  # not only after all the training
            raise InputError(f"this needs {package}: pip install 'vlm-prune[plot,train]'")
    chosen = chosen_arms(tuple(ARMS) if names is None else names)
    base = base or text_only(plan.model)
    load_language_model(load(plan.model)[0], base)  # a wrong file must not claim the folder
    about = f"{base.name} (sha256 {digest(base)})"
    with OutputFolder(output):
        record_settings(output / "experiment.json", {"plan": asdict(plan), "base": about})
        found = _run_arms(plan, output, base, jobs, chosen)
    arms = {name: [found[seed, name] for seed in plan.seeds] for name in chosen}
    measured = ForgettingResults(
        plan=plan,
        base=about,
        device=device_name(torch.device("cpu")),
        versions=versions(),
        command=command_line(),
        arms=arms,
        summary=summarize_arms(arms),
    )
    write_report(measured, results)
    return measured


def text_only(model: str) -> Path:
    """Returns the weights that the language model of an embedded model had before it saw images."""
    return language_folder() / "model.safetensors" if model == "smol" else text_language_model()


def _run_arms(
    plan: Plan, output: Path, base: Path, jobs: int, names: tuple[str, ...]
) -> dict[tuple[int, str], ArmRecord]:
    """Returns what is measured of each arm with each seed; what is missing is run.

    Args:
        plan: sizes and rates.
        output: the experiment's folder.
        base: weights of the text-only language model.
        jobs: processes.
        names: of the arms.
    """
    _shown(plan, output)  # here, so that not each process computes features
    spread = Parallel(n_jobs=jobs, return_as="generator")
    list(spread(delayed(_begun)(plan, output, base, seed, names) for seed in plan.seeds))
    found, lines = {}, console()
    pairs = list(product(plan.seeds, names))
    for after in (False, True):  # merging takes the weights of full tuning
        wave = [(seed, name) for seed, name in pairs if ARMS[name].merged is after]
        runs = spread(delayed(_finished)(plan, output, seed, name) for seed, name in wave)
        for (seed, name), entry in zip(wave, runs, strict=True):
            found[seed, name] = entry
            figures = ", ".join(
                f"{part} {100 * accuracy_over_kinds(entry.hits[part]):.1f} %"
                for part in ("text", "visual")
            )
            rate = f"language model's LR {plan.rate(ARMS[name])}"
            progress = f"{len(found)}/{len(pairs)} seed {seed}, {ARMS[name].title}"
            lines.print(f"{progress}, {rate}: {figures}")
    return found


@cache
def _shown(plan: Plan, output: Path) -> dict[str, Shown]:
    """Returns the scenes of all splits; a process draws them once."""
    quiet()  # here, too, for a process of its own
    model, processor = load(plan.model)
    sizes = {"train": plan.train_scenes, "val": plan.val_scenes, "test": plan.test_scenes}
    return {split: encode_scenes(model, processor, split, sizes[split], output) for split in SPLITS}


def _begun(plan: Plan, output: Path, base: Path, seed: int, names: tuple[str, ...]) -> None:
    """Makes what the arms of a seed share.

    Args:
        plan: sizes and rates.
        output: the experiment's folder.
        base: weights of the text-only language model.
        seed: of the arms.
        names: of the arms.
    """
    folder, shown = output / f"seed-{seed}" / "aligned", _shown(plan, output)["train"]
    aligned(folder, base, plan, shown, seed)
    for arm in (ARMS[name] for name in names):
        if arm.method is not None:
            first_stage(folder, arm, plan, shown, seed)


def _finished(plan: Plan, output: Path, seed: int, name: str) -> ArmRecord:
    """Returns what is measured of one arm, from its file if it is there.

    Args:
        plan: sizes and rates.
        output: the experiment's folder.
        seed: of the arm.
        name: of the arm.
    """
    folder = output / f"seed-{seed}"
    path = folder / f"{name}.json"
    if not path.is_file():
        shown = _shown(plan, output)
        record = measure_arm(folder, name, ARMS[name], plan, shown, seed)
        write_text(path, to_json(record))
    return read_record(path, ArmRecord, ADVICE)


def aligned(folder: Path, base: Path, plan: Plan, shown: Shown, seed: int) -> None:
    """Writes a checkpoint of the base language model behind a new projector, unless it is there.

    The projector starts random and is fitted to the word embeddings of what patches show, so that
    few steps of training suffice afterward; where the plan has no steps for that, it is the packaged
    model's.

    Args:
        folder: of the checkpoint.
        base: safetensors with the language model.
        plan: steps of the fit.
        shown: training scenes.
        seed: of the projector.

    Raises:
        InputError: if `base` holds no language model of this shape.
    """
    if (folder / "config.json").is_file():
        return
    set_seed(seed)
    model, processor = load(plan.model, dtype="float32")
    load_language_model(model, base)
    if plan.align_steps:
        _align(model, processor, plan, shown)

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)

    write_folder(folder, fill)


def _align(model: Any, processor: Any, plan: Plan, shown: Shown) -> None:
    """Fits a new projector to the word embeddings of what patches show.

    Args:
        model: whose projector it is.
        processor: the model's.
        plan: steps of the fit.
        shown: training scenes.
    """
    projector = model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()
    names, colors = (word_ids(processor.tokenizer, words) for words in (NAMES, list(COLORS)))
    symbols = Symbols(model.get_input_embeddings(), names, colors, grid=24)
    triples = shown.triples()
    with torch.no_grad():
        targets = symbols(triples)
    features = shown.features.flatten(0, 1)
    align_projector(
        projector, features, targets, triples[:, 0] > 0, plan.align_steps, lambda step, **_: None
    )


def load_language_model(model: Any, path: Path) -> None:
    """Takes the language model out of a safetensors file, whatever else is in it.

    Words that are new to the model, such as that of the image, keep their embedding.

    Raises:
        InputError: if it is not there, or has another shape.
    """
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            # of a vision-language model, or of a language model alone
            part = next(
                (p for p in ("language_model.", "model.") if any(p in n for n in names)), None
            )
            if part is None:
                raise InputError("it holds none")
            state = {
                name.rsplit(part, 1)[1]: file.get_tensor(name) for name in names if part in name
            }
        words = model.get_input_embeddings().weight.data
        if 0 < len(known := state["embed_tokens.weight"]) < len(words):
            state["embed_tokens.weight"] = torch.cat([known, words[len(known) :]])
        model.model.language_model.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot take a language model from {path}: {reason}") from error
    model.tie_weights()


def measure_arm(
    folder: Path, name: str, arm: Arm, plan: Plan, shown: dict[str, Shown], seed: int
) -> ArmRecord:
    """Trains one arm where there is something to train, and measures it on the test split.

    Args:
        folder: of the seed.
        name: of the arm.
        arm: what trains.
        plan: sizes and rates.
        shown: scenes of each split.
        seed: of training and questions.

    Returns:
        Hits by part and kind, attention curves, attention shifts, losses on texts and answers to
        instructions where the plan asks for them, and the cost of training.
    """
    set_seed(seed)
    alpha, validation = None, None
    cost = Cost()
    if arm.method is not None:
        model, processor, cost = trained(folder / "aligned", arm, plan, shown["train"], seed)
        if name == "full":
            with atomic_path(folder / "full.safetensors") as partial:
                save_file(_language_and_projector(model), partial)
    elif arm.merged:
        model, processor, alpha, validation = merged(folder, plan, shown["val"], seed)
    else:
        model, processor = load(str(folder / "aligned"), dtype="float32")
        first = load_file(first_stage(folder / "aligned", ARMS["full"], plan, shown["train"], seed))
        model.load_state_dict(
            {n.replace("projector.", PROJECTOR): t for n, t in first.items()}, strict=False
        )
    test = shown["test"]
    rows = shift_rows(test, plan, np.random.default_rng([seed, 2]))
    curves: dict[FirstToken, Tensor] = {
        "with first token": shift_curves(model, processor, rows, True),
        "without first token": shift_curves(model, processor, rows, False),
    }
    losses, answers = language_skills(model, processor, plan)
    return ArmRecord(
        hits=_tested(model, processor, test, plan, [seed, 0]),
        curves={key: _mean_curves(value) for key, value in curves.items()},
        shift={key: _shift(value) for key, value in curves.items()},
        cost=ArmCost(**asdict(cost)),
        text_losses=losses,
        answers=answers,
        alpha=alpha,
        validation=validation,
    )


def _tested(model: Any, processor: Any, shown: Shown, plan: Plan, key: list[int]) -> Hits:
    """Returns right answers to the questions that `key` draws, the same for all arms of a seed.

    Args:
        model: that answers.
        processor: the model's.
        shown: scenes to ask about.
        plan: sizes.
        key: seeds the draw.
    """
    return right_answers(model, processor, held_out_rows(shown, plan, np.random.default_rng(key)))


def merged(
    folder: Path, plan: Plan, val: Shown, seed: int
) -> tuple[Any, Any, float, dict[str, float]]:
    """Moves full tuning back to its base, as far as is best on validation scenes.

    Args:
        folder: of the seed, with the base and the weights of full tuning.
        plan: the shares to try.
        val: validation scenes.
        seed: of the questions.

    Returns:
        The model, its processor, the chosen share, and the score of each.
    """
    base, processor = load(str(folder / "aligned"), dtype="float32")
    tuned = load_file(folder / "full.safetensors")

    def at(alpha: float) -> Any:
        model, _ = load(str(folder / "aligned"), dtype="float32")
        model.load_state_dict(tuned, strict=False)
        merge(base, model, alpha)
        return model

    scores = {}
    for alpha in plan.alphas:
        found = _tested(at(alpha), processor, val, plan, [seed, 1])
        scores[alpha] = (
            accuracy_over_kinds(found["text"]) + accuracy_over_kinds(found["visual"])
        ) / 2
    best = max(scores, key=lambda alpha: scores[alpha])
    return at(best), processor, best, {str(alpha): score for alpha, score in scores.items()}


def _language_and_projector(model: Any) -> dict[str, Tensor]:
    return {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith((LANGUAGE, PROJECTOR))
    }


def _mean_curves(curves: Tensor) -> list[list[float | None]]:
    means: list[list[float]] = curves.nanmean(0).tolist()
    return [[None if math.isnan(mean) else mean for mean in group] for group in means]


def _shift(curves: Tensor) -> list[float]:
    """Returns the attention shift of each row; a row whose curve does not vary has none."""
    shift = attention_shift(curves)
    defined: list[float] = shift[shift.isfinite()].tolist()
    return defined
