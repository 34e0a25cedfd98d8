"""What Wings' learners cost: FLOPs from the shape, prefill and decode times with and without them."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import msgspec
import torch

from vlm_prune.benchmarks.evaluation.environment import environment
from vlm_prune.benchmarks.evaluation.prompts import encoded
from vlm_prune.benchmarks.evaluation.records import SCHEMA_VERSION, Amount, Record
from vlm_prune.benchmarks.evaluation.timing import timed_generate
from vlm_prune.benchmarks.speed.bench import BenchConfig, random_model, random_prompt
from vlm_prune.benchmarks.speed.bench_table import shape_of
from vlm_prune.benchmarks.speed.roofline import Timing, kept_memory
from vlm_prune.benchmarks.speed.shapes import SHAPES
from vlm_prune.learners import WingsConfig, attach, detach
from vlm_prune.learners.cost import learner_flops, router_flops
from vlm_prune.learners.model import wings_layers
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.cost import prefill_flops

TOKENS, IMAGE = 1000, 729
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class WingsBenchConfig(BenchConfig):
    """What is measured, and the `rank` and `stride` of the learners."""

    rank: int = 8
    stride: int = 1


class ExtraFlops(Record, frozen=True):
    """Shares of the prefill's FLOPs that each part of the learners adds."""

    learners: Amount
    router: Amount
    router_on_gpu: Amount = msgspec.field(name="router on a GPU")


class AnswerTimings(Record, frozen=True):
    """Times of a prefill and of a decoded token."""

    prefill: Timing
    decode: Timing


class WingsTimings(Record, frozen=True):
    """The same of the model as it is and of the model with learners."""

    plain: AnswerTimings
    wings: AnswerTimings


class Overhead(Record, frozen=True):
    """What learners add, as shares of the medians without them."""

    prefill: float
    decode: float


class WingsResults(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`bench.json` of `bench --wings`.

    Args:
        config: what was measured.
        environment: device, driver, versions and command.
        extra_flops: by shape.
        times_ms: in milliseconds.
        overhead: of the medians.
    """

    config: WingsBenchConfig
    environment: dict[str, str]
    extra_flops: dict[str, ExtraFlops]
    times_ms: WingsTimings
    overhead: Overhead


def extra_flops(shape: str, config: WingsConfig) -> ExtraFlops:
    """Returns the share of the prefill's FLOPs at 1,000 tokens, 729 of them of
    an image, that each part adds.
    """
    text = SHAPES[shape]().get_text_config()
    layers = [float(IMAGE)] * text.num_hidden_layers
    counted = TOKENS - IMAGE, layers
    whole = prefill_flops(text, *counted)
    return ExtraFlops(
        learners=learner_flops(text, config, *counted) / whole,
        router=router_flops(text, config, *counted, fused=True) / whole,
        router_on_gpu=router_flops(text, config, *counted, fused=False) / whole,
    )


def shape_with_tokens(shape: str) -> Any:
    """Returns the configuration of a LLaVA-1.5 shape whose images have 729 tokens.

    Raises:
        InputError: for another architecture.
    """
    architecture = SHAPES[shape]()
    if architecture.model_type != "llava":
        raise InputError(f"learners are timed on shapes of LLaVA-1.5, not {shape}")
    vision = architecture.vision_config
    vision.image_size = round(IMAGE**0.5) * vision.patch_size
    architecture.image_seq_length = IMAGE
    return architecture


@torch.inference_mode()
def bench_wings(config: BenchConfig, rank: int, stride: int = 1) -> WingsResults:
    """Times a model with and without learners in turn, after one warm-up each.

    The prompt has 1,000 tokens, 729 of them of one image; images are encoded beforehand. Weights
    are random, those of learners too. Times are milliseconds per call, `decode` per token.

    Args:
        config: what is measured.
        rank: of the learners.
        stride: of the layers that have some.
    """
    wings = WingsConfig(rank, stride=stride)
    flops = {
        name: extra_flops(name, wings) for name in dict.fromkeys((config.shape, "llava-1.5-7b"))
    }
    model = random_model(config, shape_with_tokens(config.shape))
    config = WingsBenchConfig(
        **vars(replace(config, text=TOKENS - IMAGE)), rank=rank, stride=stride
    )
    prompts = encoded(model, random_prompt(config, model), [1] * config.batch)
    samples: dict[str, list[dict[str, float]]] = {"plain": [], "wings": []}
    turns = product(range(config.repeats + 1), samples.items())
    with kept_memory():
        for _, (name, rows) in turns:
            if name == "wings":
                attach(model, wings)
                for layer in wings_layers(model).values():
                    for parameter in layer.parameters():
                        parameter.normal_(0, 0.02)
            _, phases, _ = timed_generate(
                model, prompts,
                max_new_tokens=config.new_tokens, min_new_tokens=config.new_tokens,
            )  # fmt: skip
            if name == "wings":
                detach(model)
            decode = phases.decode / max(1, config.new_tokens - 1)
            rows.append({"prefill": 1e3 * phases.prefill, "decode": 1e3 * decode})
    times = {
        name: AnswerTimings(**{p: Timing.of([row[p] for row in rows[1:]]) for p in PHASES})
        for name, rows in samples.items()
    }
    plain, ours = times["plain"], times["wings"]
    return WingsResults(
        config=config,
        environment=environment(model.device),
        extra_flops=flops,
        times_ms=WingsTimings(plain=plain, wings=ours),
        overhead=Overhead(
            prefill=ours.prefill.median / plain.prefill.median - 1,
            decode=ours.decode.median / plain.decode.median - 1,
        ),
    )


def wings_rows(results: WingsResults) -> list[list[str]]:
    """Returns header and one row per phase: median [quartiles] without and with learners, in ms."""
    lines = [["phase", "plain ms", "Wings ms", "overhead %"]]
    for phase in PHASES:
        times = (
            str(getattr(run, phase)) for run in (results.times_ms.plain, results.times_ms.wings)
        )
        label = "decode per token" if phase == "decode" else phase
        lines.append([label, *times, f"{100 * getattr(results.overhead, phase):.1f}"])
    return lines


def _layers_in_words(stride: int) -> str:
    return "every layer" if stride == 1 else f"one of {stride} layers"


def about_wings(results: WingsResults) -> list[str]:
    """Returns lines that say what was measured, and the computed FLOPs."""
    config = results.config
    machine = ", ".join(f"{key} {value}" for key, value in results.environment.items())
    return [
        (
            f"{shape_of(config)}, batch {config.batch}, {config.dtype}: learners of rank "
            f"{config.rank} in {_layers_in_words(config.stride)}, a prompt of {TOKENS} tokens, {IMAGE} of an image"
        ),
        machine,
        *(
            f"computed for {name}, {IMAGE} of {TOKENS} tokens of an image: learners "
            f"+{100 * share.learners:.1f} %, reading the router +{100 * share.router:.1f} % "
            f"(on a GPU +{100 * share.router_on_gpu:.1f} %)"
            for name, share in results.extra_flops.items()
        ),
    ]
