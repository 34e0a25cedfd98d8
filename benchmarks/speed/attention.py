"""Times of sparse attention beside dense SDPA, alone and in whole decoder layers, on random weights."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

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
from vlm_prune.pruning.attention import (
    ATTENTION,
    BlockAttention,
    HeadCalibration,
    Recycled,
    Seer,
    SparseAttention,
    SparseTrace,
    build_attention,
)
from vlm_prune.pruning.attention.base import AttentionRun
from vlm_prune.pruning.attention.blocks import body_length
from vlm_prune.pruning.attention.engine import prompt_of
from vlm_prune.pruning.attention.inputs import AttentionInputs
from vlm_prune.pruning.attention.seer import GateExample, starting_maps
from vlm_prune.vlm.cache import NAMES
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.timing import now
from vlm_prune.vlm.cost import prefill_flops
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.sparse_attention import AttentionCall, replaced_attention


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

    def built(self) -> dict[str, SparseAttention]:
        """Builds the methods of sparse attention that are timed, by name.

        Raises:
            InputError: if there is no such method or hyperparameter, it is named twice, or it computes
                all of a prefill and of decoding steps.
        """
        more: dict[str, Argument] = {"density": self.density, "minimum": 1, **self.arguments}
        found: dict[str, SparseAttention] = {}
        known = {name: {own.name for own in fields(ATTENTION[name])} for name in self.methods}
        shared = set[str]().union(*known.values())
        for name in self.methods:
            if name in found:
                raise InputError(f"a method of sparse attention is named twice: {name}")
            # what only other methods have is theirs
            own = {key: value for key, value in more.items() if key not in shared - known[name]}
            if not issubclass(ATTENTION[name], BlockAttention | Recycled):
                raise InputError(
                    f"{name} leaves nothing out of a prefill or a decoding step, which --attention times; "
                    "give pooled"
                )
            found[name] = build_attention(name, **own)
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


class StepTimes(AttentionTimes, frozen=True):
    """What was measured of a method in decoding: the mean of steps, from one full step to the next.

    Args:
        density: share of the keys that a step reads, full steps included.
        attention_speedup: dense over sparse medians of a layer's attention.
        layer_speedup: of a decoder layer.
    """

    density: Amount
    attention_speedup: Amount
    layer_speedup: Amount


class LengthResults(Record, frozen=True):
    """What was measured on prompts of one length.

    Args:
        tokens: the length.
        dense: of SDPA.
        first_token_attention_share: attention's share of the time to the first token, unpruned.
        methods: by name, those of a prefill.
        dense_step: of SDPA at a decoding step behind such a prompt; None where no method was timed there.
        steps: methods of decoding, by name.
    """

    tokens: Count
    dense: AttentionTimes
    first_token_attention_share: Amount
    methods: dict[str, SparseTimes]
    dense_step: AttentionTimes | None = None
    steps: dict[str, StepTimes] = msgspec.field(default_factory=dict)


class AttentionResults(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`bench.json` of `bench --attention`.

    Args:
        config: what was measured.
        environment: device, driver, versions and command.
        vision_ms_per_token: of the tower and the projector.
        image_tokens: of one image, as which methods that read images see the prompt.
        lengths: in the order of the configuration.
        crossover: from which measured length on each method is faster than SDPA.
    """

    config: SparseBenchConfig
    environment: dict[str, str]
    vision_ms_per_token: Amount
    lengths: list[LengthResults]
    crossover: dict[str, int | None]
    image_tokens: Count = 0


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
    text = SHAPES[config.shape]().get_text_config()
    with TemporaryDirectory(prefix="vlm-prune-") as folder, kept_memory():
        for method in methods.values():
            if isinstance(method, Seer) and not method.calibration:
                method.calibration = untrained_gates(model, method, Path(folder))
            method.admit(model)
        vision, tokens_per_image = vision_ms(model, config)
        lengths = [
            at_length(
                model, config, methods, tokens, text, vision, tokens_per_image, warm=number > 0
            )
            for number, tokens in enumerate(config.tokens)
        ]
    return AttentionResults(
        config=config,
        environment=environment(model.device),
        vision_ms_per_token=vision,
        lengths=lengths,
        crossover=crossovers(lengths),
        image_tokens=tokens_per_image,
    )


def untrained_gates(model: Any, method: Seer, folder: Path) -> str:
    """Returns a file of gates as they are before training, which take as long as trained ones.

    Args:
        model: that they are for.
        method: whose blocks they are for.
        folder: to write the file into.
    """
    tensors = {}
    for number, layer in enumerate(family_of(model).decoder.layers):
        width, groups = layer.self_attn.head_dim, layer.self_attn.config.num_key_value_heads
        empty = torch.zeros(groups, 1, width)
        maps = starting_maps(GateExample(empty, empty, None))
        for what, part in zip(("query", "key"), maps, strict=True):
            tensors[f"layers.{number}.{what}"] = part
    path = folder / "gates.safetensors"
    HeadCalibration.of("seer", tensors, model, block=method.block).save(path)
    return str(path)


@dataclass
class ToldRun:
    """A run that is told what a whole model's forward would, where a decoder runs alone.

    Args:
        run: what computes attention.
        frames: the image of each token, (n,), of each row.
        cache: keys and values of all layers.
    """

    run: AttentionRun
    frames: Sequence[Tensor] | None = None
    cache: Any = None
    reads_frames: bool = False

    @property
    def reads_rotation(self) -> bool:
        """Returns whether the run reads the cosines and sines of positions."""
        return self.run.reads_rotation

    @property
    def trace(self) -> SparseTrace:
        """Returns what has been computed so far."""
        return self.run.trace

    def prefill(self, call: AttentionCall) -> Tensor | None:
        """Returns the run's attention of a prompt."""
        return self.run.prefill(replace(call, frames=self.frames, cache=self.cache))

    def decode(self, call: AttentionCall) -> Tensor | None:
        """Returns the run's attention of one new token."""
        return self.run.decode(replace(call, cache=self.cache))

    def left_dense(self, reason: str) -> None:
        """Notes that a call went to SDPA, and why."""
        self.run.left_dense(reason)


def clock(device: torch.device) -> float:
    """Returns seconds after everything queued on the device has finished.

    On a CPU with one thread they are the processor's, which other processes do not stretch.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return now(device)


def vision_ms(model: Any, config: SparseBenchConfig) -> tuple[float, int]:
    """Returns how long tower and projector take for each token of an image, and how many it has."""
    draw = torch.Generator().manual_seed(config.seed)
    inputs = random_pictures(model, 1, draw)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for _ in range(2):
        start = clock(model.device)
        prompts = encoded(model, inputs, [1])
        spent = clock(model.device) - start
    assert prompts.vision is not None
    return 1e3 * spent / prompts.vision.counts[0], prompts.vision.counts[0]


def at_length(
    model: Any,
    config: SparseBenchConfig,
    methods: dict[str, SparseAttention],
    tokens: int,
    text: Any,
    vision: float,
    tokens_per_image: int,
    warm: bool = False,
) -> LengthResults:
    """Returns the times of all methods and of dense attention on one length.

    Args:
        model: with so many decoder layers as are timed.
        config: of the benchmark.
        methods: of sparse attention, by name.
        tokens: of the prompt.
        text: the whole shape's text configuration.
        vision: milliseconds of the tower for each token.
        tokens_per_image: of one image, as which the prompt's tokens are counted.
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
    blocks = {name: own for name, own in methods.items() if isinstance(own, BlockAttention)}
    if any(method.reads_rotation for method in blocks.values()):
        rotary = decoder.rotary_emb(hidden_states, torch.arange(tokens, device=device)[None])
    # the prompt is images, one after the other
    frames = [torch.arange(tokens, device=device) // tokens_per_image]
    call = AttentionCall(query, key, value, None, attention.scaling, 0, (0,), rotary, None, frames)
    layers = len(decoder.layers)

    def dense() -> None:
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared > 1)

    def whole() -> None:
        decoder(inputs_embeds=hidden_states, use_cache=False)

    def timed(run: Callable[[], object]) -> float:
        start = clock(device)
        run()
        return 1e3 * (clock(device) - start)

    runs = {name: method.run() for name, method in blocks.items()}
    samples: list[list[dict[str, float]]] = [[] for _ in range(len(blocks) + 1)]
    for repeat in range(int(warm), config.repeats + 1):
        rows = [{"attention": timed(dense), "layer": timed(whole) / layers}]
        for name, method in blocks.items():
            length = body_length(tokens, method.tail, method.block)
            prompt, _ = prompt_of(call, 0)
            turns = None if prompt.rotary is None else prompt.rotary[:, :length]
            inputs = AttentionInputs(
                query[0, :, :length], key[0, :, :length], attention.scaling, 0, tokens, turns,
                frames=frames[0][:length],
            )  # fmt: skip
            row = {
                "attention": timed(lambda run=runs[name]: run.prefill(call)),  # type: ignore[misc]
                "estimate": timed(
                    lambda method=method, inputs=inputs: method.select(inputs)  # type: ignore[misc]
                ),
            }
            with replaced_attention(model, ToldRun(method.run(), frames)):
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
    decoding = {name: own for name, own in methods.items() if isinstance(own, Recycled)}
    dense_step, steps = None, dict[str, StepTimes]()
    if decoding:
        dense_step, steps = decoding_times(model, config, decoding, call, hidden_states)
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
            for (name, run), times in zip(runs.items(), others, strict=True)
        },
        dense_step=dense_step,
        steps=steps,
    )


class CacheStandIn:
    """Stands for a cache whose keys and values a call holds itself."""


def decoding_times(
    model: Any,
    config: SparseBenchConfig,
    methods: dict[str, Recycled],
    prompt: AttentionCall,
    hidden_states: Tensor,
) -> tuple[AttentionTimes, dict[str, StepTimes]]:
    """Returns the times of a decoding step behind a prompt, of dense attention and of each method.

    They are means over the steps from one full step to the next. The first round is not counted.

    Args:
        model: with so many decoder layers as are timed.
        config: of the benchmark.
        methods: of decoding, by name.
        prompt: queries, keys and values of its tokens.
        hidden_states: that enter the decoder, (1, n, D).
    """
    decoder, device, tokens = family_of(model).decoder, model.device, prompt.key.shape[2]
    cache_name = next(name for name in NAMES if name in signature(decoder.forward).parameters)
    count = max(method.refresh for method in methods.values())
    draw = torch.Generator().manual_seed(config.seed + 1)
    # keys and values of the prompt and of all new tokens
    key, value = (
        torch.cat([part, part[:, :, torch.randint(tokens, (count,), generator=draw).to(device)]], 2)
        for part in (prompt.key, prompt.value)
    )
    shared = prompt.query.shape[1] // key.shape[1]

    def step(number: int, cache: Any) -> AttentionCall:
        end = tokens + number + 1
        query = prompt.query[:, :, number % tokens, None]
        return replace(
            prompt, query=query, key=key[:, :, :end], value=value[:, :, :end], cache=cache,
            rotary=None, frames=None,
        )  # fmt: skip

    def attention_ms(method: Recycled | None) -> tuple[float, float]:
        cache = CacheStandIn()
        calls = [step(number, cache) for number in range(count)]
        run = None if method is None else method.run()
        if run is not None:
            run.prefill(replace(prompt, cache=cache, rotary=None, frames=None))
        start = clock(device)
        for call in calls:
            if run is None:
                scaled_dot_product_attention(
                    call.query, call.key, call.value, enable_gqa=shared > 1
                )
            else:
                run.decode(call)
        spent = 1e3 * (clock(device) - start) / count
        return spent, 1.0 if run is None else run.trace.decode_density

    def layer_ms(method: Recycled | None) -> float:
        cache = DynamicCache(config=decoder.config)
        given = {cache_name: cache}
        told = None if method is None else ToldRun(method.run(), cache=cache)
        with nullcontext() if told is None else replaced_attention(model, told):
            decoder(inputs_embeds=hidden_states, use_cache=True, **given)
            start = clock(device)
            for number in range(count):
                embeds = hidden_states[:, number % tokens, None]
                decoder(inputs_embeds=embeds, use_cache=True, **given)
            return 1e3 * (clock(device) - start) / count / len(decoder.layers)

    tried: dict[str, Recycled | None] = {"": None, **methods}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in tried}
    density = {}
    for repeat in range(config.repeats + 1):
        for name, method in tried.items():
            (spent, density[name]), layer = attention_ms(method), layer_ms(method)
            if repeat:
                samples[name].append((spent, layer))
    times = {
        name: [Timing.of(list(column)) for column in zip(*own, strict=True)]
        for name, own in samples.items()
    }
    dense, dense_layer = times[""]
    return AttentionTimes(attention_ms=dense, layer_ms=dense_layer), {
        name: StepTimes(
            attention_ms=times[name][0],
            layer_ms=times[name][1],
            density=density[name],
            attention_speedup=dense.median / times[name][0].median,
            layer_speedup=dense_layer.median / times[name][1].median,
        )
        for name in methods
    }


def crossovers(lengths: list[LengthResults]) -> dict[str, int | None]:
    """Returns from which measured length on each method's attention is faster than SDPA's; None where it
    is not at the longest.
    """
    found: dict[str, int | None] = {}
    ordered = sorted(lengths, key=lambda length: -length.tokens)
    for name in (*ordered[0].methods, *ordered[0].steps):
        found[name] = None
        for length in ordered:
            speedup = (
                length.methods[name].speedup.attention
                if name in length.methods
                else length.steps[name].attention_speedup
            )
            if speedup < 1:
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
        if length.dense_step is not None:
            step = length.dense_step
            lines.append(
                [tokens, "SDPA, a step", "1.000", "", shown(step.attention_ms, 2), "", ""]
                + [shown(step.layer_ms, 2), "", "", ""]
            )
        for name, own in length.steps.items():
            lines.append(
                [
                    tokens, f"{name}, a step", f"{own.density:.3f}", "", shown(own.attention_ms, 2),
                    "", f"{own.attention_speedup:.2f}x", shown(own.layer_ms, 2),
                    f"{own.layer_speedup:.2f}x", "", "",
                ]
            )  # fmt: skip
    return lines


def shown(timing: Timing, digits: int = 0) -> str:
    """Returns a median with its quartiles, in milliseconds."""
    return f"{timing.median:,.{digits}f} [{timing.low:,.{digits}f}, {timing.high:,.{digits}f}]"


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
