"""Folders of results: what stands in them, read and written as records."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, Self, TypedDict, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from vlm_prune.benchmarks.evaluation.records import (
    SCHEMA_VERSION,
    AnswerRow,
    FolderKind,
    FolderRecord,
    PairedRow,
    Results,
    RunConfig,
    SuiteResults,
)
from vlm_prune.benchmarks.tasks import TASKS, Sample
from vlm_prune.learners.store import adapter_digest
from vlm_prune.vlm.checkpoint import weight_stamps
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import read_bytes, read_object, write_text
from vlm_prune.vlm.common.folder import OutputFolder, check_settings, record_settings
from vlm_prune.vlm.common.records import from_json, to_json

CONFIG, ROWS, RESULTS = "config.json", "samples.jsonl", "results.json"
RERUN = "run it again"
CONTENT_OF_KIND = {
    "eval": "a run of eval",
    "compare": "the runs of compare",
    "suite": "a suite",
    "answers": "answers of a suite",
    "search": "the runs of search",
}
RecordT = TypeVar("RecordT", FolderRecord, Results, SuiteResults)
RowT = TypeVar("RowT", bound=AnswerRow)
PartT = TypeVar("PartT", bound=msgspec.Struct)


def read_versioned(path: Path, kind: type[RecordT]) -> RecordT:
    """Reads a file that says which version of its format it has.

    Raises:
        InputError: if it cannot be read, is of another version or damaged.
    """
    version = read_object(path).get("schema_version", 0)
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path} is of another version of the format ({version}, and this is "
            f"{SCHEMA_VERSION}); {RERUN} in another folder"
        )
    return from_json(read_bytes(path), kind, str(path), RERUN)


def kind_of(folder: Path) -> FolderKind | None:
    """Returns what wrote into a folder; None where nothing did.

    Raises:
        InputError: as `read_versioned` does.
    """
    path = folder / CONFIG
    return read_versioned(path, FolderRecord).kind if path.exists() else None


def check_kind(folder: Path, kind: FolderKind) -> None:
    """Raises `InputError` if another command wrote into a folder."""
    found = kind_of(folder)
    if found not in (None, kind):
        raise InputError(f"{folder} holds {CONTENT_OF_KIND[str(found)]}; give another --output")


def read_rows(path: Path, kind: type[RowT]) -> dict[str, RowT]:
    """Reads the rows of a log by the question's id; a row that is there twice counts once.

    Raises:
        InputError: if the file cannot be read, a line is damaged, or two rows of a question differ.
    """
    rows: dict[str, RowT] = {}
    for _, row in _lines(read_bytes(path), path, kind):
        _check_same(rows.setdefault(row.id, row), row, path)
    return rows


def _lines(content: bytes, path: Path, kind: type[RowT]) -> Iterator[tuple[int, RowT]]:
    """Yields the rows of a log, and where in the file each begins.

    Args:
        content: of the file.
        path: of the file, for messages.
        kind: of the rows.

    Raises:
        InputError: if a line is damaged.
    """
    start = 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        remedy = f"remove {path.parent}, and {RERUN}"
        yield start, from_json(line, kind, f"line {number} of {path}", remedy)
        start += len(line)


def _check_same(first: AnswerRow, second: AnswerRow, path: Path) -> None:
    """Raises `InputError` if two rows of a question differ."""
    if first != second:
        raise InputError(
            f"{path} has two rows of question {first.id}; remove {path.parent}, and {RERUN}"
        )


class LoggedRows(Mapping[str, RowT]):
    """The rows of a log by the question's id; each is read where it is looked up, so that none is held.

    Args:
        path: of the log.
        kind: of the rows.
    """

    def __init__(self, path: Path, kind: type[RowT]) -> None:
        self.path, self.kind = path, kind
        self.starts: dict[str, int] = {}

    def __getitem__(self, name: str) -> RowT:
        return self.read(name, self.kind)

    def __contains__(self, name: object) -> bool:
        return name in self.starts

    def __iter__(self) -> Iterator[str]:
        return iter(self.starts)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, name: str, kind: type[PartT]) -> PartT:
        """Reads the row of a question, or the part of it that a record of fewer fields has.

        Raises:
            InputError: if the file was changed meanwhile.
        """
        with self.path.open("rb") as file:
            file.seek(self.starts[name])
            line = file.readline()
        where, remedy = (
            f"the row of {name} in {self.path}",
            f"remove {self.path.parent}, and {RERUN}",
        )
        return from_json(line, kind, where, remedy)

    def find(self, content: bytes) -> None:
        """Notes where rows are in a file of this content.

        Raises:
            InputError: if a line is damaged, or two rows of a question differ.
        """
        for start, row in _lines(content, self.path, self.kind):
            if self.starts.setdefault(row.id, start) != start:
                _check_same(self[row.id], row, self.path)

    def append(self, rows: Sequence[RowT]) -> None:
        """Writes the rows of questions that have none."""
        with self.path.open("ab") as file:
            new = {row.id: to_json(row, indent=None).encode() for row in rows if row.id not in self}
            start = file.tell()
            file.write(b"".join(new.values()))
            file.flush()
            os.fsync(file.fileno())
        for name, line in new.items():
            self.starts[name] = start
            start += len(line)


def read_run(folder: Path) -> tuple[Results, list[PairedRow]]:
    """Reads results and rows of a finished run.

    Raises:
        InputError: if the run is not finished, damaged or of another version, or its rows are not
            those of its results.
    """
    if not (folder / RESULTS).exists():
        raise InputError(
            f"{folder} holds an unfinished run; the same command with the same --output finishes it"
        )
    results = read_versioned(folder / RESULTS, Results)
    rows = [
        row for row in read_rows(folder / ROWS, PairedRow).values() if row.task in results.tasks
    ]
    for name, task in results.tasks.items():
        of_task = [row for row in rows if row.task == name]
        means = [
            np.mean([getattr(row, key) for row in of_task]) if of_task else 0.0
            for key in ("score", "baseline_score")
        ]
        if len(of_task) != task.n or not np.allclose(
            means, [task.accuracy, task.baseline_accuracy]
        ):
            raise InputError(
                f"{folder / ROWS} has {len(of_task)} rows of task {name}, which are not those of "
                f"{RESULTS}; {RERUN}"
            )
    return results, rows


class GroupFolder(OutputFolder):
    """A folder for several runs of one command, each in a folder of its own.

    Raises:
        InputError: if another command wrote into it, or another process writes there.
    """

    def __init__(self, path: Path, kind: FolderKind) -> None:
        super().__init__(path)
        self.kind = kind
        with self.releasing():
            check_kind(path, kind)

    def record(self) -> None:
        """Notes whose folder this is."""
        record_settings(self.path / CONFIG, msgspec.to_builtins(FolderRecord(kind=self.kind)))


class RunFolder(Generic[RowT]):
    """`config.json`, one row per question in `samples.jsonl`, `results.json` at the end.

    One run writes to a folder at a time; of several processes of a run it is the first. A `with`
    block lets go of the folder at its end. A run that is refused before its first row leaves no
    configuration behind.

    Args:
        path: made if it is not there.
        config: what decides the results.
        row_type: of its rows.
        kind: what writes into it.
        group: the folder around it, where it is one of several runs.

    Raises:
        InputError: if another process writes there, or what is there is damaged, of another version
            or of another configuration.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        row_type: type[RowT],
        kind: FolderKind = "eval",
        group: GroupFolder | None = None,
    ) -> None:
        self.path, self.config, self.row_type, self.group = path, config, row_type, group
        # weights may change under their name
        digests = [
            None if name is None else adapter_digest(name) for name in (config.wings, config.peft)
        ]
        calibrated = [
            str(file)
            for name, file in config.variant.arguments.items()
            if name.endswith("calibration")
        ]
        self.settings = FolderRecord(
            kind=kind,
            config=config,
            adapter=digests[0],
            peft_digest=digests[1],
            checkpoint=weight_stamps(config.model) or msgspec.UNSET,
            calibration=[stamp for file in calibrated for stamp in weight_stamps(file)]
            or msgspec.UNSET,
        )
        self.rows = LoggedRows(self.log, row_type)
        self.folder: OutputFolder | None = None
        if int(os.environ.get("RANK", "0")) > 0:
            return
        self.folder = OutputFolder(path)
        with self.folder.releasing():
            check_kind(path, kind)
            if (
                not check_settings(path / CONFIG, msgspec.to_builtins(self.settings))
                and self.log.exists()
            ):
                raise InputError(f"{path} holds results without {CONFIG}; remove the folder")
            self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.folder.release()

    @property
    def log(self) -> Path:
        """Returns the file of the rows."""
        return self.path / ROWS

    def record(self) -> None:
        """Writes the configuration, once everything about the run was found to be right."""
        if self.group is not None:
            self.group.record()
        record_settings(self.path / CONFIG, msgspec.to_builtins(self.settings))

    def _read(self) -> None:
        """Finds the rows written so far; a line that a kill cut off is removed."""
        if not self.log.exists():
            return
        content = read_bytes(self.log)
        end = content.rfind(b"\n") + 1
        self.rows.find(content[:end])
        if end < len(content):
            os.truncate(self.log, end)

    def check(self, questions: "Mapping[str, QuestionFields]") -> None:
        """Raises `InputError` unless every row is of one of `questions`, by id,
        and scored as its answer is.
        """
        for row in self.rows.values():
            question = questions.get(row.id)
            if question is None or question != {name: getattr(row, name) for name in question}:
                problem = "is none of this run's questions"
            elif not _scored(row):
                problem = "has another score than its answer"
            else:
                continue
            raise InputError(f"{self.log}: row {row.id} {problem}; remove {self.path}")

    def append(self, rows: list[RowT]) -> None:
        """Adds rows of questions that have none."""
        self.record()
        self.rows.append(rows)

    def finish(self, results: Results) -> None:
        """Writes the results of all rows as the folder's `results.json`."""
        write_text(self.path / RESULTS, to_json(results))

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Returns the scores of the pruned model by task, in the order of the questions."""
        scores: dict[str, list[float]] = {}
        for name in sorted(self.rows):
            row = self.rows[name]
            scores.setdefault(row.task, []).append(row.score)
        return {task: np.array(of_task, float) for task, of_task in scores.items()}


def _scored(row: AnswerRow) -> bool:
    """Returns whether the scores of a row of an embedded task are those of its answers."""
    score = TASKS[row.task].score
    if isinstance(row, PairedRow) and row.baseline_score != score(row.baseline, row.answer):
        return False
    return row.score == score(row.prediction, row.answer)


class QuestionFields(TypedDict):
    """The part of a row that says what was asked."""

    id: str
    task: str
    subset: str
    question: str
    answer: str


def described(sample: Sample) -> QuestionFields:
    """Returns what was asked, and the right answer."""
    return {
        "id": sample.id,
        "task": sample.id.split("/")[0],
        "subset": sample.subset,
        "question": sample.turns[-1].text,
        "answer": sample.answer,
    }
