"""What was measured while answering, into `throughput` of lmms-eval's results."""

from typing import Any

import numpy as np
import torch
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from vlm_prune.benchmarks.lmms_eval.answers import StoredAnswer
from vlm_prune.vlm.common.timing import peak_bytes


def log_throughput(rows: list[StoredAnswer], pruner: Any, device: torch.device) -> None:
    """Logs tokens per second, image tokens in three ways, times by phase and memory.

    Args:
        rows: of questions answered now, not those read from a cache.
        pruner: what pruned them; None for the unpruned model.
        device: whose peak memory is logged.
    """
    if not rows:
        return
    seconds = sum(sum(row.time_ms.values()) for row in rows) / 1e3
    tokens = sum(row.output_tokens for row in rows)
    extra: dict[str, float] = {
        f"{phase}_ms": float(np.mean([row.time_ms[phase] for row in rows]))
        for phase in rows[0].time_ms
    }
    if "prefill" in rows[0].time_ms:
        extra["first_token_ms"] = sum(
            extra[f"{phase}_ms"] for phase in ("vision", "selection", "prefill")
        )
        extra["tower_share"] = extra["vision_ms"] / extra["first_token_ms"]
    extra["text_tokens"] = float(np.mean([row.text_tokens for row in rows]))
    extra |= image_tokens([row for row in rows if row.images], pruner)
    extra |= {"peak_memory_mb": peak_bytes(device) / 2**20, "total_requests": len(rows)}
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, extra)


def image_tokens(rows: list[StoredAnswer], pruner: Any) -> dict[str, float]:
    """Returns means over images: of all tokens, those kept, those computed per
    layer, and the paper's count.

    The last one is left out where the paper does not count them.
    """
    if not rows:
        return {}
    whole = [np.mean(row.image_tokens) for row in rows]
    counted: dict[str, list[Any]] = {
        "visual_tokens": whole,
        "kept_visual_tokens": [row.layer_tokens[-1] for row in rows],
        "layer_visual_tokens": [np.mean(row.layer_tokens) for row in rows],
    }
    if pruner is not None:
        papers = [
            pruner.papers_count(round(full), row.layer_tokens)
            for full, row in zip(whole, rows, strict=True)
        ]
        if None not in papers:
            counted["papers_visual_tokens"] = papers
    weights = [row.images for row in rows]
    return {name: float(np.average(counts, weights=weights)) for name, counts in counted.items()}
