"""Run methods against the unpruned model over tasks; killed at any moment, it resumes."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_prune.benchmarks.evaluation.prompts import Prompts, make_prompts
from vlm_prune.benchmarks.evaluation.summarize import summarise
from vlm_prune.benchmarks.evaluation.timing import Phases, timed_generate
from vlm_prune.benchmarks.tasks import TASKS, Sample
from vlm_prune.benchmarks.tasks.base import shares
from vlm_prune.learners.store import adapter_digest
from vlm_prune.pruning import DecoderPruner
from vlm_prune.pruning.registry import build
from vlm_prune.pruning.schedule import Schedule
from vlm_prune.vlm.chat import render
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import write_json
from vlm_prune.vlm.common.folder import OutputFolder, check_settings, record_settings
from vlm_prune.vlm.trace import Trace

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Variant:
    """A method with its budget and other hyperparameters."""

    method: str
    budget: int | float
    positions: str = "auto"
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> Any:
        """The pruner; unknown hyperparameters raise `InputError`."""
        try:
            return build(
                self.method,
                budget=self.budget, positions=self.positions, seed=seed, **self.arguments,
            )  # fmt: skip
        except TypeError as error:
            raise InputError(f"method {self.method!r}: {error}") from error

    def scheduled(self, schedule: Schedule) -> "Variant | None":
        """The variant that cuts by `schedule`; None for a method that makes no cuts."""
        pruner = self.build(0)
        for part, key in (
            (pruner, "schedule"),
            (getattr(pruner, "inside", None), "inside.schedule"),
        ):
            if isinstance(part, DecoderPruner):
                return replace(self, arguments=self.arguments | {key: asdict(schedule)})
        return None


@dataclass(frozen=True)
class RunConfig:
    """What decides a run's results; a folder holds the results of one.

    `wings` and `peft` are adapters that the pruned and the unpruned model both have; `device_map`,
    `quantization` and `attn` are those of `load`.
    """

    model: str
    variant: Variant
    tasks: tuple[str, ...]
    limit: int
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0
    split: str = "test"
    wings: str | None = None
    device_map: str | None = None
    quantization: str | None = None
    attn: str | None = None
    peft: str | None = None


def samples_of(tasks: tuple[str, ...], limit: int, seed: int, split: str) -> list[Sample]:
    """`limit` questions in all, spread evenly over the tasks."""
    return [
        TASKS[name].sample(index, seed, split)  # type: ignore[arg-type]
        for name, share in shares(tasks, limit).items()
        for index in range(share)
    ]


class RunFolder:
    """`config.json`, one row per question in `samples.jsonl`, `results.json` at the end.

    One run writes to a folder at a time; of several processes of a run it is the first. A `with`
    block lets go of the folder at its end. A run that is refused before its first row leaves no
    configuration behind.
    """

    folder: OutputFolder | None = None

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.settings = asdict(config)
        if config.wings is not None:  # an adapter may change under its name
            self.settings["adapter"] = adapter_digest(config.wings)
        if config.peft is not None:
            self.settings["peft_digest"] = adapter_digest(config.peft)
        self.rows: dict[str, dict[str, Any]] = {}
        if int(os.environ.get("RANK", "0")) > 0:
            return
        self.folder = OutputFolder(path)
        try:
            if not check_settings(path / "config.json", self.settings) and self.log.exists():
                raise InputError(f"{path} holds results without config.json; remove the folder")
            self.rows = self._read()
        except BaseException:
            self.folder.release()
            raise

    def record(self) -> None:
        """Write the configuration, once everything about the run was found to be right."""
        record_settings(self.path / "config.json", self.settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.folder.release()

    @property
    def log(self) -> Path:
        return self.path / "samples.jsonl"

    def _read(self) -> dict[str, dict[str, Any]]:
        """Rows written so far; a line cut off by a kill is removed."""
        if not self.log.is_file():
            return {}
        text = self.log.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.log.open("r+b") as file:
                file.truncate(len(whole))
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            return {row["id"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.log} is damaged ({error}); remove {self.path}") from error

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.record()
        new = [row for row in rows if row["id"] not in self.rows]
        with self.log.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["id"]: row for row in new}

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Scores of the pruned model by task, in the order of the questions."""
        rows = [self.rows[name] for name in sorted(self.rows)]
        return {
            task: np.array([row["score"] for row in rows if row["task"] == task], float)
            for task in dict.fromkeys(row["task"] for row in rows)
        }


def evaluate(
    model: Any,
    processor: Any,
    folders: list[RunFolder],
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Fill the folders, which differ only in their variant, and return their results.

    Images are encoded once and the unpruned answers made once for all folders. Batches are fixed
    slices of the sample list, so a resumed run computes the very batches that are missing.
    """
    config = folders[0].config
    samples = samples_of(config.tasks, config.limit, config.seed, config.split)
    pruners = [folder.config.variant.build(config.seed) for folder in folders]
    for pruner in pruners:
        pruner.admit(model)
    warm = False
    for start in range(0, len(samples), config.batch_size):
        batch = samples[start : start + config.batch_size]
        missing = [
            (folder, pruner)
            for folder, pruner in zip(folders, pruners, strict=True)
            if any(sample.id not in folder.rows for sample in batch)
        ]
        if missing:
            if not warm:  # the first pass pays for allocations and lazy hooks
                for _ in _answer(model, processor, batch[:1], [p for _, p in missing]):
                    warm = True
            answers = _answer(model, processor, batch, [pruner for _, pruner in missing])
            for (folder, _), rows in zip(missing, answers, strict=True):
                folder.append(rows)
        progress(len(batch))
    results = []
    for folder in folders:
        rows = [folder.rows[sample.id] for sample in samples]
        results.append(summarise(folder.config, rows, model))
        write_json(folder.path / "results.json", results[-1])
    return results


@torch.inference_mode()
def _answer(
    model: Any, processor: Any, batch: list[Sample], pruners: list[Any]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one batch for each pruner."""
    prompts = prompts_of(model, processor, batch)
    encoding = prompts.vision_s
    baseline, before, _ = replies_to(model, processor, prompts)
    for pruner in pruners:
        ours, after, trace = replies_to(model, processor, prompts, pruner)
        times = {
            "vision": after.vision or encoding,
            "selection": after.selection,
            "prefill": after.prefill,
            "decode": after.decode,
            "baseline_vision": encoding,
            "baseline_prefill": before.prefill,
            "baseline_decode": before.decode,
        }
        rows = []
        for number, sample in enumerate(batch):
            task = TASKS[sample.id.split("/")[0]]
            rows.append(
                described(sample)
                | {
                    "baseline": baseline[number],
                    "prediction": ours[number],
                    "baseline_score": task.score(baseline[number], sample.answer),
                    "score": task.score(ours[number], sample.answer),
                    **prompts.row(number, trace),
                    "time_ms": {key: 1e3 * t / len(batch) for key, t in times.items()},
                }
            )
        yield rows


def prompts_of(model: Any, processor: Any, batch: list[Sample]) -> Prompts:
    """The conversations of samples, their images encoded."""
    texts = [render(processor, s.messages(), add_generation_prompt=True) for s in batch]
    return make_prompts(model, processor, texts, [list(sample.images) for sample in batch])


def replies_to(
    model: Any, processor: Any, prompts: Prompts, pruner: Any | None = None
) -> tuple[list[str], Phases, Trace]:
    """Greedy answers, their phases, and what was pruned."""
    new, phases, trace = timed_generate(model, prompts, pruner, max_new_tokens=MAX_NEW_TOKENS)
    replies = processor.batch_decode(new, skip_special_tokens=True)
    return [reply.strip() for reply in replies], phases, trace


def described(sample: Sample) -> dict[str, Any]:
    """The part of a row that says what was asked."""
    return {
        "id": sample.id,
        "task": TASKS[sample.id.split("/")[0]].name,
        "subset": sample.subset,
        "question": sample.turns[-1].text,
        "answer": sample.answer,
    }
