"""Wrong inputs for every command and script, and how each is met: a table, each in a fork of one process.

    python tests/hostile_inputs.py [WORD ...]    # all of them, or those whose name has one of the words

An input is a *traceback* where anything but our own end comes out, *endless* where it takes a minute
of processor time, *silent* where it is taken although it is wrong, *unclear* by the rule in `unclear`,
else *clear*. Inputs that are right stand in the table, too (`RIGHT`): refusing them would be as wrong.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_prune.benchmarks.cli.app import run_script

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PATIENCE_S, SLOWEST_S, MOST_BYTES, MOST_UNCLEAR = 60, 10.0, 2 * 10**9, 0.02
PATIENCE_WALL_S = 300
# Imported once, before the forks: what the commands import when they begin to work.
IMPORTED = (
    "vlm_prune.benchmarks.batch.pipeline", "vlm_prune.benchmarks.evaluation.engine",
    "vlm_prune.benchmarks.experiments.continual.learn", "vlm_prune.benchmarks.experiments.iit.evaluate",
    "vlm_prune.benchmarks.report", "vlm_prune.benchmarks.report.demo", "vlm_prune.learners.train",
    "vlm_prune.pruning.pipeline", "gradio", "open_clip",
)  # fmt: skip
LONGEST_LINE = 400
ROOT = Path(__file__).resolve().parents[1]

# What a message may not speak of: Python's own words.
INTERNAL = re.compile(
    r"Traceback|object at 0x|<class|NoneType|\b(Key|Type|Attribute|Index|Value|Assertion|Runtime|"
    r"Unicode\w*|Recursion|Overflow|Zero\w+)Error\b|\bErrno\b|positional argument|has no attribute"
)
# Words by which a message says what would be right, or what is wrong with what it names.
ADVICE = re.compile(
    r"give |did you mean|known: |remove |install|see '|run it again|Possible options|Missing|"
    r"out of range|is not |is no |no such|No such|in another folder|another --|add it|leave out|"
    r"cannot read|damaged|has no |have no|holds |needs |above|below|at most|Requires|requires|unsupported|"
    r"there is no|is a folder|is a file|is a named pipe|is a socket|is a device|unexpected|supported|not allowed|"
    r"leads |named twice|must |should be|larger|smaller|Not a directory|Permission|too "
)


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        name: the command, the option and the value.
        arguments: of `vlm-prune`; `{name}` stands for a path of the folder of inputs.
        culprits: what a clear message names one of: the value, or the option or file that is wrong.
        prepare: makes what the input needs in the folder.
        right: whether the input is right, so that it must be taken.
        script: of `scripts/`, run instead of `vlm-prune`.
    """

    name: str
    arguments: tuple[str, ...]
    culprits: tuple[str, ...]
    prepare: Callable[[Path], None] | None = None
    right: bool = False
    script: str = ""


@dataclass(frozen=True)
class Outcome:
    """How an input was met, in how many seconds, processor seconds and bytes of memory."""

    case: Case
    kind: str
    code: object
    out: str
    err: str
    why: str = ""
    seconds: float = 0.0
    cpu: float = 0.0
    memory: int = 0


# --- the sound command lines, to which each wrong value is added

SOUND: dict[str, tuple[str, ...]] = {
    "eval": ("eval", "--model", "{model}", "--tasks", "text", "--limit", "2", "--budget", "8"),
    "compare": (
        "compare", "--model", "{model}", "--tasks", "text", "--limit", "2", "--budget", "8",
        "--method", "divprune,random",
    ),
    "bench": ("bench", "--repeats", "1"),
    "bench-kernels": ("bench-kernels", "{new}/kernels"),
    "report": ("report", "{run}"),
    "ask": ("ask", "{image}", "red?", "--model", "{model}", "--budget", "8"),
    "map": ("map", "--input", "{images}", "--output", "{new}/out.parquet", "--prompt", "red?",
            "--model", "{model}", "--budget", "8", "--limit", "1", "--max-new-tokens", "1"),
    "demo": ("demo", "--model", "{model}"),
    "export": ("export", "{model}", "{new}/exported"),
    "schedule": ("schedule", "--model", "{model}", "--data", "exist", "--limit", "1", "--budget", "8",
                 "--output", "{new}/schedule"),
    "search": ("search", "--model", "{model}", "--budget", "8", "--tasks", "exist", "--limit", "1",
               "--definitions", "{new}/best.json", "--output", "{new}/search"),
    "calibrate": ("calibrate", "act", "{new}/act.safetensors", "--model", "{model}", "--tasks", "exist",
                  "--limit", "1", "--attention-args", "minimum=1"),
    "serve": ("serve", "{model}", "--budget", "8"),
    "draw-kept-tokens": ("draw-kept-tokens", "{new}/drawn.png"),
    "left-to-see": ("left-to-see", "{new}/left.md", "--limit", "6", "--method", "random,evs", "--budget", "0.1"),
    "bench-against": ("bench-against", "HEAD", "--run", "methods", "--repeats", "1"),
    "bench-peers": ("bench-peers", "{missing}"),
    "train-wings": ("train-wings",),
    "train-wings train": ("train-wings", "train", "--data", "{data}", "--images", "{images}",
                          "--output", "{new}/wings", "--model", "{model}", "--rank", "2"),
    "merge": ("merge", "{model}", "{model}", "{new}/merged"),
    "continual train": ("continual", "train", "--output", "{new}/continual", "--recipe", "steps=1",
                        "--test-per-class", "1"),
    "continual compare": ("continual", "compare", "{new}/compared", "--results", "{new}/results",
                          "--steps", "1", "--test-per-class", "1", "--seeds", "1"),
    "continual bench": ("continual", "bench", "--rounds", "1"),
    "iit build": ("iit", "build", "{new}/iit", "--source", "mmlu={images}"),
    "iit evaluate": ("iit", "evaluate", "{iit}", "--model", "{model}", "--output", "{new}/scored"),
    "train-tiny llava": ("train-tiny", "llava", "{new}/tiny"),
    "train-tiny text": ("train-tiny", "text", "{new}/tiny"),
    "train-tiny clip": ("train-tiny", "clip", "{new}/tiny"),
    "train-tiny video": ("train-tiny", "video", "{new}/tiny"),
    "train-tiny average-smol": ("train-tiny", "average-smol", "{new}/mean", "{empty}"),
}  # fmt: skip

# --- wrong values of options, for every command that has the option

COUNTS = ("0", "-1", "x", "1.5", "")
FILES = ("{missing}", "{empty}", "{pipe}", "{socket}", "/dev/null", "{nested.json}", "{text.png}")
OUTPUTS = (
    "",
    ".",
    "/",
    "/dev/null",
    "{image}",
    "{image}/below",
    "{pipe}",
    "{socket}",
    "{loop}",
    "/proc/x/y",
)
MODELS = (
    "tinny", "", "nonsense", "owner/model/more", "/nowhere/model", "{image}", "{empty}", "{pipe}",
    "[red]model[/red]", "a" * 300, "../..", "{run}", "{bert}", "{untyped}", "{cut}", "{no-template}",
)  # fmt: skip
ODD: dict[str, tuple[str, ...]] = {
    "--adapter": ("/nowhere", "", "{empty}", "{image}"),
    "--against": ("nosuch", "zoo"),
    "--alpha": ("x", "nan", "inf", "-1", "2"),
    "--arms": ("nosuch", "", "codyra;nosuch"),
    "--attention": ("nosuch", "", ",", "pooled,nosuch", "[red]local[/red]", "zoo"),
    "--attention-args": ("nosuch=3", "=3", "block=0", "block=x", "seed=-1", "mass=nan", "executor=gpu"),
    "--density": ("0", "-1", "1.5", "nan", "inf", "x", ""),
    "--attn": ("nosuch", "", "paged|eager"),
    "--base": ("/nowhere", "", "{image}", "{empty}"),
    "--batch": COUNTS,
    "--batch-size": COUNTS,
    "--budget": ("0", "-3", "1.5", "nan", "inf", "many", "", "1e999", "26", "9" * 400, "8,", "0x8",
        "0/frame", "8/image", "26/frame", "/frame"),
    "--classes": COUNTS,
    "--concurrency": COUNTS,
    "--context": ("theirs", ""),
    "--cpus": ("1", "-1", "x"),
    "--cuts": ("0", "4", "x"),
    "--data": ("{missing.json}", "{nested.json}", "{null.json}", "{empty.json}", "{rows.json}", "nosuchtask", ""),
    "--definitions": OUTPUTS,
    "--device": ("gpu", "cuda:99", "cuda", "meta", "", "xla:0", "cpu:x", "tiny", "[b]cpu[/b]"),
    "--device-map": ("nosuch", ""),
    "--dtype": ("float31", "int8", "", "torch.float32", "None"),
    "--engine": ("nosuch", ""),
    "--experiment": ("forgeting", ""),
    "--gallery": ("-1", "x"),
    "--host": ("nowhere.invalid", "256.1.1.1", "", "[::"),
    "--images": ("{missing}", "{image}"),
    "--input": (*FILES, "{csv}"),
    "--jobs": COUNTS,
    "--keep": ("none", ""),
    "--layers": ("99", "-1", "x", "0"),
    "--limit": COUNTS,
    "--max-new-tokens": COUNTS,
    "--method": ("zo", "", ",", "zoo+", "zoo+zoo", "none+none", "[red]zoo[/red]", "best@x", "fastv@99", "a" * 300),
    "--method-args": (
        "nosuch=3", "step", "=3", "nosuch=[]", "seed=1", "budget=3", "inside.nosuch=1", "nosuch.a.b=1",
        "step=NaN", "step=1e999", "step=[]", "step={", "step=null", "step=x", "[nosuch]=1",
        "positions=original",
    ),
    "--micro-batch": COUNTS,
    "--model": MODELS,
    "--model-shape": ("nosuch", "", "llava-1.5-8b"),
    "--new-tokens": ("1", "0", "x"),
    "--options": ("nosuch=3", "rank", "=3", "rank=x", "rank=[]", "rank=0", "rank=NaN", "rank=1e999"),
    "--output": OUTPUTS,
    "--port": ("0", "70000", "x", "{taken}"),
    "--positions": ("orignal", ""),
    "--preset": ("paper-3", ""),
    "--pretrained": ("nosuch", "/nowhere/weights.bin"),
    "--prompt": ("",),
    "--quantization": ("nosuch", "bnb-3bit", ""),
    "--rank": ("0", "-1", "x", "99999"),
    "--recipe": ("nosuch=3", "steps", "steps=x", "steps=0", "steps=[]", "lr=NaN", "lr=-1", "lr=1e999"),
    "--repeats": COUNTS,
    "--requests": COUNTS,
    "--results": OUTPUTS,
    "--retention": ("nosuch", ""),
    "--rounds": COUNTS,
    "--schedule": (*FILES, "{odd-schedule.json}", "{null.json}", "{run}/results.json"),
    "--run": ("", "nosuch", "'eval"),
    "--seed": ("-1", "x", "1.5", ""),
    "--seeds": COUNTS,
    "--shots": ("0", "-1", "x"),
    "--size": COUNTS,
    "--source": ("nosuch", "nosuch={images}", "mmlu={missing}", "mmlu={nested.json}", "mmlu={pipe}", ""),
    "--split": ("train", "", "tset"),
    "--stage": ("nosuch", ""),
    "--steps": COUNTS,
    "--stream": ("nosuch", "", "mtil-1"),
    "--suite": ("forgeting", ""),
    "--tasks": ("exits", "", ",", "exist,exist", "nosuchtask_xyz", "a" * 300, "../x", "[bold]text[/bold]", "TEXT"),
    "--test-per-class": ("0", "-1", "x"),
    "--text-ratio": ("-1", "2", "nan", "x"),
    "--threads": COUNTS,
    "--wings": ("/nowhere", "", "{empty}", "{image}", "{run}", "{adapter}"),
    "--parts": COUNTS,
    "--stride": COUNTS,
    "--wings-stride": COUNTS,
    "--workers": COUNTS,
}  # fmt: skip

# Where an option means something else, so that its values above are not wrong ones.
OTHER: dict[tuple[str, str], tuple[str, ...]] = {
    ("compare", "--budget"): ("0", "-3", "nan", "many", "", "26", "8,", "8,8", "1.5"),
    ("search", "--budget"): ("0", "-3", "nan", "many", "", "26", "8,", "1.5"),
    ("bench", "--budget"): ("0", "-3", "1.5", "nan", "many", "577"),
    ("compare", "--method"): ("zo", ",", "zoo,zoo", "zoo+zoo", "[red]zoo[/red]"),
    ("bench", "--method"): ("zo", ",", "zoo+zoo", "[red]zoo[/red]"),
    ("bench", "--wings"): ("0", "x", "-1"),
    ("bench", "--attention"): ("zo", "", ",", "act", "pooled,zo", "[red]local[/red]"),
    ("bench", "--attention-tokens"): ("0", "-1", "", ",", "4k", "600,x"),
    ("train-wings train", "--data"): (
        "{missing.json}", "{nested.json}", "{null.json}", "{empty.json}", "{rows.json}", "{pipe}", "{empty}",
    ),
    ("train-wings train", "--method"): ("wing", "", "zoo"),
    ("train-wings train", "--layers"): ("99", "-1", "x"),
    ("train-wings train", "--rank"): ("0", "-1", "x", "99999"),
    ("continual train", "--workers"): ("-1", "x"),
    ("continual train", "--method"): ("codyr", "", "zoo"),
    ("continual train", "--model"): ("nonsense", "/nowhere/model", "{image}", "{empty}"),
    ("continual bench", "--model"): ("nonsense", "ViT-B-33", ""),
    ("continual bench", "--rank"): ("0", "-1", "x"),
    ("iit evaluate", "--method"): ("zo", "", "zoo+zoo"),
    ("train-wings", "--base"): ("/nowhere", "{image}", "{empty}"),
    ("train-wings", "--model"): ("tinny", "", "nonsense", "{image}", "[red]model[/red]"),
    ("train-wings", "--output"): (),
    ("train-wings", "--results"): (),
    ("train-wings", "--jobs"): ("0", "x"),
    ("map", "--limit"): ("0", "-1", "x"),
    ("map", "--output"): ("", ".", "/", "/dev/null", "{image}", "{image}/below", "{pipe}", "{loop}"),
    ("left-to-see", "--budget"): ("0", "-3", "1.5", "nan", "many", "", "0.0001", "8,", "8/image"),
    ("left-to-see", "--method"): ("zo", "", "random,random", "fastv"),
    ("left-to-see", "--limit"): ("0", "-1", "x", "5"),
    ("demo", "--model"): ("tinny", "", "/nowhere/model", "{empty}"),
    ("bench-kernels", "--dtype"): ("float31", "", "int8"),
    ("report", "--output"): ("", ".", "/", "/dev/null", "{images}", "{image}/below", "{pipe}", "{loop}"),
    ("serve", "--budget"): ("0", "-3", "nan", "many", ""),
    ("serve", "--method"): ("zo", "", "zoo+zoo"),
    ("train-wings train", "--seed"): ("-1", "x"),
    ("continual compare", "--test-per-class"): COUNTS,
    ("continual compare", "--stream"): ("redrawm", "", "x-tail"),
    ("continual compare", "--search-from"): ("{missing}", "{empty}", "{image}", ""),
    # several processes or long runs would follow
    ("train-tiny llava", "--keep"): ("none",),
}  # fmt: skip

# Commands that need another option for one of theirs.
ALSO: dict[tuple[str, str], tuple[str, ...]] = {
    ("eval", "--base"): ("--suite", "forgetting"),
    ("eval", "--schedule"): ("--method", "adaptinfer"),
    ("compare", "--schedule"): ("--method", "adaptinfer"),
    ("bench", "--schedule"): ("--method", "adaptinfer"),
    ("eval", "--attention"): ("--method", "divprune"),
    ("eval", "--attention-args"): ("--method", "divprune", "--attention", "pooled"),
    ("compare", "--attention-args"): ("--attention", "pooled"),
    ("eval", "--density"): ("--method", "divprune", "--attention", "pooled"),
    ("compare", "--density"): ("--attention", "pooled"),
    ("train-wings", "--base"): ("--experiment", "forgetting", "--quick", "--output", "{new}/forgetting"),
    ("train-wings", "--model"): ("--experiment", "forgetting", "--quick", "--output", "{new}/forgetting"),
    ("train-wings", "--arms"): ("--experiment", "forgetting", "--quick", "--output", "{new}/forgetting"),
    ("train-wings", "--jobs"): ("--experiment", "forgetting", "--quick", "--output", "{new}/forgetting"),
    ("bench", "--layers"): ("--model-shape", "tiny"),
    ("bench", "--attention-tokens"): ("--attention", "local"),
    ("bench", "--density"): ("--attention", "local"),
    ("bench", "--requests"): ("--engine", "vllm"),
    ("bench", "--concurrency"): ("--engine", "vllm"),
    ("bench", "--wings-stride"): ("--model-shape", "tiny", "--wings", "8"),
    ("continual train", "--retention"): ("--stream", "packaged"),
    ("continual train", "--pretrained"): ("--model", "ViT-B-32"),
}  # fmt: skip

# Values that are right where the table above has them.
RIGHT: set[tuple[str, str, str]] = set()

POSITIONAL: dict[str, dict[int, tuple[str, ...]]] = {
    "report": {1: ("{missing}", "{image}", "{empty}", "/dev/null", "", "{images}", "[red]x[/red]")},
    "ask": {
        1: ("{missing}", "{empty}", "{pipe}", "{socket}", "/dev/null", "{text.png}", "{cut.png}", "{nested.json}", "", "{deep.png}"),
        2: ("", " ", "\udcff", "a " * 5000),
    },
    "export": {1: ("tinny", "", "/nowhere/x", "{empty}"), 2: ("", ".", "/", "/dev/null", "{image}", "{images}", "{image}/below")},
    "serve": {1: ("tinny", "/nowhere/x", "{empty}", "")},
    "bench-kernels": {1: ("", "/", "{image}/below")},
    "bench-against": {1: ("", "nosuch", "--upload-pack", "HEAD:README.md")},
    "bench-peers": {1: ("", ".", "/", "/dev/null", "{image}", "{images}", "{pipe}")},
    "left-to-see": {1: ("", ".", "/", "/dev/null", "{images}", "{image}/below", "{pipe}")},
    "draw-kept-tokens": {1: ("", ".", "/", "/dev/null", "{images}", "{image}/below", "{pipe}")},
    "calibrate": {1: ("pooled", "", "nosuch"), 2: ("", ".", "/", "/dev/null", "{image}/below", "{pipe}")},
    "merge": {1: ("tinny", "{empty}", ""), 2: ("tinny", "{empty}", ""), 3: ("", ".", "/", "/dev/null", "{image}")},
    "continual compare": {2: ("", ".", "/", "/dev/null", "{image}", "{image}/below")},
    "iit build": {2: ("", ".", "/", "/dev/null", "{image}", "{image}/below")},
    "iit evaluate": {2: ("{missing}", "{empty}", "{image}", "", "{pipe}", "{iit-empty}", "{iit-null}", "{iit-nested}")},
    "train-tiny llava": {2: ("", ".", "/", "/dev/null", "{image}")},
    "train-tiny text": {2: ("", ".", "/", "/dev/null", "{image}")},
    "train-tiny clip": {2: ("", ".", "/", "/dev/null", "{image}")},
    "train-tiny video": {2: ("", ".", "/", "/dev/null", "{image}")},
    "train-tiny average-smol": {
        2: ("", ".", "/", "/dev/null", "{image}"), 3: ("{missing}", "{image}", "{empty}", "/dev/null", ""),
    },
}  # fmt: skip

CALLED = {
    ("ask", 1): ("an image",),
    ("ask", 2): ("question", "prompt"),
    ("bench-peers", 1): ("interpreter",),
    ("iit evaluate", 2): ("iit.jsonl",),
}

# Wrong arguments of each script that takes some.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "bench_against": ("nosuchcommit",), "bench_peers": ("{missing}",),
    "bench_continual": ("--model", "nonsense"), "bench_kernels": ("{image}/below",),
    "compare_continual": ("/",), "draw_kept_tokens": ("{images}",), "left_to_see": ("{images}",), "iit": ("evaluate", "{missing}"),
    "train_continual": ("--method", "codyr"), "train_tiny_clip": ("/dev/null",),
    "train_tiny_llava": (".",), "train_tiny_text": ("",), "train_wings": ("--experiment", "forgeting"),
    "train_smol_llava": (".",), "train_tiny_video": (".",), "measure_smol_llava": (".",),
}  # fmt: skip

# --- damaged files of folders that commands go on with

TEXTS = ("", "{", "null", "[]", "[" * 100_000, '{"a":' * 50_000, "NaN", "\xff\xfe", '{"schema_version": 1}',
         '{"schema_version": 7}', "1" * 5000, "PIPE", "FOLDER")  # fmt: skip
DAMAGED: dict[str, tuple[tuple[str, ...], str]] = {
    "eval config.json": (SOUND["eval"] + ("--output", "{copy}"), "config.json"),
    "eval samples.jsonl": (SOUND["eval"] + ("--output", "{copy}"), "samples.jsonl"),
    "report results.json": (("report", "{copy}"), "results.json"),
    "report config.json": (("report", "{copy}"), "config.json"),
    "report samples.jsonl": (("report", "{copy}"), "samples.jsonl"),
    "compare config.json": (SOUND["compare"] + ("--output", "{copy}"), "config.json"),
    "search config.json": (SOUND["search"][:-2] + ("--output", "{copy}"), "config.json"),
    "best definitions": (
        ("eval", "--model", "{model}", "--tasks", "text", "--limit", "2", "--budget", "8", "--method",
         "best", "--method-args", "definitions={copy}/best.json"),
        "best.json",
    ),
    "continual run.json": (SOUND["continual train"][:3] + ("{copy}", *SOUND["continual train"][4:]), "run.json"),
    "wings run.json": (SOUND["train-wings train"][:7] + ("{copy}", *SOUND["train-wings train"][8:]), "run.json"),
    "experiment.json": (("continual", "compare", "{copy}", "--results", "{new}/results", "--steps", "1",
                         "--test-per-class", "1", "--seeds", "1", "--only-write"), "experiment.json"),
}  # fmt: skip
# an empty log of a run that was killed at once holds no rows: the run goes on
GOES_ON = {("eval samples.jsonl", "")}


def cases() -> Iterator[Case]:
    """Every input of the tables."""
    yield from _of_options()
    for command, places in POSITIONAL.items():
        for place, values in places.items():
            for value in values:
                words = list(SOUND[command])
                words[place] = value
                yield Case(
                    f"{command} argument {place} {_short(value)}",
                    tuple(words),
                    (*_names(value), *CALLED.get((command, place), ())),
                )
    for name, (arguments, file) in DAMAGED.items():
        for text in TEXTS:
            yield Case(
                f"{name} {_short(text)}", arguments, (file, "{copy}"), _damage(file, text),
                right=(name, text) in GOES_ON,
            )  # fmt: skip
    yield from _rows()
    yield from _more()


def _of_options() -> Iterator[Case]:
    for command, words in SOUND.items():
        for option in _options_of(command):
            own = words
            if command == "eval" and option in ("--suite", "--base"):
                own = words[: words.index("--budget")]
            for value in OTHER.get((command, option), ODD.get(option, ())):
                also = ALSO.get((command, option), ())
                yield Case(
                    f"{command} {option} {_short(value)}", (*own, *also, option, value),
                    (*_names(value), *re.split(r"[=.@+]", value), option, *_plain(option)),
                    right=(command, option, value) in RIGHT,
                )  # fmt: skip
        if command != "serve":  # options of vLLM are passed on
            yield Case(f"{command} --nosuch", (*words, "--nosuch", "x"), ("--nosuch",))


def _names(value: str) -> tuple[str, ...]:
    """How a message may name a value: an empty path is the working folder."""
    return (value, f"'{value}'", *(("'.'", "Error: . ") if not value else ()))


def _plain(option: str) -> tuple[str, str]:
    """An option as words of a sentence, and as the name of an argument."""
    return option[2:].replace("-", " ").removesuffix("s"), option[2:].replace("-", "_")


def _options_of(command: str) -> list[str]:
    from typer.main import get_command

    from vlm_prune.benchmarks.cli.commands import app

    found = get_command(app)
    for word in command.split():
        found = found.commands[word]
    return [
        option.opts[0]
        for option in found.params
        if option.param_type_name == "option" and option.name != "help"
    ]


def _short(value: str) -> str:
    return repr(value if len(value) < 40 else f"{value[:12]}… ({len(value)})")


def _damage(file: str, text: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        copy = folder / "copy"
        if file in ("run.json", "experiment.json", "best.json"):
            copy.mkdir()
        else:
            shutil.copytree(folder / "run", copy)
        path = copy / file
        path.unlink(missing_ok=True)
        if text == "PIPE":
            os.mkfifo(path)
        elif text == "FOLDER":
            path.mkdir()
        else:
            # a last line without an end is one that a kill cut off
            path.write_bytes((text and f"{text}\n").encode("latin-1"))
        if file == "run.json":  # something was trained
            (copy / "log.jsonl").write_text("{}\n")

    return prepare


ROW_CHANGES: dict[str, dict[str, object]] = {
    "of another task": {"task": "iit"},
    "of another id": {"id": "text/999999"},
    "NaN": {"score": float("nan")},
    "null": {"score": None},
    "of score 7": {"score": 7.0},
    "of another score": {"score": 0.5},
    "with a text for a number": {"score": "1"},
    "infinite": {"vision_flops": float("inf")},
    "of another question": {"question": "Who are you?"},
    "of another answer": {"answer": "42"},
    "without times": {"time_ms": {}},
    "of a negative time": {"time_ms": None},
    "with tokens that are not there": {"kept": [[10**6]], "images": 1},
    "of 1e300 tokens": {"text_tokens": 1e300},
    "with an unknown key": {"nosuch": 1},
}


def _rows() -> Iterator[Case]:
    """Rows of `samples.jsonl` that are not the run's."""

    def change(changes: dict[str, object]) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            shutil.copytree(folder / "run", folder / "copy")
            log = folder / "copy" / "samples.jsonl"
            first, *others = log.read_text().splitlines(keepends=True)
            log.write_text(json.dumps(json.loads(first) | changes) + "\n" + "".join(others))

        return prepare

    def twice(other: bool) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            shutil.copytree(folder / "run", folder / "copy")
            log = folder / "copy" / "samples.jsonl"
            first = log.read_text().splitlines(keepends=True)[0]
            if other:
                first = json.dumps(json.loads(first) | {"prediction": "another"}) + "\n"
            log.write_text(log.read_text() + first)

        return prepare

    commands = {"eval": (*SOUND["eval"], "--output", "{copy}"), "report": ("report", "{copy}")}
    for command, arguments in commands.items():
        for name, changes in ROW_CHANGES.items():
            # a page shows questions, and what they cost stands in results.json
            if command == "report" and name in (
                "of another id",
                "of another question",
                "of another answer",
            ):
                continue
            yield Case(f"{command}, a row {name}", arguments, ("samples.jsonl",), change(changes))
        yield Case(f"{command}, a row twice", arguments, (), twice(False), right=True)
        yield Case(f"{command}, two rows of a question", arguments, ("samples.jsonl",), twice(True))


def _more() -> Iterator[Case]:
    """Inputs that fit no table."""

    def copy(folder: Path) -> None:
        shutil.copytree(folder / "run", folder / "copy")

    def number(key: str, value: object) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            copy(folder)
            path = folder / "copy" / "results.json"
            content = json.loads(path.read_text())
            content["overall"][key] = value
            path.write_text(json.dumps(content))

        return prepare

    for value in (1e300, -1.0, float("nan"), float("inf"), "1", None, [], 10**400):
        yield Case(f"report, accuracy {_short(str(value))}", ("report", "{copy}"), ("results.json",),
                   number("accuracy", value))  # fmt: skip
    for words, holds in (
        ((*SOUND["compare"], "--output", "{copy}"), "run of eval"),
        ((*SOUND["search"][:-2], "--output", "{copy}"), "run of eval"),
        (("eval", "--suite", "forgetting", "--model", "{model}", "--tasks", "text", "--limit", "2",
          "--output", "{copy}"), "run of eval"),
    ):  # fmt: skip
        yield Case(f"{words[0]} in a folder of eval", words, (holds,), copy)
    for changed in (("--seed", "1"), ("--limit", "3"), ("--method", "random"), ("--budget", "9")):
        yield Case(f"eval with another {changed[0]}", (*SOUND["eval"], "--output", "{copy}", *changed),
                   (changed[0][2:],), copy)  # fmt: skip
    for method, more, named in (
        ("adaptinfer", ("--method-args", "schedule=7"), "schedule"),
        ("sparsevlm", ("--method-args", "preset=[]"), "preset"),
        ("best", ("--model", "tiny", "--budget", "577"), "577"),
        ("none", ("--method-args", "step=1"), "step"),
    ):
        yield Case(f"eval, {method} of {' '.join(more)}", (*SOUND["eval"], "--method", method, *more),
                   (named,))  # fmt: skip
    yield Case("eval goes on", (*SOUND["eval"], "--output", "{copy}"), (), copy, right=True)
    yield Case("ask about a special token", ("ask", "{image}", "What is <image>?", *SOUND["ask"][3:]), (),
               right=True)  # fmt: skip
    yield Case("nothing", (), (), right=True)
    yield Case("an unknown command", ("evil",), ("evil",))
    for group in ("train-wings", "continual", "iit", "train-tiny"):
        yield Case(f"{group} alone", (group,), ("give a command",))
    for command in ("methods", "tasks", "models"):
        yield Case(f"{command} --nosuch", (command, "--nosuch"), ("--nosuch",))
    for script, words in SCRIPTS.items():
        yield Case(f"script {script} --nosuch", (*words, "--nosuch"), ("--nosuch",), script=script)
        yield Case(f"script {script} {words}", words, _names(words[-1]), script=script)
        yield Case(f"script {script} --help", ("--help",), (), right=True, script=script)
    for command in ("ask", "map", "report", "export", "serve", "iit build"):
        yield Case(f"{command} without arguments", tuple(command.split()), ("Missing",))
    for command in SOUND:
        yield Case(f"{command} --help", (*command.split(), "--help"), (), right=True)
    yield Case("--version", ("--version",), (), right=True)


# --- the folder of inputs


def make_folder(folder: Path) -> None:
    """Everything that the cases name."""
    import torch
    from PIL import Image
    from tiny_families import Tiny

    (folder / "images").mkdir()
    (folder / "empty").mkdir()
    Image.new("RGB", (60, 60), "red").save(folder / "image.png")
    shutil.copy(folder / "image.png", folder / "images" / "a.png")
    whole = (folder / "image.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:60])
    (folder / "text.png").write_text("no image")
    Image.new("L", (1, 60_000)).save(folder / "deep.png")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind("socket")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "nested.json").write_text("[" * 100_000)
    (folder / "null.json").write_text("null")
    (folder / "empty.json").write_text("")
    (folder / "rows.json").write_text('[{"id": 1}, 7, null]')
    (folder / "csv.csv").write_text("nothing\n1\n")
    (folder / "odd-schedule.json").write_text('{"layers": "7", "places": [3, 1], "shares": [NaN]}')
    talk = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "yes"}]
    data = [{"id": "a", "image": "a.png", "conversations": talk}]
    (folder / "data.json").write_text(json.dumps(data))
    tiny = Tiny("llava")
    tiny.model.save_pretrained(folder / "model")
    tiny.processor.save_pretrained(folder / "model")
    for name, change in (
        ("bert", {"model_type": "bert"}), ("untyped", {"model_type": None}), ("no-template", {}), ("cut", {}),
    ):  # fmt: skip
        shutil.copytree(folder / "model", folder / name)
        config = json.loads((folder / name / "config.json").read_text()) | change
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "no-template" / "chat_template.jinja").unlink()
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"wings": []}')
    turn = {"source": "mmlu", "subject": "a", "question": "Red?", "options": ["yes", "no"], "answer": "A",
            "image": None}  # fmt: skip
    for name, text in (
        ("iit", json.dumps({"id": "T/0000", "setting": "T", "turns": [turn]}) + "\n"), ("iit-empty", ""),
        ("iit-null", "null\n"), ("iit-nested", "[" * 100_000 + "\n"),
    ):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "iit.jsonl").write_text(text)
    torch.manual_seed(0)
    words = [word.replace("{model}", str(folder / "model")) for word in SOUND["eval"]]
    argv, sys.argv = sys.argv, ["vlm-prune", *words, "--output", str(folder / "run")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        run_script()
    sys.argv = argv
    assert (folder / "run" / "results.json").is_file()


NAMED = {"data": "data.json", "image": "image.png", "csv": "csv.csv"}


def filled(word: str, folder: Path, port: int) -> str:
    """A word of a command line with paths for names in braces."""

    def path(found: re.Match[str]) -> str:
        name = found[1]
        return str(port) if name == "taken" else str(folder / NAMED.get(name, name))

    return re.sub(r"\{([\w.-]+)\}", path, word)


# --- meeting them


def meet(case: Case, folder: Path, port: int) -> Outcome:
    """Run one case in this process, which its end does not end."""
    for name in ("new", "copy"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if case.prepare is not None:
        case.prepare(folder)
    before = set(os.listdir(folder / "work"))
    out, err = io.StringIO(), io.StringIO()
    culprits = tuple(filled(word, folder, port) for word in case.culprits)
    kind, why, code = "", "", None
    name = f"{ROOT}/scripts/{case.script}.py" if case.script else "vlm-prune"
    argv, sys.argv = sys.argv, [name, *(filled(word, folder, port) for word in case.arguments)]
    try:
        with (
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
            contextlib.chdir(folder / "work"),
        ):  # fmt: skip
            if case.script:
                runpy.run_path(name, run_name="__main__")
            else:
                run_script()
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # noqa: BLE001 - whatever it is, it is what the table counts
        kind = "traceback"
        err.write(traceback.format_exc())
    finally:
        sys.argv = argv
    left = set(os.listdir(folder / "work")) - before
    if not kind:
        kind, why = judged(case, code, out.getvalue(), err.getvalue(), culprits)
    if left and not case.right:
        kind = "silent" if kind in ("clear", "unclear") else kind
        err.write(f"[left behind: {sorted(left)}]")
        for name in left:
            path = folder / "work" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Outcome(case, kind, code, out.getvalue(), err.getvalue(), why)


def meet_apart(case: Case, folder: Path, port: int) -> Outcome:
    """Run one case in a fork of this process, and measure what that took."""
    answer, written = folder / "outcome.json", folder / "written.txt"
    for path in (answer, written):
        path.unlink(missing_ok=True)
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE_S, PATIENCE_S))
        output = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            found = meet(case, folder, port)
            answer.write_text(
                json.dumps([found.kind, str(found.code), found.out, found.err, found.why])
            )
        finally:
            os._exit(0)
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() - start > PATIENCE_WALL_S:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    seconds, usage = time.monotonic() - start, ended[2]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if answer.is_file():
        kind, code, out, err, why = json.loads(answer.read_text())
        other = written.read_text(errors="replace")
        if other.strip() and not case.right and kind == "clear":  # past Python's own streams
            kind, why, err = "unclear", "more on the terminal", err + other
    else:
        kind, code, out, err, why = "endless", ended[1], "", written.read_text(), "killed"
    return Outcome(
        case, kind, code, out, err, why, seconds, usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
    )  # fmt: skip


def judged(
    case: Case, code: object, out: str, err: str, culprits: tuple[str, ...]
) -> tuple[str, str]:
    """What kind an end is, and why where it is unclear."""
    if "Traceback (most recent call last)" in out + err:
        return "traceback", ""
    if case.right:
        return ("clear" if code in (0, None) else "refused"), ""
    if code in (0, None):
        return "silent", ""
    why = unclear(err, code, culprits)
    return ("unclear" if why else "clear"), why


def unclear(err: str, code: object, culprits: tuple[str, ...]) -> str:
    """Why a refusal is unclear; nothing where it is clear.

    It is clear where its status is 2 and standard error holds one line, of at most 400 characters
    beside long values, that begins with `Error: `, names what was given or the option that it was
    given for, has none of Python's own words, and says what would be right or what is wrong.
    """
    lines = err.strip().splitlines()
    if code != 2:
        return f"status {code}"
    if len(lines) != 1 or not lines[0].startswith("Error: "):
        return f"{len(lines)} lines"
    line = lines[0]
    if len(line) - max(map(len, culprits)) > LONGEST_LINE:
        return f"{len(line)} characters"
    words = {
        part
        for word in culprits
        for part in (word, word[:60], Path(word).name, repr(word)[1:-1][:60])
    }
    words |= {str(Path(word).parent) for word in culprits if len(Path(word).parts) > 2}
    if not any(len(word) > 1 and word in line for word in words):
        return "does not name what was given"
    if found := INTERNAL.search(line):
        return f"says {found[0]}"
    if not ADVICE.search(line):
        return "does not say what would be right"
    return ""


def select(words: list[str]) -> list[Case]:
    """The cases whose name has one of the words; all without words."""
    found = list(cases())
    names = Counter(case.name for case in found)
    assert not [name for name, count in names.items() if count > 1], names.most_common(3)
    return [case for case in found if not words or any(word in case.name for word in words)]


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[int]:
    """Make the folder of inputs; gives a port that is taken during the block."""
    make_folder(folder)
    (folder / "work").mkdir()
    execute, os.execv = os.execv, lambda *_: sys.exit(0)  # a server that starts is a success
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        try:
            yield taken.getsockname()[1]
        finally:
            os.execv = execute


def run(chosen: list[Case], tell: Callable[[Outcome], None]) -> list[Outcome]:
    """Meet the cases one after the other in a new folder; `tell` is told each outcome."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as name, prepared(Path(name)) as port:
        for case in chosen:
            outcomes.append(meet_apart(case, Path(name), port))
            tell(outcomes[-1])
    return outcomes


def few() -> list[Case]:
    """A case of each kind, cheap enough for the default tests: each option, argument and file once.

    Outputs that are not below the folder of inputs are left to users without rights to them.
    """
    found: dict[tuple[str, ...], Case] = {}
    for case in select([]):
        if {"/", "/dev/null", "/proc/x/y"} & set(case.arguments) or "train-tiny" in case.name:
            continue
        what, _, value = case.name.partition(" --" if " --" in case.name else " '")
        option = value.partition(" ")[0]
        if case.prepare is not None:
            key: tuple[str, ...] = (case.name,)
            if "null" not in case.name and "PIPE" not in case.name and what in DAMAGED:
                continue
        else:
            key = (option,) if " --" in case.name and option != "help" else (what,)
        found.setdefault(key, case)
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of names")
    parser.add_argument("--verbose", action="store_true", help="show every case")
    arguments = parser.parse_args()
    if os.geteuid() == 0:
        parser.error(
            "some inputs name / and devices as outputs; run it as a user without rights to them"
        )

    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()

    def tell(outcome: Outcome) -> None:
        if arguments.verbose or outcome.kind != "clear":
            said = (outcome.err or outcome.out).strip()
            said = said[-900:] if outcome.kind == "traceback" else said[:300]
            print(
                f"{outcome.kind:10} {outcome.seconds:5.1f} s {outcome.cpu:5.1f} s {outcome.memory / 1e9:4.2f} GB"
                f"  {outcome.case.name}  {outcome.why}\n    {said}",
                flush=True,
            )

    outcomes = run(select(arguments.words), tell)
    refused = [one for one in outcomes if not one.case.right]
    kinds = Counter(one.kind for one in outcomes)
    slowest = max(refused, key=lambda one: one.seconds)
    busiest = max(refused, key=lambda one: one.cpu)
    largest = max(refused, key=lambda one: one.memory)
    share = kinds["unclear"] / len(outcomes)
    print(f"\n{len(outcomes)} inputs, {len(refused)} of them wrong")
    for kind in ("clear", "unclear", "silent", "refused", "traceback", "endless"):
        print(f"{kind:10} {kinds[kind]}")
    print(f"slowest refusal {slowest.seconds:.1f} s ({slowest.case.name})")
    print(f"most processor time {busiest.cpu:.1f} s ({busiest.case.name})")
    print(f"most memory {largest.memory / 1e9:.2f} GB ({largest.case.name})")
    bad = kinds["silent"] + kinds["refused"] + kinds["traceback"] + kinds["endless"]
    met = (
        not bad
        and share <= MOST_UNCLEAR
        and slowest.seconds <= SLOWEST_S
        and largest.memory <= MOST_BYTES
    )
    print(f"unclear {100 * share:.1f} %; goals {'met' if met else 'not met'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
