"""The eight benchmarks that conversations are built from, in the formats of their public copies."""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_prune.benchmarks.experiments.iit.files import SUFFIXES, FileRow, read_source_rows
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.registry import Registry

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Item:
    """One multiple-choice question; `place` is its file and row, where its image is, if any.

    `root` is the file's folder, from which the row's own names start.
    """

    source: str
    subject: str
    question: str
    options: tuple[str, ...]
    answer: str
    visual: bool
    place: tuple[Path, int]
    root: DataRoot


Parsed = tuple[str, str, list[str], str]


@dataclass(frozen=True)
class Source:
    """A benchmark.

    Args:
        hub: the data set's name, as lm-eval or lmms-eval loads it.
        files: globs of a copy's test files, the first that fits counts.
        parse: subject, question, options and letter of a row; None for a row that does not serve.
        visual: whether questions are about an image.
    """

    hub: str
    files: tuple[str, ...]
    parse: Callable[[FileRow], Parsed | None]
    visual: bool = False


def _mmlu(row: FileRow) -> Parsed | None:
    return row["subject"], row["question"], list(row["choices"]), LETTERS[int(row["answer"])]


def _cmmlu(row: FileRow) -> Parsed | None:
    return row["subject"], row["Question"], [row[c] for c in "ABCD"], row["Answer"].strip()


def _openbookqa(row: FileRow) -> Parsed | None:
    question = row.get("question")
    if isinstance(question, dict):  # the authors' JSON lines
        labels = [choice["label"] for choice in question["choices"]]
        options, stem = [choice["text"] for choice in question["choices"]], question["stem"]
    else:
        labels, options = list(row["choices"]["label"]), list(row["choices"]["text"])
        stem = row["question_stem"]
    return "elementary science", stem, options, LETTERS[labels.index(row["answerKey"].strip())]


def _hellaswag(row: FileRow) -> Parsed | None:
    if row["label"] in ("", None):
        return None
    question = f"Which ending fits? {row['ctx']}"
    return row["activity_label"], question, list(row["endings"]), LETTERS[int(row["label"])]


def _mmmu(row: FileRow) -> Parsed | None:
    options = row["options"]
    options = ast.literal_eval(options) if isinstance(options, str) else list(options)
    whole = row["question"] + " ".join(options)
    if row["question_type"] != "multiple-choice" or set(re.findall(r"<image \d+>", whole)) != {
        "<image 1>"
    }:
        return None
    if any("<image" in option for option in options):
        return None
    subject = re.sub(r"^[a-z]+_|_\d+$", "", row["id"])
    question = " ".join(row["question"].replace("<image 1>", " ").split())
    return subject, question, options, row["answer"].strip()


def _mmbench(row: FileRow) -> Parsed | None:
    options = [str(row[c]) for c in "ABCD" if row.get(c) not in (None, "", "nan")]
    if row.get("answer") not in tuple(LETTERS[: len(options)]):
        return None
    hint = row.get("hint")
    lead = "" if hint in (None, "", "nan") else f"{hint} "
    return str(row.get("category") or ""), f"{lead}{row['question']}", options, row["answer"]


def _seed(row: FileRow) -> Parsed | None:
    if row["data_type"] != "image":
        return None
    options = [row[f"choice_{c}"] for c in "abcd"]
    return f"type {row['question_type_id']}", row["question"], options, row["answer"].strip()


def _ai2d(row: FileRow) -> Parsed | None:
    return "science diagrams", row["question"], list(row["options"]), LETTERS[int(row["answer"])]


SOURCES: Registry[Source] = Registry(
    "source",
    {
        "mmlu": Source("cais/mmlu", ("all/test*", "**/*test*"), _mmlu),
        "cmmlu": Source("haonan-li/cmmlu", ("**/*.zip", "**/test/*", "**/*test*"), _cmmlu),
        "openbookqa": Source("allenai/openbookqa", ("main/test*", "**/*test*"), _openbookqa),
        "hellaswag": Source("Rowan/hellaswag", ("**/*val*",), _hellaswag),
        "mmmu": Source("lmms-lab/MMMU", ("**/*validation*",), _mmmu, visual=True),
        "mmbench": Source("lmms-lab/MMBench", ("en/dev*", "**/*dev*"), _mmbench, visual=True),
        "seed": Source("lmms-lab/SEED-Bench", ("**/*test*",), _seed, visual=True),
        "ai2d": Source("lmms-lab/ai2d", ("**/*test*",), _ai2d, visual=True),
    },
)


def files_of(
    name: str, where: str | None, allow_outside: bool = False
) -> list[tuple[Path, DataRoot]]:
    """Returns a source's test files, each with its folder as the root of what its rows name.

    Args:
        name: of the source.
        where: a file, a folder of a local copy, or a hub name; None is the source's own.
        allow_outside: whether files and rows may lead out of that folder.

    Raises:
        InputError: if there are none, or one leads out of the folder.
    """
    source = SOURCES[name]
    path = Path(where) if where else Path(source.hub)
    if path.is_file():
        return [(path, DataRoot(path.parent, allow_outside))]
    top = path
    if not path.is_dir():
        path = _download(where or source.hub, source)
        top = path.parents[1]  # the Hub's cache links into another folder of the same data set
    root = DataRoot(path, allow_outside, top)
    for pattern in (*source.files, "**/*"):
        found = sorted(p for p in path.glob(pattern) if p.suffix in SUFFIXES and p.is_file())
        if found:
            for file in found:
                root.path(file.relative_to(path))
            return [(p, root.below(str(p.parent.relative_to(path)))) for p in found]
    raise InputError(f"{path} holds no {', '.join(SUFFIXES)} file for {name}")


def _download(hub: str, source: Source) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [pattern.replace("**/", "*") for pattern in source.files]
    try:
        return Path(snapshot_download(hub, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # every kind of network, name and permission trouble
        raise InputError(
            f"{hub!r} is neither a path nor a data set that loads: {first_line(error)}"
        ) from error


def read_source(name: str, where: str | None = None, allow_outside: bool = False) -> list[Item]:
    """Returns all questions of a source that have one right letter and, if visual, one image.

    Args:
        name: of the source.
        where: a file, a folder of a local copy, or a hub name; None is the source's own.
        allow_outside: whether files and rows may lead out of that folder.

    Raises:
        InputError: if its files are missing, in another format, or lead out of their folder.
    """
    source, items = SOURCES[name], []
    for path, root in files_of(name, where, allow_outside):
        for number, row in enumerate(read_source_rows(path, images=False)):
            try:
                parsed = source.parse(row)
                if parsed is None:
                    continue
                subject, question, options, answer = parsed
                if answer in tuple(LETTERS[: len(options)]):
                    items.append(
                        Item(
                            name, str(subject), question.strip(), tuple(map(str, options)), answer,
                            source.visual, (path, number), root,
                        )
                    )  # fmt: skip
            except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
                raise InputError(
                    f"{path}, row {number}, is not in the format of {name}: "
                    f"{type(error).__name__} {error}"
                ) from error
    if not items:
        raise InputError(f"{name} has no question that serves in {where or source.hub}")
    return items
