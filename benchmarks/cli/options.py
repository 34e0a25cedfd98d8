"""Arguments that several commands take, and how they are read."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import unknown

if TYPE_CHECKING:
    from vlm_prune.benchmarks.evaluation.records import Variant
    from vlm_prune.vlm.common.paths import DataRoot as Root

ENGINES = ("hf", "vllm")

Model = Annotated[
    str,
    typer.Option(
        help="'tiny', 'smol' or 'tiny-video' (embedded), or a checkpoint of a family in 'vlm-prune models': folder or hub name."
    ),
]
Method = Annotated[str, typer.Option(help="See 'vlm-prune methods'; two joined by + cascade.")]
OneBudget = Annotated[
    str, typer.Option(help="Tokens per image or video, a fraction, or 8/frame of a video.")
]
Budgets = Annotated[str, typer.Option(help="Budgets, comma-separated.")]
AttentionArgs = Annotated[
    str, typer.Option(help="Hyperparameters of sparse attention, name=value,...")
]
MethodArgs = Annotated[str, typer.Option(help="Hyperparameters, name=value,...")]
Tasks = Annotated[
    str,
    typer.Option(
        help="Names, comma-separated, lmms-eval's included, or 'visual', 'video', 'album' or 'all'; "
        "auto is 'video' for tiny-video, else 'visual'."
    ),
]
Limit = Annotated[int, typer.Option(min=1, help="Questions in all, spread evenly over the tasks.")]
Frames = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Frames of a video, at most; all of an embedded task's and 32 of a file's unless given.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered together.")]


def _device(name: str) -> str:
    from vlm_prune.vlm.load import choose_device

    return choose_device(name)


Device = Annotated[
    str,
    typer.Option(callback=_device, help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps."),
]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto spreads the model over GPUs, CPU memory and disk.")
]
Quantization = Annotated[
    str | None, typer.Option(help="bnb-4bit, bnb-8bit, torchao-int8 or torchao-int4.")
]
Attn = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 or flex_attention.")]
Adapter = Annotated[str | None, typer.Option(help="Folder or hub name of a PEFT LoRA.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the language model's layers for prompts.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides questions and random draws.")]
Positions = Annotated[
    str, typer.Option(help="Positions of kept tokens: auto, contiguous, original.")
]
Output = Annotated[
    Path | None, typer.Option(help="Folder for results; a killed run resumes there.")
]
Wings = Annotated[str | None, typer.Option(help="Folder or hub name of a Wings adapter.")]
Split = Annotated[
    str, typer.Option(help="Of embedded tasks: val for choosing, test for reporting.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option(envvar="VLM_PRUNE_DATA", help="Folder of data sets, for lmms-eval's tasks."),
]
AllowOutside = Annotated[
    bool,
    typer.Option("--allow-outside", help="Let data name files outside of their folder."),
]

ScheduleFile = Annotated[
    Path | None,
    typer.Option("--schedule", help="Cut by this file of 'vlm-prune schedule', inside the LLM."),
]


def data_root_of(data_root: Path | None, allow_outside: bool) -> "Root | None":
    """Returns the folder of data sets with what the user allows its files to name."""
    from vlm_prune.vlm.common.paths import DataRoot as Root

    return None if data_root is None else Root(data_root, allow_outside)


def parse_arguments(text: str) -> dict[str, Any]:
    """Reads `strategy=row,directions=16` as a dictionary; values are JSON where they can be.

    Raises:
        InputError: if a part is no `name=value`, a name is given twice, or a number is not finite.
    """
    arguments: dict[str, Any] = {}
    # commas inside brackets belong to a value
    for part in filter(None, re.split(r",(?![^\[]*\])", text)):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InputError(f"argument {part!r} is not of the form name=value")
        if key in arguments:
            raise InputError(f"argument {key!r} is given twice in {text!r}; leave out one")
        arguments[key] = _value(value)
        if isinstance(arguments[key], float) and not math.isfinite(arguments[key]):
            raise InputError(f"argument {part!r} is not a finite number; give one")
    return arguments


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_method_args(text: str) -> dict[str, Any]:
    """Reads hyperparameters of a method; raises `InputError` as
    `parse_arguments` and `check_own` do.
    """
    from vlm_prune.pruning.registry import check_own

    arguments = parse_arguments(text)
    check_own(arguments)
    return arguments


def parse_densities(text: str) -> list[float]:
    """Reads shares of attention, comma-separated.

    Raises:
        InputError: if one is no number above 0 and at most 1, or named twice.
    """
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            raise InputError(
                f"density {part!r} is no number; give shares such as 0.5,0.25"
            ) from None
        if not 0 < found[-1] <= 1:
            raise InputError(f"density {part} is no share; give one above 0, at most 1")
    check_named_once("density", found)
    return found


def check_named_once(what: str, given: Iterable[object]) -> None:
    """Raises `InputError` where a list on the command line names something twice."""
    named = list(given)
    if len(set(named)) < len(named):
        raise InputError(f"a {what} is named twice in {','.join(map(str, named))}; name each once")


def given_options(context: typer.Context) -> set[str]:
    """Returns the names of the options that the command line gives."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def as_flags(names: Iterable[str]) -> list[str]:
    """Returns options as they are written on the command line, by their parameters' names, sorted."""
    return [f"--{name.replace('_', '-')}" for name in sorted(names)]


def check_attention_options(attention: str | None, density: str | None, arguments: str) -> None:
    """Raises `InputError` for options of sparse attention without a method of it.

    Args:
        attention: of `--attention`.
        density: of `--density`.
        arguments: of `--attention-args`.
    """
    if attention is None and (density is not None or arguments):
        raise InputError(
            "--density and --attention-args are those of sparse attention; add --attention, such as pooled"
        )


def check_unpruned(given: set[str]) -> None:
    """Raises `InputError` for a pruner's options where sparse attention runs without one.

    Args:
        given: names of the options that the command line gives.
    """
    lone = as_flags(given & {"budget", "positions", "method_args"})
    if lone and "method" not in given:
        options = " and ".join(lone)
        raise InputError(
            f"--attention without --method prunes nothing; add --method or leave out {options}"
        )


def with_sparse_attention(
    variant: "Variant", names: str, densities: str | None, arguments: str
) -> "list[Variant]":
    """Returns the variant with each method of sparse attention beside it, at each density.

    Args:
        variant: a pruner.
        names: of methods of sparse attention, comma-separated.
        densities: shares, comma-separated; None for the methods' own.
        arguments: other hyperparameters of all of them.

    Raises:
        InputError: if there is no such method, or a density is out of range.
    """
    from dataclasses import replace

    from vlm_prune.pruning.attention import ATTENTION

    more = {f"attention.{name}": value for name, value in parse_arguments(arguments).items()}
    given: list[dict[str, float]] = [{}]
    if densities is not None:
        given = [{"attention.density": share} for share in parse_densities(densities)]
    chosen = names.split(",")
    for name in chosen:
        ATTENTION[name]
    check_named_once("method of sparse attention", chosen)
    return [
        replace(
            variant,
            method=f"{variant.method}+{name}",
            arguments=variant.arguments | more | share,
        )
        for share in given
        for name in chosen
    ]


def parse_tasks(text: str, model: str = "tiny") -> tuple[str, ...]:
    """Reads names of tasks, comma-separated, or those of a group, or what a model was trained on
    for `auto`; raises `InputError` for unknown ones.
    """
    from vlm_prune.benchmarks.lmms_eval import check_tasks
    from vlm_prune.benchmarks.tasks import ALBUM, TASKS, VIDEO, VISUAL

    groups = {
        "auto": VIDEO if model == "tiny-video" else VISUAL,
        "visual": VISUAL,
        "video": VIDEO,
        "album": ALBUM,
        "all": tuple(name for name in TASKS if name not in VIDEO + ALBUM),
    }
    names = groups.get(text) or tuple(name for name in text.split(",") if name)
    if not names:
        raise InputError(f"no task given in {text!r}; known: {', '.join(TASKS)}")
    check_named_once("task", names)
    if others := [name for name in names if name not in TASKS]:
        check_tasks(others, list(TASKS))
    return names


def check_engine(name: str) -> None:
    """Raises `InputError` for an engine that there is not."""
    if name not in ENGINES:
        raise InputError(unknown("engine", name, ENGINES))


def parse_split(text: str) -> Literal["val", "test"]:
    """Returns the split to measure on; raises `InputError` for another one."""
    splits: dict[str, Literal["val", "test"]] = {"val": "val", "test": "test"}
    if text not in splits:
        raise InputError(f"split {text!r} is not for measuring; give val or test")
    return splits[text]


def with_schedule(variants: "list[Variant]", path: Path | None) -> "list[Variant]":
    """Returns the variants, those that cut inside the language model by the schedule in `path`.

    Raises:
        InputError: if there is no schedule in the file, or none of them cuts.
    """
    if path is None:
        return variants
    from vlm_prune.pruning.schedule import Schedule

    schedule = Schedule.read(path)
    changed = [variant.scheduled(schedule) for variant in variants]
    if not any(changed):
        raise InputError(
            f"{variants[0].method} makes no cuts inside the language model; "
            "use --schedule with a method that does, such as adaptinfer"
        )
    return [new or old for new, old in zip(changed, variants, strict=True)]
