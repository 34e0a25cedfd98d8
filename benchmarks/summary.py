"""What the rows of one run come to: `results.json`."""

import resource
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm_prune.benchmarks.environment import command, device_name, versions
from vlm_prune.benchmarks.metrics.bootstrap import accuracy_interval, retained
from vlm_prune.learners.cost import learner_flops, router_flops
from vlm_prune.vlm.cost import key_value_bytes, prefill_flops, tower_flops
from vlm_prune.vlm.families import family_of

if TYPE_CHECKING:
    from vlm_prune.benchmarks.run import RunConfig


def summarise(config: "RunConfig", rows: list[dict[str, Any]], model: Any) -> dict[str, Any]:
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
        own = prefill_flops(text, row["text_tokens"], per_layer)
        if config.wings is not None:
            added = text, model.wings.config, row["text_tokens"], per_layer
            own += learner_flops(*added) + router_flops(*added)
        return tower + own

    pruner = config.variant.build(config.seed)
    papers = [pruner.papers_count(full, row["layer_tokens"]) for row in seen]
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
        "definition": pruner.definition(full),
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
            "papers": None if None in papers else mean(papers),
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
