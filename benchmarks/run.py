"""Run methods against the unpruned model over tasks; killed at any moment, it resumes."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_prune.benchmarks.environment import command, device_name, versions
from vlm_prune.benchmarks.latency import Phases, timed_generate
from vlm_prune.benchmarks.metrics.bootstrap import accuracy_interval, retained
from vlm_prune.benchmarks.tasks import TASKS, Sample
from vlm_prune.vlm.cost import key_value_bytes, prefill_flops, tower_flops
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.errors import InputError
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.session import now
from vlm_prune.vlm.tokens import Trace
from vlm_prune.vlm.wrapper import build

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


@dataclass(frozen=True)
class RunConfig:
    """What decides a run's results; a folder holds the results of one."""

    model: str
    variant: Variant
    tasks: tuple[str, ...]
    limit: int
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0
    split: str = "test"


def samples_of(tasks: tuple[str, ...], limit: int, seed: int, split: str) -> list[Sample]:
    """`limit` questions in all, spread evenly over the tasks."""
    shares = [limit * (i + 1) // len(tasks) - limit * i // len(tasks) for i in range(len(tasks))]
    return [
        TASKS[name].sample(index, seed, split)  # type: ignore[arg-type]
        for name, share in zip(tasks, shares, strict=True)
        for index in range(share)
    ]


class RunFolder:
    """`config.json`, one row per question in `samples.jsonl`, `results.json` at the end."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        path.mkdir(parents=True, exist_ok=True)
        wanted, stored = json.loads(json.dumps(asdict(config))), path / "config.json"
        if stored.is_file():
            found = json.loads(stored.read_text())
            changed = [key for key in wanted if found.get(key) != wanted[key]]
            if changed:
                raise InputError(
                    f"{path} holds a run with another {', '.join(changed)}; "
                    "give another --output or remove the folder"
                )
        elif any(path.glob("*.jsonl")):
            raise InputError(f"{path} holds samples.jsonl without config.json; remove the folder")
        else:
            write_json(stored, wanted)
        self.rows = self._read()

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
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["id"]: row for row in rows}

    def append(self, rows: list[dict[str, Any]]) -> None:
        new = [row for row in rows if row["id"] not in self.rows]
        with self.log.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["id"]: row for row in new}


def write_text(path: Path, content: str) -> None:
    """Write all of the file or none of it."""
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write all of the file or none of it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


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
    if not family_of(model).fixed_size:
        raise InputError(
            f"eval and compare know models of one image size, such as llava; prune "
            f"{model.config.model_type} with PrunedVLM or a `with` block around generate"
        )
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
    family, device = family_of(model), model.device
    texts = [processor.apply_chat_template(s.messages(), add_generation_prompt=True) for s in batch]
    images = [image for sample in batch for image in sample.images]
    inputs = processor(
        text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt"
    ).to(device)
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    start = now(device)
    vision = family.encode(inputs["pixel_values"]) if images else None
    encoding = now(device) - start
    baseline, before, _ = _generate(model, processor, prompt, vision)
    for pruner in pruners:
        ours, after, trace = _generate(
            model, processor, prompt, vision, pruner, inputs.get("pixel_values")
        )
        times = {
            "vision": after.vision or encoding,
            "selection": after.selection,
            "prefill": after.prefill,
            "decode": after.decode,
            "baseline_vision": encoding,
            "baseline_prefill": before.prefill,
            "baseline_decode": before.decode,
        }
        rows, places = [], iter(trace.kept)
        for number, sample in enumerate(batch):
            task = TASKS[sample.id.split("/")[0]]
            length = int(prompt["attention_mask"][number].sum())
            rows.append(
                {
                    "id": sample.id,
                    "task": task.name,
                    "subset": sample.subset,
                    "question": sample.turns[-1].text,
                    "answer": sample.answer,
                    "baseline": baseline[number],
                    "prediction": ours[number],
                    "baseline_score": task.score(baseline[number], sample.answer),
                    "score": task.score(ours[number], sample.answer),
                    "images": len(sample.images),
                    "text_tokens": length - len(sample.images) * family.tokens_per_image,
                    "layer_tokens": trace.layer_tokens,
                    "kept": [kept.tolist() for kept in islice(places, len(sample.images))],
                    "time_ms": {key: 1e3 * t / len(batch) for key, t in times.items()},
                }
            )
        yield rows


def _generate(
    model: Any,
    processor: Any,
    prompt: dict[str, Any],
    vision: Images | None,
    pruner: Any | None = None,
    pixel_values: Tensor | None = None,
) -> tuple[list[str], Phases, Trace]:
    """Greedy answers, their phases, and what was pruned."""
    output, phases, trace = timed_generate(
        model, prompt, vision, pruner, pixel_values, max_new_tokens=MAX_NEW_TOKENS
    )
    replies = processor.batch_decode(
        output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [reply.strip() for reply in replies], phases, trace


def summarise(config: RunConfig, rows: list[dict[str, Any]], model: Any) -> dict[str, Any]:
    """The content of `results.json`."""
    family = family_of(model)

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else 0.0

    scores = {
        name: tuple(
            np.array([row[key] for row in rows if row["task"] == name], float)
            for key in ("baseline_score", "score")
        )
        for name in config.tasks
    }
    tasks = {}
    for name, (base, ours) in scores.items():
        point, interval = retained({name: (base, ours)})
        tasks[name] = {
            "n": len(base), "accuracy": ours.mean(), "baseline_accuracy": base.mean(),
            "accuracy_ci": accuracy_interval(ours), "retained": point, "ci": interval,
            "kept": mean([
                mean(row["layer_tokens"]) for row in rows if row["task"] == name and row["images"]
            ]),
        }  # fmt: skip
    point, interval = retained(scores)  # type: ignore[arg-type]
    seen = [row for row in rows if row["images"]] or rows
    full, layers = family.tokens_per_image, len(family.decoder.layers)
    text = model.config.get_text_config()

    def image_tokens(row: dict[str, Any]) -> list[float]:
        return [row["images"] * tokens for tokens in row["layer_tokens"]]

    def total(row: dict[str, Any], per_layer: list[float]) -> float:
        tower: float = row["images"] * tower_flops(model.config.vision_config)
        return tower + prefill_flops(text, row["text_tokens"], per_layer)

    itemsize = model.dtype.itemsize
    times = {
        key: float(np.median([row["time_ms"][key] for row in rows])) for key in rows[0]["time_ms"]
    }
    before = times["baseline_prefill"]
    after = times["selection"] + times["prefill"]
    whole = times["baseline_vision"] + before + times["baseline_decode"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(model.device)
    return {
        "model": config.model,
        "method": config.variant.method,
        "budget": config.variant.budget,
        "seed": config.seed,
        "config": asdict(config),
        "versions": versions(),
        "device": device_name(model.device),
        "command": command(),
        "tasks": tasks,
        "overall": {
            "accuracy": mean([task["accuracy"] for task in tasks.values()]),
            "baseline_accuracy": mean([task["baseline_accuracy"] for task in tasks.values()]),
            "retained": point,
            "ci": interval,
        },
        "tokens": {
            "full": full,
            "kept": mean([row["layer_tokens"][-1] for row in seen]),
            "layer_mean": mean([mean(row["layer_tokens"]) for row in seen]),
        },
        "time_ms": times,
        "speedup": {
            "prefill": before / after,
            "end_to_end": whole / (times["vision"] + after + times["decode"]),
        },
        "flops": {
            "baseline": mean([total(r, [r["images"] * float(full)] * layers) for r in rows]),
            "pruned": mean([total(r, image_tokens(r)) for r in rows]),
        },
        "kv_bytes": {
            "baseline": mean(
                [
                    key_value_bytes(text, r["text_tokens"], [r["images"] * full] * layers, itemsize)
                    for r in rows
                ]
            ),
            "pruned": mean(
                [key_value_bytes(text, r["text_tokens"], image_tokens(r), itemsize) for r in rows]
            ),
        },
        "peak_memory_bytes": peak,
    }
