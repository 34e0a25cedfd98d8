"""What a server's `/metrics` says about pruning."""

from functools import cache
from typing import Any

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 576, 1024, 2048, 4096, 8192, 16384)


@cache
def _histogram() -> Any:
    from prometheus_client import Histogram

    return Histogram(
        "vlm_prune:image_tokens_kept",
        "Tokens of an image that enter the language model.",
        buckets=BUCKETS,
    )


def observe(tokens: int) -> None:
    """Counts an image, and the `tokens` that are kept of it, in vLLM's metrics."""
    _histogram().observe(tokens)
