"""Times of sparse attention beside dense SDPA, alone and in whole decoder layers, on random weights."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_prune.benchmarks.evaluation.environment import environment
from vlm_prune.benchmarks.evaluation.prompts import encoded
from vlm_prune.benchmarks.evaluation.records import Argument, Variant
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
        """Builds the methods.

        Raises:
            InputError: if there is no such method or hyperparameter, or it computes no prefill.
        """
        more: dict[str, Any] = {"density": self.density, "minimum": 1, **self.arguments}
        found = []
        for name in self.methods:
            method = build_attention(name, **more)
            if not isinstance(method, BlockAttention):
                raise InputError(
                    f"{name} chooses no blocks of a prefill, which --attention times; give pooled"
                )
            found.append(method)
        return found


@torch.inference_mode()
def bench_attention(config: SparseBenchConfig) -> dict[str, Any]:
    """Times dense and sparse attention in turn at each length, after one warm-up at the first one.

    `attention_ms` is one call of a layer's attention with its estimate, `estimate_ms` the estimate
    alone, `layer_ms` a whole decoder layer. `first_token` is the speed-up with the vision tower,
    one image for each so many tokens, and all of the shape's layers. `promised` is the ratio of the
    prefills' FLOPs. Times are a `clock`'s. Queries and keys are random: a `density` is the same for
    all of them, while the authors' own rules find other shares in them than in real ones.

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
    return {
        "config": asdict(config),
        "environment": environment(model.device),
        "vision_ms_per_token": vision,
        "lengths": lengths,
        "crossover": crossovers(lengths),
    }


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
) -> dict[str, Any]:
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

    attention = decoder.layers[-1].self_attn
    width, shared = attention.head_dim, attention.num_key_value_groups
    keys = text.num_key_value_heads
    query, key, value = (random(1, count, tokens, width) for count in (keys * shared, keys, keys))
    hidden, rotary = random(1, tokens, text.hidden_size), None
    if any(method.reads_rotation for method in methods):
        rotary = decoder.rotary_emb(hidden, torch.arange(tokens, device=device)[None])
    call = AttentionCall(query, key, value, None, attention.scaling, 0, (0,), rotary, None)
    layers = len(decoder.layers)

    def dense() -> None:
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared > 1)

    def whole() -> None:
        decoder(inputs_embeds=hidden, use_cache=False)

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
    base, *others = samples
    middle = [
        {name: Timing.of([row[name] for row in own]).median for name in own[0]} for own in samples
    ]
    tower, depth = vision * tokens, text.num_hidden_layers
    flops = prefill_flops(text, tokens, [0.0] * depth, [1.0] * depth)
    return {
        "tokens": tokens,
        "dense": times_of(base),
        "first_token_attention_share": depth
        * middle[0]["attention"]
        / (tower + depth * middle[0]["layer"]),
        "methods": {
            name: {
                **times_of(own),
                "density": run.trace.density,
                "chosen_density": run.trace.chosen_density,
                "speedup": {
                    "attention": middle[0]["attention"] / times["attention"],
                    "layer": middle[0]["layer"] / times["layer"],
                    "first_token": (tower + depth * middle[0]["layer"])
                    / (tower + depth * times["layer"]),
                    "promised": flops
                    / prefill_flops(text, tokens, [0.0] * depth, [run.trace.density] * depth),
                },
            }
            for name, own, times, run in zip(config.methods, others, middle[1:], runs, strict=True)
        },
    }


def times_of(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the medians and quartiles of repeated calls, as `attention_ms` and the like."""
    return {f"{name}_ms": asdict(Timing.of([row[name] for row in rows])) for name in rows[0]}


def crossovers(lengths: list[dict[str, Any]]) -> dict[str, int | None]:
    """Returns from which measured length on each method's attention is faster than SDPA's; None where it
    is not at the longest.
    """
    found: dict[str, int | None] = {}
    ordered = sorted(lengths, key=lambda length: -length["tokens"])
    for name in ordered[0]["methods"]:
        found[name] = None
        for length in ordered:
            if length["methods"][name]["speedup"]["attention"] < 1:
                break
            found[name] = length["tokens"]
    return found


def attention_rows(results: dict[str, Any]) -> list[list[str]]:
    """Returns header and one row for each length and method: median
    [quartiles] in ms, and speed-ups.
    """
    lines = [
        [
            "tokens", "method", "density", "of it chosen", "attention ms", "estimate ms", "speed-up",
            "layer ms", "speed-up", "promised", "first token",
        ]
    ]  # fmt: skip
    for length in results["lengths"]:
        tokens, base = f"{length['tokens']:,}", length["dense"]
        lines.append(
            [tokens, "SDPA", "1.000", "", shown(base, "attention"), "", "", shown(base, "layer")]
            + [""] * 3
        )
        for name, run in length["methods"].items():
            speed = {part: f"{value:.2f}x" for part, value in run["speedup"].items()}
            lines.append(
                [
                    tokens, name, f"{run['density']:.3f}", f"{run['chosen_density']:.3f}",
                    shown(run, "attention"), shown(run, "estimate"), speed["attention"],
                    shown(run, "layer"), speed["layer"], speed["promised"], speed["first_token"],
                ]
            )  # fmt: skip
    return lines


def shown(run: dict[str, Any], part: str) -> str:
    """Returns a median with its quartiles, in whole milliseconds."""
    timing = Timing(**run[f"{part}_ms"])
    return f"{timing.median:,.0f} [{timing.low:,.0f}, {timing.high:,.0f}]"


def about_attention(results: dict[str, Any]) -> list[str]:
    """Returns lines that say what was measured, and from where on it pays."""
    config = results["config"]
    machine = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    crossed = [
        f"{name} from {tokens:,} tokens on" if tokens else f"{name} at none of these lengths"
        for name, tokens in results["crossover"].items()
    ]
    shares = [
        f"{100 * length['first_token_attention_share']:.0f} % at {length['tokens']:,}"
        for length in results["lengths"]
    ]
    return [
        (
            f"{config['shape']}, {config['layers'] or 'all'} decoder layers, {config['dtype']}: one "
            f"prompt, {config['density']} of the causal half, estimates included, medians of "
            f"{config['repeats']} calls with quartiles"
        ),
        machine,
        f"attention is faster than SDPA: {'; '.join(crossed)}",
        (
            f"attention's share of the time to the first token, with "
            f"{results['vision_ms_per_token']:.2f} ms of the tower for each token: {', '.join(shares)}"
        ),
    ]
