"""What `vlm-prune bench` prints of its measurements."""

from vlm_prune.benchmarks.evaluation.tables import (
    MISSING_VALUE,
    THREE_WAYS,
    method_name,
    three_ways,
)
from vlm_prune.benchmarks.speed.bench import PHASES, BenchConfig, BenchResults
from vlm_prune.benchmarks.stats.table import percent


def bench_rows(results: BenchResults) -> list[list[str]]:
    """Returns header and one row per phase: median [quartiles] and floor, in ms, then memory."""
    lines = [["phase", "unpruned ms", "floor", "pruned ms", "floor"]]
    for phase in PHASES:
        line = [f"{phase} per token" if phase == "decode" else phase]
        for run in (results.unpruned, results.pruned):
            line += [str(getattr(run.times_ms, phase)), f"{getattr(run.floors_ms, phase):.3f}"]
        lines.append(line)
    memory = (f"{run.peak_memory_bytes / 1e6:.0f} MB" for run in (results.unpruned, results.pruned))
    lines.append(["peak memory", next(memory), "", next(memory), ""])
    return lines


def bench_summary(results: BenchResults) -> list[str]:
    """Returns lines that say what was measured, and the speed-ups."""
    speed, busy = results.speedup, []
    if speed.busy_prefill is not None:
        kept = _share(speed.busy_of_roofline)
        busy = [
            (
                f"of the time for which the GPU computes: prefill with selection "
                f"{speed.busy_prefill:.2f}x, alone {speed.busy_prefill_alone:.2f}x of the "
                f"{speed.roofline:.2f}x that the roofline promises ({kept} %); selection "
                f"{_share(speed.busy_selection_share)} %"
            )
        ]
    return [
        *about_setting(results),
        (f"{_method_of(results)}: {three_ways(results.pruned.tokens)} image tokens ({THREE_WAYS})"),
        (
            f"speed-up: prefill with selection {speed.prefill:.2f}x, to the first token "
            f"{speed.first_token:.2f}x, decode {speed.decode:.2f}x"
        ),
        (
            f"prefill alone {speed.prefill_alone:.2f}x of the {speed.promised:.2f}x that its "
            f"FLOPs promise ({percent(speed.prefill_alone / speed.promised)} %); selection "
            f"{percent(speed.selection_share)} % of the unpruned prefill"
        ),
        (f"a text as short, unpruned: {results.short_text_ms} ms, {speed.short_text:.2f}x"),
        *video_summary(results),
        *busy,
    ]


def _method_of(results: BenchResults) -> str:
    return method_name(results.config.variant, results.definition)


def _share(value: float | None) -> str:
    """Returns a share as per cent, where it was measured."""
    return MISSING_VALUE if value is None else percent(value)


def shape_of(config: BenchConfig) -> str:
    """Returns the shape's name, with the number of layers where they are not all."""
    layers = config.layers
    return str(config.shape) + (f" of {layers} layers" if layers else "")


def tokens_of(config: BenchConfig) -> str:
    """Returns what the pruned tokens of a prompt are of."""
    frames = config.video_frames
    return f"tokens of {frames} frames" if frames else "image tokens"


def video_summary(results: BenchResults) -> list[str]:
    """Returns a line that says what choosing among a video's tokens costs; none for images."""
    config, speed = results.config, results.speedup
    if not config.video_frames:
        return []
    memory = results.selection_memory
    peak = "" if memory is None else f"; it holds {memory:.2f}x the tokens at most"
    return [
        (
            f"of all layers of the shape: selection {_share(speed.whole_selection_share)} % of the "
            f"unpruned prefill and {_share(speed.whole_selection_of_pruned)} % of the pruned one, "
            f"{_share(speed.whole_of_promise)} % of the promised speed-up with it{peak}"
        )
    ]


def about_setting(results: BenchResults) -> list[str]:
    """Returns what was measured, on what, and what that can do at most."""
    config, ceilings = results.config, results.ceilings
    return [
        (
            f"{shape_of(config)}, batch {config.batch}, {config.dtype}"
            f"{', compiled prefill' if config.compile else ''}: "
            f"{results.unpruned.tokens.kept:.0f} {tokens_of(config)} and {config.text} others "
            f"per prompt, budget {config.variant.budget}"
        ),
        ", ".join(f"{key} {value}" for key, value in results.environment.items()),
        (
            f"measured ceilings {ceilings.flops / 1e12:.2f} TFLOP/s, "
            f"{ceilings.bandwidth / 1e9:.1f} GB/s"
        ),
    ]


def bench_overview(runs: list[BenchResults]) -> list[list[str]]:
    """Returns header and one row per method; on a GPU also what of the times is its own."""
    on_gpu = runs[0].speedup.busy_prefill is not None
    videos = bool(runs[0].config.video_frames)
    header = [
        "method", f"tokens {THREE_WAYS}", "unpruned prefill ms", "selection ms", "prefill ms",
        "text as short ms", "with selection", "of promise %", "selection %", "first token",
        "decode",
        *(
            ["all layers: selection %", "of pruned %", "of promise %", "memory of selection"]
            if videos
            else []
        ),
        *(["GPU alone: prefill", "of roofline %", "selection %"] if on_gpu else []),
    ]  # fmt: skip
    lines = [header]
    for run in runs:
        speed, times = run.speedup, run.pruned.times_ms
        line = [
            _method_of(run),
            three_ways(run.pruned.tokens),
            str(run.unpruned.times_ms.prefill),
            str(times.selection),
            str(times.prefill),
            str(run.short_text_ms),
            f"{speed.prefill:.2f}x",
            percent(speed.prefill_alone / speed.promised),
            percent(speed.selection_share),
            f"{speed.first_token:.2f}x",
            f"{speed.decode:.2f}x",
        ]
        if videos:
            line += [
                _share(speed.whole_selection_share),
                _share(speed.whole_selection_of_pruned),
                _share(speed.whole_of_promise),
                "" if run.selection_memory is None else f"{run.selection_memory:.2f}x",
            ]
        if on_gpu:
            line += [
                f"{speed.busy_prefill:.2f}x",
                _share(speed.busy_of_roofline),
                _share(speed.busy_selection_share),
            ]
        lines.append(line)
    return lines
