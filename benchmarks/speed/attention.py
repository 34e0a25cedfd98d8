"""Times of sparse attention beside dense SDPA, alone and in whole decoder layers, on random weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_prune.benchmarks.evaluation.environment import environment
from vlm_prune.benchmarks.evaluation.prompts import encoded
from vlm_prune.benchmarks.evaluation.records import (
    SCHEMA_VERSION,
    Amount,
    Argument,
    Count,
    Record,
    Variant,
)
from vlm_prune.benchmarks.speed.bench import BenchConfig, random_model
from vlm_prune.benchmarks.speed.pictures import random_pictures
from vlm_prune.benchmarks.speed.roofline import Timing, kept_memory
from vlm_prune.benchmarks.speed.shapes import SHAPES
from vlm_prune.pruning.attention import BlockAttention, build_attention
from vlm_prune.pruning.attention.blocks import body_length
from vlm_prune.pruning.attention.engine import prompt_of
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.timing import now
from vlm_prune.vlm.cost import prefill_flops
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.sparse_attention import AttentionCall


@dataclass(frozen=True)
class SparseBenchConfig:
    """What is measured: one prompt of each length, the layers' attention by each method in turn.

    Args:
        shape: name of the architecture.
        methods: of sparse attention.
        tokens: lengths of the prompts.
        density: share of the products that each method computes.
        arguments: other hyperparameters of all methods.
        layers: of the decoder; all of them unless given.
        repeats: measured calls of each.
        device: a torch device.
        dtype: of weights and states.
        seed: of random draws.
    """

    shape: str
    methods: tuple[str, ...]
    tokens: tuple[int, ...]
    density: float = 0.2
    arguments: dict[str, Argument] = field(default_factory=dict)
    layers: int | None = None
    repeats: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def built(self) -> list[BlockAttention]:
        """Builds the methods of sparse attention that are timed.

        Raises:
            InputError: if there is no such method or hyperparameter, or it computes no prefill.
        """
        more: dict[str, Argument] = {"density": self.density, "minimum": 1, **self.arguments}
        found = []
        for name in self.methods:
            method = build_attention(name, **more)
            if not isinstance(method, BlockAttention):
                raise InputError(
                    f"{name} chooses no blocks of a prefill, which --attention times; give pooled"
                )
            found.append(method)
        return found


class AttentionTimes(Record, frozen=True):
    """Times of one layer: of its attention, for a sparse one with the estimate, and of all of it."""

    attention_ms: Timing
    layer_ms: Timing


class AttentionSpeedup(Record, frozen=True):
    """Dense over sparse medians.

    Args:
        attention: of a layer's attention.
        layer: of a decoder layer.
        first_token: with the vision tower, one image for each so many tokens, and all of the shape's
            layers.
        promised: ratio of the prefills' FLOPs.
    """

    attention: Amount
    layer: Amount
    first_token: Amount
    promised: Amount


class SparseTimes(AttentionTimes, frozen=True):
    """What was measured of a method.

    Args:
        estimate_ms: of the estimate alone.
        density: share of the causal half that is computed, with the estimate.
        chosen_density: the part of it that is chosen.
        speedup: over dense attention.
    """

    estimate_ms: Timing
    density: Amount
    chosen_density: Amount
    speedup: AttentionSpeedup


class LengthResults(Record, frozen=True):
    """What was measured on prompts of one length.

    Args:
        tokens: the length.
        dense: of SDPA.
        first_token_attention_share: attention's share of the time to the first token, unpruned.
        methods: by name.
    """

    tokens: Count
    dense: AttentionTimes
    first_token_attention_share: Amount
    methods: dict[str, SparseTimes]


class AttentionResults(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`bench.json` of `bench --attention`.

    Args:
        config: what was measured.
        environment: device, driver, versions and command.
        vision_ms_per_token: of the tower and the projector.
        lengths: in the order of the configuration.
        crossover: from which measured length on each method is faster than SDPA.
    """

    config: SparseBenchConfig
    environment: dict[str, str]
    vision_ms_per_token: Amount
    lengths: list[LengthResults]
    crossover: dict[str, int | None]


@torch.inference_mode()
def bench_attention(config: SparseBenchConfig) -> AttentionResults:
    """Times dense and sparse attention in turn at each length, after one warm-up at the first one.

    Times are a `clock`'s. Queries and keys are random: a `density` is the same for all of them, while
    the authors' own rules find other shares in them than in real ones.

    Raises:
        InputError: if a method or the model cannot be measured.
    """
    methods = config.built()
    model = random_model(
        BenchConfig(
            config.shape, Variant("none", 1.0), device=config.device, dtype=config.dtype,
            layers=config.layers, seed=config.seed,
        )
    )  # fmt: skip
    for method in methods:
        method.admit(model)
    text = SHAPES[config.shape]().get_text_config()
    with kept_memory():
        vision = vision_ms(model, config)
        lengths = [
            at_length(model, config, methods, tokens, text, vision, warm=number > 0)
            for number, tokens in enumerate(config.tokens)
        ]
    return AttentionResults(
        config=config,
        environment=environment(model.device),
        vision_ms_per_token=vision,
        lengths=lengths,
        crossover=crossovers(lengths),
    )


def clock(device: torch.device) -> float:
    """Returns seconds after everything queued on the device has finished.

    On a CPU with one thread they are the processor's, which other processes do not stretch.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return now(device)


def vision_ms(model: Any, config: SparseBenchConfig) -> float:
    """Returns how long tower and projector take for each token of an image."""
    draw = torch.Generator().manual_seed(config.seed)
    inputs = random_pictures(model, 1, draw)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for _ in range(2):
        start = clock(model.device)
        prompts = encoded(model, inputs, [1])
        spent = clock(model.device) - start
    assert prompts.vision is not None
    return 1e3 * spent / prompts.vision.counts[0]


def at_length(
    model: Any,
    config: SparseBenchConfig,
    methods: list[BlockAttention],
    tokens: int,
    text: Any,
    vision: float,
    warm: bool = False,
) -> LengthResults:
    """Returns the times of all methods and of dense attention on one length.

    Args:
        model: with so many decoder layers as are timed.
        config: of the benchmark.
        methods: of sparse attention.
        tokens: of the prompt.
        text: the whole shape's text configuration.
        vision: milliseconds of the tower for each token.
        warm: whether all of it has run before, so that the first round counts.
    """
    decoder, device = family_of(model).decoder, model.device
    draw = torch.Generator().manual_seed(config.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, model.dtype)

    # one call's queries, keys and values, in the shape's heads
    attention = decoder.layers[-1].self_attn
    width, shared = attention.head_dim, attention.num_key_value_groups
    keys = text.num_key_value_heads
    query, key, value = (random(1, count, tokens, width) for count in (keys * shared, keys, keys))
    hidden_states, rotary = random(1, tokens, text.hidden_size), None
    if any(method.reads_rotation for method in methods):
        rotary = decoder.rotary_emb(hidden_states, torch.arange(tokens, device=device)[None])
    call = AttentionCall(query, key, value, None, attention.scaling, 0, (0,), rotary, None)
    layers = len(decoder.layers)

    def dense() -> None:
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared > 1)

    def whole() -> None:
        decoder(inputs_embeds=hidden_states, use_cache=False)

    def timed(run: Callable[[], object]) -> float:
        start = clock(device)
        run()
        return 1e3 * (clock(device) - start)

    runs = [method.run() for method in methods]
    samples: list[list[dict[str, float]]] = [[] for _ in range(len(methods) + 1)]
    for repeat in range(int(warm), config.repeats + 1):
        rows = [{"attention": timed(dense), "layer": timed(whole) / layers}]
        for method, run in zip(methods, runs, strict=True):
            length = body_length(tokens, method.tail, method.block)
            prompt, _ = prompt_of(call, 0)
            turns = None if prompt.rotary is None else prompt.rotary[:, :length]
            inputs = AttentionInputs(
                query[0, :, :length], key[0, :, :length], attention.scaling, 0, tokens, turns
            )
            row = {
                "attention": timed(lambda run=run: run.prefill(call)),  # type: ignore[misc]
                "estimate": timed(
                    lambda method=method, inputs=inputs: method.select(inputs)  # type: ignore[misc]
                ),
            }
            with method(model):
                row["layer"] = timed(whole) / layers
            rows.append(row)
        if repeat:
            for own, row in zip(samples, rows, strict=True):
                own.append(row)
    base, *others = [
        {f"{name}_ms": Timing.of([row[name] for row in own]) for name in own[0]} for own in samples
    ]
    dense_ms = AttentionTimes(**base)
    dense_attention, dense_layer = dense_ms.attention_ms.median, dense_ms.layer_ms.median
    tower, depth = vision * tokens, text.num_hidden_layers
    flops = prefill_flops(text, tokens, [0.0] * depth, [1.0] * depth)
    return LengthResults(
        tokens=tokens,
        dense=dense_ms,
        first_token_attention_share=depth * dense_attention / (tower + depth * dense_layer),
        methods={
            name: SparseTimes(
                **times,
                density=run.trace.density,
                chosen_density=run.trace.chosen_density,
                speedup=AttentionSpeedup(
                    attention=dense_attention / times["attention_ms"].median,
                    layer=dense_layer / times["layer_ms"].median,
                    first_token=(tower + depth * dense_layer)
                    / (tower + depth * times["layer_ms"].median),
                    promised=flops
                    / prefill_flops(text, tokens, [0.0] * depth, [run.trace.density] * depth),
                ),
            )
            for name, times, run in zip(config.methods, others, runs, strict=True)
        },
    )


def crossovers(lengths: list[LengthResults]) -> dict[str, int | None]:
    """Returns from which measured length on each method's attention is faster than SDPA's; None where it
    is not at the longest.
    """
    found: dict[str, int | None] = {}
    ordered = sorted(lengths, key=lambda length: -length.tokens)
    for name in ordered[0].methods:
        found[name] = None
        for length in ordered:
            if length.methods[name].speedup.attention < 1:
                break
            found[name] = length.tokens
    return found


def attention_rows(results: AttentionResults) -> list[list[str]]:
    """Returns header and one row for each length and method: median
    [quartiles] in ms, and speed-ups.
    """
    lines = [
        [
            "tokens", "method", "density", "of it chosen", "attention ms", "estimate ms", "speed-up",
            "layer ms", "speed-up", "promised", "first token",
        ]
    ]  # fmt: skip
    for length in results.lengths:
        tokens, base = f"{length.tokens:,}", length.dense
        lines.append(
            [tokens, "SDPA", "1.000", "", shown(base.attention_ms), "", "", shown(base.layer_ms)]
            + [""] * 3
        )
        for name, run in length.methods.items():
            speed = run.speedup
            lines.append(
                [
                    tokens, name, f"{run.density:.3f}", f"{run.chosen_density:.3f}",
                    shown(run.attention_ms), shown(run.estimate_ms), f"{speed.attention:.2f}x",
                    shown(run.layer_ms), f"{speed.layer:.2f}x", f"{speed.promised:.2f}x",
                    f"{speed.first_token:.2f}x",
                ]
            )  # fmt: skip
    return lines


def shown(timing: Timing) -> str:
    """Returns a median with its quartiles, in whole milliseconds."""
    return f"{timing.median:,.0f} [{timing.low:,.0f}, {timing.high:,.0f}]"


def about_attention(results: AttentionResults) -> list[str]:
    """Returns lines that say what was measured, and from where on it pays."""
    config = results.config
    machine = ", ".join(f"{key} {value}" for key, value in results.environment.items())
    crossed = [
        f"{name} from {tokens:,} tokens on" if tokens else f"{name} at none of these lengths"
        for name, tokens in results.crossover.items()
    ]
    shares = [
        f"{100 * length.first_token_attention_share:.0f} % at {length.tokens:,}"
        for length in results.lengths
    ]
    return [
        (
            f"{config.shape}, {config.layers or 'all'} decoder layers, {config.dtype}: one "
            f"prompt, {config.density} of the causal half, estimates included, medians of "
            f"{config.repeats} calls with quartiles"
        ),
        machine,
        f"attention is faster than SDPA: {'; '.join(crossed)}",
        (
            f"attention's share of the time to the first token, with "
            f"{results.vision_ms_per_token:.2f} ms of the tower for each token: {', '.join(shares)}"
        ),
    ]
