"""Phase times of a pruned and the unpruned model on random weights, next to the roofline."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean, median
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.profiler import DeviceType, ProfilerActivity, profile
from transformers import AutoModelForImageTextToText

from vlm_prune.benchmarks.evaluation.environment import environment
from vlm_prune.benchmarks.evaluation.prompts import Prompts, encoded
from vlm_prune.benchmarks.evaluation.records import (
    SCHEMA_VERSION,
    Amount,
    Count,
    PhaseTimes,
    Record,
    TokenCounts,
    Variant,
)
from vlm_prune.benchmarks.evaluation.timing import settled, timed_generate
from vlm_prune.benchmarks.speed.pictures import random_pictures, random_videos
from vlm_prune.benchmarks.speed.roofline import Ceilings, Timing, kept_memory, measured_ceilings
from vlm_prune.benchmarks.speed.selection_memory import selection_memory
from vlm_prune.benchmarks.speed.shapes import SHAPES
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.common.timing import now, peak_bytes
from vlm_prune.vlm.compiled import compiled_prefill
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
    stay those of the whole shape. With `compile` decoder layers run prompts compiled, of both models.
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
    compile: bool = False


class PhaseTimings(Record, frozen=True):
    """Times of each phase of a call; `decode` is of one token."""

    vision: Timing
    selection: Timing
    prefill: Timing
    decode: Timing


class BusyTimes(Record, frozen=True):
    """Milliseconds for which a GPU computes: in all, and during selection."""

    all: Amount
    selection: Amount


class ModelTimes(Record, frozen=True):
    """What was measured of the unpruned or of the pruned model.

    Args:
        times_ms: by phase.
        floors_ms: the least that each phase could take here.
        tokens: of an image.
        prefill_flops: of a prompt.
        peak_memory_bytes: the most that was held at once.
        busy_ms: of a GPU; None on a CPU.
    """

    times_ms: PhaseTimings
    floors_ms: PhaseTimes
    tokens: TokenCounts
    prefill_flops: Amount
    peak_memory_bytes: Count
    busy_ms: BusyTimes | None = None


class WholeSpeedup(Record, frozen=True):
    """What selection costs where all decoder layers of the shape run.

    Args:
        whole_selection_share: selection as a share of the unpruned prefill.
        whole_selection_of_pruned: the same of the pruned prefill.
        whole_of_promise: share of the promised speed-up of the prefill that is left with selection.
    """

    whole_selection_share: Amount
    whole_selection_of_pruned: Amount
    whole_of_promise: Amount


class BenchSpeedup(Record, frozen=True, omit_defaults=True):
    """Unpruned over pruned medians, and what they could be; fields of `WholeSpeedup` are as there.

    Args:
        prefill: with selection.
        first_token: of vision, selection and prefill.
        decode: of a token.
        prefill_alone: without selection.
        short_text: the unpruned prefill over that of a text as short as the pruned prompt.
        promised: ratio of the prefills' FLOPs; over it `prefill_alone` is the share of the promise
            that the device keeps.
        roofline: ratio of the prefills' floors, which is less where weights take longer to read than
            to multiply with.
        selection_share: selection as a share of the unpruned prefill.
        busy_prefill: as `prefill`, of the time for which a GPU computes, without that of launching.
        busy_prefill_alone: as `prefill_alone`, of this time.
        busy_selection_share: as `selection_share`, of this time.
    """

    prefill: Amount
    first_token: Amount
    decode: Amount
    prefill_alone: Amount
    short_text: Amount = msgspec.field(name="as_short")
    promised: Amount
    roofline: Amount
    selection_share: Amount
    busy_prefill: Amount | None = None
    busy_prefill_alone: Amount | None = None
    busy_selection_share: Amount | None = None
    whole_selection_share: Amount | None = None
    whole_selection_of_pruned: Amount | None = None
    whole_of_promise: Amount | None = None

    @property
    def busy_of_roofline(self) -> float | None:
        """Returns the share of what the roofline promises that a GPU keeps while it computes."""
        alone = self.busy_prefill_alone
        return None if alone is None else alone / self.roofline


class BenchResults(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`bench.json` of one method; of several methods it is a list of these.

    Args:
        config: what was measured.
        environment: device, driver, versions and command.
        ceilings: what the device does at most.
        short_text_ms: the unpruned prefill of a text with as many tokens as layers compute on average.
        method: its name.
        definition: what the name stands for, if it stands for another method.
        unpruned: the model as it is.
        pruned: the model with the method.
        speedup: of the two.
        selection_memory: the most that choosing holds, as a multiple of the tokens of a video.
    """

    config: BenchConfig
    environment: dict[str, str]
    ceilings: Ceilings
    short_text_ms: Timing = msgspec.field(name="as_short_ms")
    method: str
    definition: str
    unpruned: ModelTimes
    pruned: ModelTimes
    speedup: BenchSpeedup
    selection_memory: Amount | None = None


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
    """Cuts a language model's configuration to its first `layers` decoder layers.

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
    """Cuts a vision tower's configuration to `layers`; the last one attends to the whole image.

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
    return Prompts(tensors, None, {}, [0] * config.batch, 0.0)


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
    placeholder = family.placeholder(family.kind_of(config.video_frames))
    # a third of the text before the image, the rest behind it
    markers = min(config.text - 2, int((image[0] != placeholder).sum()))
    text = torch.randint(12, 200, (config.batch, config.text - markers), generator=generator)
    # markers may leave less text than what goes before the image
    first = min(config.text // 3, len(text[0]))
    before, after = text.to(model.device).split([first, len(text[0]) - first], 1)
    ids = torch.cat([before, image, after], 1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def bench(config: BenchConfig, variants: list[Variant]) -> list[BenchResults]:
    """Measures methods one after the other on one model, whose weights are made once."""
    pruners = [variant.build(config.seed) for variant in variants]
    model = random_model(config)
    for pruner in pruners:
        pruner.admit(model)
    side = 8192 if model.device.type == "cuda" else 512
    ceilings = measured_ceilings(model.device, model.dtype, side)
    video = None
    with kept_memory(), compiled_prefill(model) if config.compile else nullcontext():
        if config.video_frames:
            # encoded once for all methods, none of which changes it
            frames = [config.video_frames] * config.batch
            own = frames if family_of(model).frames_as_images else None
            prompts = encoded(model, random_prompt(config, model), [1] * config.batch, own)
            video = Video(prompts)
        return [
            _measured(replace(config, variant=variant), pruner, model, ceilings, video)
            for variant, pruner in zip(variants, pruners, strict=True)
        ]


@dataclass
class Video:
    """A video that all methods see, and, once measured, how long the unpruned
    model took for it and what it held at most.
    """

    prompts: Prompts
    unpruned: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0


def _measured(
    config: BenchConfig, pruner: Any, model: Any, ceilings: Ceilings, video: Video | None = None
) -> BenchResults:
    """Runs unpruned and pruned in turn, after one warm-up each; returns what is reported.

    The unpruned model sees a video for the first method alone.

    Times are milliseconds per call for the whole batch, `decode` per generated token. Vision is
    timed with the same tower call for both, unless the method changes the images. `short_text_ms` is
    the unpruned prefill of a text with as many tokens as layers compute on average: what the model
    and the device give at best.

    Args:
        config: sizes.
        pruner: of the pruned runs.
        model: with random weights.
        ceilings: of the machine.
        video: encoded beforehand, with the unpruned figures once they are known; None for images.
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
                peak[name] = video.peak  # type: ignore[union-attr]
                continue
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            generate = partial(
                timed_generate, model, prompts, method,
                max_new_tokens=config.new_tokens, min_new_tokens=config.new_tokens,
            )  # fmt: skip
            _, phases, trace = settled(generate, model.device)
            times = asdict(phases) | {"vision": phases.vision or prompts.vision_s}
            times["decode"] /= max(1, config.new_tokens - 1)
            samples[name].append({phase: 1e3 * times[phase] for phase in PHASES})
            layer_tokens[name], peak[name] = trace.layer_tokens, peak_bytes(model.device)
            if video and method is None:
                video.peak = peak[name]
        text = random_text(config, config.text + round(mean(layer_tokens["pruned"])), model)
        generate = partial(timed_generate, model, text, max_new_tokens=1, min_new_tokens=1)
        _, phases, _ = settled(generate, model.device)
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
    tokens = prompts.vision.counts[0]
    tower = {"unpruned": prompts.vision.flops[0]}
    # a method that shrinks images spares the tower work
    tower["pruned"] = trace.tower_flops[0] if trace.tower_flops else tower["unpruned"]
    runs = {
        name: ModelTimes(
            times_ms=PhaseTimings(**{p: Timing.of([row[p] for row in rows[1:]]) for p in PHASES}),
            floors_ms=floors(model, config, layer_tokens[name], tower[name], ceilings),
            tokens=TokenCounts(**pruner.counts(tokens, layer_tokens[name])),
            prefill_flops=prefill_flops(
                model.config.get_text_config(), config.text, layer_tokens[name]
            ),
            peak_memory_bytes=peak[name],
            busy_ms=busy.get(name),
        )
        for name, rows in samples.items()
    }
    least = Timing.of(short_text_ms[1:])
    unpruned, pruned = runs["unpruned"], runs["pruned"]
    whole = whole_speedup(unpruned, pruned, config, head_ms(model, config.repeats))
    return BenchResults(
        config=config,
        environment=environment(model.device),
        ceilings=ceilings,
        short_text_ms=least,
        method=config.variant.method,
        definition=pruner.definition(len(layer_tokens["pruned"])),
        unpruned=unpruned,
        pruned=pruned,
        speedup=speedup(unpruned, pruned, least.median, whole),
        selection_memory=selection_memory(pruner, prompts.vision) if video else None,
    )


def head_ms(model: Any, repeats: int) -> float:
    """Returns the median milliseconds that the logits of one token take."""
    config = model.config.get_text_config()
    hidden_states = torch.zeros(1, 1, config.hidden_size, dtype=model.dtype, device=model.device)
    times = []
    for _ in range(repeats + 1):
        start = now(model.device)
        model.lm_head(hidden_states)
        times.append(1e3 * (now(model.device) - start))
    return median(times[1:])


def whole_speedup(
    unpruned: ModelTimes, pruned: ModelTimes, config: BenchConfig, head: float
) -> WholeSpeedup:
    """Returns what selection costs where all decoder layers of the shape run, each as long as those
    that did.

    Args:
        unpruned: what was measured of the model as it is.
        pruned: and of the pruned one.
        config: of the benchmark.
        head: milliseconds that the logits take, whatever the number of layers.
    """
    whole = SHAPES[config.shape]().get_text_config().num_hidden_layers
    depth = whole / (config.layers or whole)
    before, after = (
        head + depth * max(0.0, run.times_ms.prefill.median - head) for run in (unpruned, pruned)
    )
    selection = pruned.times_ms.selection.median
    promised = unpruned.prefill_flops / pruned.prefill_flops
    return WholeSpeedup(
        whole_selection_share=selection / before,
        whole_selection_of_pruned=selection / after,
        whole_of_promise=before / (after + selection) / promised,
    )


def busy_ms(call: Callable[[], object]) -> BusyTimes:
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
    return BusyTimes(
        all=sum(ms for _, ms in spent),
        selection=sum(
            ms for start, ms in spent if any(r.start <= start <= r.end for r in selections)
        ),
    )


def floors(
    model: Any, config: BenchConfig, layer_tokens: list[float], tower: float, ceilings: Ceilings
) -> PhaseTimes:
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
    return PhaseTimes(
        vision=ceilings.floor_ms(vision, weights(family.tower_layers.parameters())),
        selection=0.0,
        prefill=ceilings.floor_ms(prefill, language + cache),
        decode=ceilings.floor_ms(token, language + cache),
    )


def speedup(
    unpruned: ModelTimes, pruned: ModelTimes, short_text_ms: float, whole: WholeSpeedup
) -> BenchSpeedup:
    """Returns the ratios of medians, and what they could be.

    Args:
        unpruned: what was measured of the model as it is.
        pruned: and of the pruned one.
        short_text_ms: the unpruned prefill of a text as short as the pruned prompt.
        whole: what selection costs where all layers run.
    """

    def total(run: ModelTimes, *phases: str) -> float:
        return float(sum(getattr(run.times_ms, phase).median for phase in phases))

    busy = {}
    if unpruned.busy_ms and pruned.busy_ms:
        busy = {
            "busy_prefill": unpruned.busy_ms.all / pruned.busy_ms.all,
            "busy_prefill_alone": unpruned.busy_ms.all
            / (pruned.busy_ms.all - pruned.busy_ms.selection),
            "busy_selection_share": pruned.busy_ms.selection / unpruned.busy_ms.all,
        }
    return BenchSpeedup(
        prefill=total(unpruned, "prefill") / total(pruned, "selection", "prefill"),
        first_token=total(unpruned, "vision", "prefill")
        / total(pruned, "vision", "selection", "prefill"),
        decode=total(unpruned, "decode") / total(pruned, "decode"),
        prefill_alone=total(unpruned, "prefill") / total(pruned, "prefill"),
        short_text=total(unpruned, "prefill") / short_text_ms,
        promised=unpruned.prefill_flops / pruned.prefill_flops,
        roofline=unpruned.floors_ms.prefill / pruned.floors_ms.prefill,
        selection_share=total(pruned, "selection") / total(unpruned, "prefill"),
        **msgspec.structs.asdict(whole),
        **busy,
    )
