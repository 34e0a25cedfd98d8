"""What the rows of one run come to: `results.json`."""

import resource
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm_prune.benchmarks.evaluation.environment import command, device_name, versions
from vlm_prune.benchmarks.stats.bootstrap import accuracy_interval, retained
from vlm_prune.learners.cost import learner_flops, router_flops
from vlm_prune.vlm.cost import key_value_bytes, prefill_flops
from vlm_prune.vlm.families import Family, family_of

if TYPE_CHECKING:
    from vlm_prune.benchmarks.evaluation.engine import RunConfig


def _seen(row: dict[str, Any], family: Family) -> tuple[list[int], float]:
    """Tokens of each of a row's images, and the FLOPs of the tower on all of them.

    A row that does not say is of a family whose images have one size.
    """
    if "image_tokens" in row:
        return row["image_tokens"], row["vision_flops"]
    whole = family.tokens_per_image
    return [whole] * row["images"], row["images"] * family.tower_flops([whole])


def _per_image(rows: list[dict[str, Any]], values: list[float], without: float = 0.0) -> float:
    """The mean over all images of what rows say about theirs; `without` any, that number."""
    images = [row["images"] for row in rows]
    return float(np.average(values, weights=images)) if any(images) else without


def summarise(config: "RunConfig", rows: list[dict[str, Any]], model: Any) -> dict[str, Any]:
    """The content of `results.json`."""
    family = family_of(model)

    def mean(values: Sequence[float]) -> float:
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
            "kept": _per_image(
                own := [row for row in rows if row["task"] == name],
                [mean(row["layer_tokens"]) for row in own],
            ),
        }  # fmt: skip
    point, interval = retained(scores)  # type: ignore[arg-type]
    layers, text = len(family.decoder.layers), model.config.get_text_config()
    seen = [(row, *_seen(row, family)) for row in rows]
    full = _per_image(rows, [mean(counts) for _, counts, _ in seen])
    if family.fixed_size:
        full = family.tokens_per_image
    unpruned = [(row, [float(sum(counts))] * layers) for row, counts, _ in seen]
    pruned = [(row, [row["images"] * tokens for tokens in row["layer_tokens"]]) for row in rows]
    towers = mean([tower for *_, tower in seen])

    def prefill(row: dict[str, Any], per_layer: list[float]) -> float:
        own = prefill_flops(text, row["text_tokens"], per_layer)
        if config.wings is not None:
            added = text, model.wings.config, row["text_tokens"], per_layer
            rides = model.device.type == "cpu"
            own += learner_flops(*added) + router_flops(*added, rides=rides)
        return own

    def held(row: dict[str, Any], per_layer: list[float]) -> float:
        return key_value_bytes(text, row["text_tokens"], per_layer, model.dtype.itemsize)

    pruner = config.variant.build(config.seed)
    shown = [row for row in rows if row["images"]]
    papers = [pruner.papers_count(round(full), row["layer_tokens"]) for row in shown]
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
        "definition": pruner.definition(round(full)),
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
        "fixed_size": family.fixed_size,
        "tokens": {
            "full": round(full) if full == round(full) else full,
            "kept": _per_image(rows, [row["layer_tokens"][-1] for row in rows], full),
            "layer_mean": _per_image(rows, [mean(row["layer_tokens"]) for row in rows], full),
            "papers": None if None in papers else _per_image(shown, papers, full),
        },
        "time_ms": times,
        "speedup": {
            "prefill": before / after,
            "end_to_end": whole / (times["vision"] + after + times["decode"]),
        },
        "flops": {
            name: towers + mean([prefill(*spent) for spent in run])
            for name, run in (("baseline", unpruned), ("pruned", pruned))
        },
        "kv_bytes": {
            name: mean([held(*spent) for spent in run])
            for name, run in (("baseline", unpruned), ("pruned", pruned))
        },
        "peak_memory_bytes": peak,
    }
