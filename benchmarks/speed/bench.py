"""Phase times of a pruned and the unpruned model on random weights, next to the roofline."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import DeviceType, ProfilerActivity, profile
from transformers import AutoModelForImageTextToText

from vlm_prune.benchmarks.evaluation.environment import environment
from vlm_prune.benchmarks.evaluation.prompts import Prompts, encoded
from vlm_prune.benchmarks.evaluation.records import Variant
from vlm_prune.benchmarks.evaluation.timing import timed_generate
from vlm_prune.benchmarks.speed.pictures import random_pictures, random_videos
from vlm_prune.benchmarks.speed.roofline import Ceilings, Timing, kept_memory, measured_ceilings
from vlm_prune.benchmarks.speed.selection_memory import selection_memory
from vlm_prune.benchmarks.speed.shapes import SHAPES
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.common.timing import now, peak_bytes
from vlm_prune.vlm.cost import key_value_bytes, prefill_flops
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.trace import SELECTION, VISION

DTYPES = ("float32", "bfloat16", "float16")
PHASES = ("vision", "selection", "prefill", "decode")


@dataclass(frozen=True)
class BenchConfig:
    """What is measured: one image, or a video of `video_frames`, and `text` other tokens per prompt,
    `new_tokens` answered.

    With `layers` the decoder has so many only, and with `tower_layers` the tower; ratios per layer
    stay those of the whole shape.
    """

    shape: str
    variant: Variant
    batch: int = 1
    text: int = 60
    new_tokens: int = 16
    repeats: int = 10
    device: str = "cpu"
    dtype: str = "float32"
    layers: int | None = None
    seed: int = 0
    video_frames: int = 0
    tower_layers: int | None = None


def random_model(config: BenchConfig, architecture: Any = None) -> Any:
    """Makes a Hugging Face model with random weights, on the device
    itself; by default the shape's.
    """
    architecture = architecture or SHAPES[config.shape]()
    if config.layers is not None:
        shorten(architecture.get_text_config(), config.layers, config.shape)
    if config.tower_layers is not None:
        shorten_tower(architecture.vision_config, config.tower_layers, config.shape)
    if config.dtype not in DTYPES:
        raise InputError(unknown("dtype", config.dtype, DTYPES))
    dtype = getattr(torch, config.dtype)
    try:
        with torch.device(config.device):
            torch.manual_seed(config.seed)
            return AutoModelForImageTextToText.from_config(architecture, dtype=dtype).eval()
    except (RuntimeError, AssertionError) as error:
        what = f"cannot build {config.shape} on {config.device}"
        raise InputError(f"{what}: {first_line(error)}") from error


def shorten(text: Any, layers: int, shape: str) -> None:
    """Leaves a language model's configuration its first decoder layers.

    Args:
        text: the language model's configuration.
        layers: how many stay.
        shape: name of the architecture, for the message.

    Raises:
        InputError: when it has fewer.
    """
    if not 1 <= layers <= text.num_hidden_layers:
        most = text.num_hidden_layers
        raise InputError(f"{shape} has no {layers} decoder layers; give 1 to {most}")
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = kinds[:layers]


def shorten_tower(vision: Any, layers: int, shape: str) -> None:
    """Leaves a vision tower's configuration so many layers; the last
    one attends to the whole image.

    Args:
        vision: the tower's configuration.
        layers: how many stay.
        shape: name of the architecture, for the message.

    Raises:
        InputError: when it has fewer.
    """
    name = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
    most = getattr(vision, name)
    if not 1 <= layers <= most:
        raise InputError(f"{shape} has no {layers} tower layers; give 1 to {most}")
    setattr(vision, name, layers)
    if getattr(vision, "fullatt_block_indexes", None):
        vision.fullatt_block_indexes = [layers - 1]
    if getattr(vision, "deepstack_visual_indexes", None):
        vision.deepstack_visual_indexes = [
            index for index in vision.deepstack_visual_indexes if index < layers
        ]


def random_text(config: BenchConfig, length: int, model: Any) -> Prompts:
    """Returns prompts of random text tokens.

    Args:
        config: of the benchmark.
        length: tokens of each prompt.
        model: whose vocabulary is drawn from.
    """
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(12, 200, (config.batch, length), generator=generator).to(model.device)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Prompts(tensors, None, None, [0] * config.batch, 0.0)


def random_prompt(config: BenchConfig, model: Any) -> dict[str, Tensor]:
    """Makes a prompt: placeholders of one image or video between random
    text tokens, and random pixels.

    Markers of an image's tiles and of a video's frames count as text, as far as there is so much.
    """
    generator, family = torch.Generator().manual_seed(config.seed), family_of(model)
    if config.video_frames:
        inputs = random_videos(model, config.video_frames, config.batch, generator)
    else:
        inputs = random_pictures(model, config.batch, generator)
    image = inputs["input_ids"]
    placeholder = family.placeholder("video" if config.video_frames else "image")
    markers = min(config.text - 2, int((image[0] != placeholder).sum()))
    text = torch.randint(12, 200, (config.batch, config.text - markers), generator=generator)
    before, after = text.to(model.device).split(
        [config.text // 3, len(text[0]) - config.text // 3], 1
    )
    ids = torch.cat([before, image, after], 1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def bench(config: BenchConfig, variants: list[Variant]) -> list[dict[str, Any]]:
    """Measures methods one after the other on one model, whose weights are made once."""
    pruners = [variant.build(config.seed) for variant in variants]
    model = random_model(config)
    for pruner in pruners:
        pruner.admit(model)
    side = 8192 if model.device.type == "cuda" else 512
    ceilings = measured_ceilings(model.device, model.dtype, side)
    video = None
    with kept_memory():
        if config.video_frames:
            # encoded once for all methods, none of which changes it
            prompts = encoded(model, random_prompt(config, model), [1] * config.batch)
            video = Video(prompts)
        return [
            _measured(replace(config, variant=variant), pruner, model, ceilings, video)
            for variant, pruner in zip(variants, pruners, strict=True)
        ]


@dataclass
class Video:
    """A video that all methods see, and how long the unpruned model took for it, once measured."""

    prompts: Prompts
    unpruned: list[dict[str, float]] = field(default_factory=list)


def _measured(
    config: BenchConfig, pruner: Any, model: Any, ceilings: Ceilings, video: Video | None = None
) -> dict[str, Any]:
    """Runs unpruned and pruned in turn, after one warm-up each; returns what is reported.

    The unpruned model sees a video for the first method alone.

    Times are milliseconds per call for the whole batch, `decode` per generated token. Vision is
    timed with the same tower call for both, unless the method changes the images. `as_short_ms` is
    the unpruned prefill of a text with as many tokens as layers compute on average: what the model
    and the device give at best.

    Args:
        config: sizes.
        pruner: of the pruned runs.
        model: with random weights.
        ceilings: of the machine.
        video: encoded beforehand, with the unpruned times once they are known; None for images.
    """
    inputs, images = {} if video else random_prompt(config, model), [1] * config.batch
    samples: dict[str, list[dict[str, float]]] = {"unpruned": [], "pruned": []}
    if video:
        samples["unpruned"] = video.unpruned
    known = bool(samples["unpruned"])
    layer_tokens, peak, short_text_ms = {}, {}, []
    for _ in range(config.repeats + 1):
        for name, method in (("unpruned", None), ("pruned", pruner)):
            prompts = video.prompts if video else encoded(model, inputs, images)
            if known and method is None:
                layer_tokens[name] = [float(prompts.vision.counts[0])] * len(  # type: ignore[union-attr]
                    family_of(model).decoder.layers
                )
                peak[name] = peak_bytes(model.device)
                continue
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            _, phases, trace = timed_generate(
                model, prompts, method,
                max_new_tokens=config.new_tokens, min_new_tokens=config.new_tokens,
            )  # fmt: skip
            times = asdict(phases) | {"vision": phases.vision or prompts.vision_s}
            times["decode"] /= max(1, config.new_tokens - 1)
            samples[name].append({phase: 1e3 * times[phase] for phase in PHASES})
            layer_tokens[name], peak[name] = trace.layer_tokens, peak_bytes(model.device)
        text = random_text(config, config.text + round(mean(layer_tokens["pruned"])), model)
        _, phases, _ = timed_generate(model, text, max_new_tokens=1, min_new_tokens=1)
        short_text_ms.append(1e3 * phases.prefill)
    busy = {}
    if model.device.type == "cuda":
        for name, method in (("unpruned", None), ("pruned", pruner)):
            busy[name] = busy_ms(
                lambda method=method: timed_generate(  # type: ignore[misc]
                    model, prompts, method, max_new_tokens=1, min_new_tokens=1
                )
            )
    assert prompts.vision is not None
    tokens, tower = prompts.vision.counts[0], prompts.vision.flops[0]
    runs = {
        name: {
            "times_ms": {p: asdict(Timing.of([row[p] for row in rows[1:]])) for p in PHASES},
            "floors_ms": floors(model, config, layer_tokens[name], tower, ceilings),
            "tokens": pruner.counts(tokens, layer_tokens[name]),
            "prefill_flops": prefill_flops(
                model.config.get_text_config(), config.text, layer_tokens[name]
            ),
            "peak_memory_bytes": peak[name],
            "busy_ms": busy.get(name),
        }
        for name, rows in samples.items()
    }
    least = Timing.of(short_text_ms[1:])
    return {
        "config": asdict(config),
        "environment": environment(model.device),
        "ceilings": asdict(ceilings),
        "as_short_ms": asdict(least),
        "method": config.variant.method,
        "definition": pruner.definition(tokens),
        "selection_memory": selection_memory(pruner, prompts.vision) if video else None,
        **runs,
        "speedup": speedup(runs, least.median)
        | whole_speedup(runs, config, head_ms(model, config.repeats)),
    }


def head_ms(model: Any, repeats: int) -> float:
    """Returns the median milliseconds that the logits of one token take."""
    config = model.config.get_text_config()
    hidden = torch.zeros(1, 1, config.hidden_size, dtype=model.dtype, device=model.device)
    times = []
    for _ in range(repeats + 1):
        start = now(model.device)
        model.lm_head(hidden)
        times.append(1e3 * (now(model.device) - start))
    return median(times[1:])


def whole_speedup(runs: dict[str, Any], config: BenchConfig, head: float) -> dict[str, float]:
    """Returns what selection costs where all decoder layers of the shape run,
    each as long as those that did.

    It is given as shares of the unpruned and of the pruned prefill, and as how much of the promised
    speed-up of the prefill is left with it.

    Args:
        runs: unpruned and pruned.
        config: of the benchmark.
        head: milliseconds that the logits take, whatever the number of layers.
    """
    whole = SHAPES[config.shape]().get_text_config().num_hidden_layers
    times = {name: run["times_ms"] for name, run in runs.items()}
    depth = whole / (config.layers or whole)
    unpruned, pruned = (
        head + depth * max(0.0, times[name]["prefill"]["median"] - head)
        for name in ("unpruned", "pruned")
    )
    selection = times["pruned"]["selection"]["median"]
    promised = runs["unpruned"]["prefill_flops"] / runs["pruned"]["prefill_flops"]
    return {
        "whole_selection_share": selection / unpruned,
        "whole_selection_of_pruned": selection / pruned,
        "whole_of_promise": unpruned / (pruned + selection) / promised,
    }


def busy_ms(call: Callable[[], object]) -> dict[str, float]:
    """Returns milliseconds for which a GPU computes: in all, and during selection.

    What is left of a call's time is spent launching, by Python and PyTorch.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    events = profiler.events() or []
    selections = [
        event.time_range
        for event in events
        if event.name == SELECTION and event.device_type == DeviceType.CPU
    ]
    spent = [
        (event.time_range.start, event.time_range.elapsed_us() / 1e3)
        for event in events
        if event.device_type == DeviceType.CUDA and event.name not in (SELECTION, VISION)
    ]
    # the device is idle where a selection starts and ends
    return {
        "all": sum(ms for _, ms in spent),
        "selection": sum(
            ms for start, ms in spent if any(r.start <= start <= r.end for r in selections)
        ),
    }


def floors(
    model: Any, config: BenchConfig, layer_tokens: list[float], tower: float, ceilings: Ceilings
) -> dict[str, float]:
    """Returns the least milliseconds of each phase: every matrix product and every weight once.

    Of a mixture of experts these are the weights of those that a token is sent to.
    Selection counts as nothing: it is overhead, whatever the method.

    Args:
        model: the model.
        config: of the benchmark.
        layer_tokens: image tokens that each layer computes.
        tower: the tower's FLOPs on one image.
        ceilings: measured speeds of the device.
    """
    family, text = family_of(model), model.config.get_text_config()
    size = model.dtype.itemsize

    def weights(parameters: Iterable[Tensor]) -> float:
        return float(sum(p.numel() * p.itemsize for p in parameters))

    # the tokens of a prompt may all be sent to the same experts of a mixture
    experts = weights(p for n, p in family.decoder.layers.named_parameters() if ".experts." in n)
    unused = experts * (1 - text.num_experts_per_tok / text.num_experts) if experts else 0.0
    layers = weights(family.decoder.layers.parameters()) - unused
    language = layers + text.vocab_size * text.hidden_size * size
    cache = config.batch * key_value_bytes(text, config.text, layer_tokens, size)
    vision = config.batch * tower
    prefill = config.batch * prefill_flops(text, config.text, layer_tokens)
    token = config.batch * prefill_flops(text, 1, [0.0] * len(layer_tokens))
    return {
        "vision": ceilings.floor_ms(vision, weights(family.tower_layers.parameters())),
        "selection": 0.0,
        "prefill": ceilings.floor_ms(prefill, language + cache),
        "decode": ceilings.floor_ms(token, language + cache),
    }


def speedup(runs: dict[str, Any], short_text_ms: float) -> dict[str, float]:
    """Returns unpruned over pruned medians: prefill with selection, to the first token, and decode.

    `prefill_alone` leaves selection out and `promised` is the ratio of the prefills' FLOPs, so that
    their quotient says how much of the promise the device keeps; `roofline` is the ratio of the
    prefills' floors, which is less where weights take longer to read than to multiply with;
    `as_short` is that of the unpruned prefill to one of a text as short.
    `selection_share` is selection as a share of the unpruned prefill. On a GPU the `busy` ones say
    the same of the time for which it computes, without that of launching.
    """

    def total(name: str, *phases: str) -> float:
        return float(sum(runs[name]["times_ms"][phase]["median"] for phase in phases))

    busy = {}
    if runs["pruned"]["busy_ms"]:
        whole, pruned = runs["unpruned"]["busy_ms"]["all"], runs["pruned"]["busy_ms"]
        busy = {
            "busy_prefill": whole / pruned["all"],
            "busy_prefill_alone": whole / (pruned["all"] - pruned["selection"]),
            "busy_selection_share": pruned["selection"] / whole,
        }
    return busy | {
        "prefill": total("unpruned", "prefill") / total("pruned", "selection", "prefill"),
        "first_token": total("unpruned", "vision", "prefill")
        / total("pruned", "vision", "selection", "prefill"),
        "decode": total("unpruned", "decode") / total("pruned", "decode"),
        "prefill_alone": total("unpruned", "prefill") / total("pruned", "prefill"),
        "as_short": total("unpruned", "prefill") / short_text_ms,
        "promised": runs["unpruned"]["prefill_flops"] / runs["pruned"]["prefill_flops"],
        "roofline": runs["unpruned"]["floors_ms"]["prefill"]
        / runs["pruned"]["floors_ms"]["prefill"],
        "selection_share": total("pruned", "selection") / total("unpruned", "prefill"),
    }
