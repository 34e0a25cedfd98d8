"""What decides the answers of `map`."""

from dataclasses import dataclass

from vlm_prune.benchmarks.evaluation.records import Variant


@dataclass(frozen=True)
class MapConfig:
    """What decides the answers; an output holds those of one configuration.

    `input` is a folder or a manifest, `max_new_tokens` the longest answer, None for the model's own
    limit; `allow_outside` lets paths and links lead out of the folder; `engine` is `hf` or `vllm`;
    `device_map`, `quantization`, `attn` and `adapter` are those of `load`, `frames` and `fps` those of
    `open_video`.
    """

    input: str
    prompt: str
    model: str
    variant: Variant
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = None
    max_new_tokens: int | None = None
    allow_outside: bool = False
    engine: str = "hf"
    device_map: str | None = None
    quantization: str | None = None
    attn: str | None = None
    adapter: str | None = None
    frames: int = 32
    fps: float | None = None
