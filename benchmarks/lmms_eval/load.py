"""lmms-eval's task objects, their data from a local copy or the Hub, and what stands against it."""

import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

from vlm_prune.benchmarks.lmms_eval.catalog import catalog, settings
from vlm_prune.benchmarks.lmms_eval.embedded import EmbeddedTask
from vlm_prune.benchmarks.lmms_eval.local import folder_of, load_split
from vlm_prune.benchmarks.lmms_eval.rows import (
    Check,
    image_fields,
    readable,
    row_images,
    whole_groups,
)
from vlm_prune.benchmarks.lmms_eval.videos import FILES, missing_videos, video_of
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.paths import DataRoot

KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
Key = Callable[[dict[str, Any]], Hashable]
# Tasks whose metrics compare rows: rows of one key are scored together, and so asked together
GROUPS: dict[str, Key] = {
    "mme": lambda row: (row["category"], row["question_id"]),
    "mmvp": lambda row: max(0, int(row.get("Index") or row.get("index") or 0) - 1) // 2,
    "hallusion_bench_image": lambda row: (row["category"], row["subcategory"], row["set_id"]),
    "ConBench": lambda row: row["image_id"],
    "3dsrbench_circular": lambda row: row["qid"][:8],
    "naturalbench": lambda row: "all",
}
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def load_task(
    name: str,
    data_root: DataRoot | Path | None,
    seed: int = 0,
    split: str = "test",
    limit: int | None = None,
    check: Check = lambda image: None,
) -> Any:
    """Returns a task with its data, whose `unreadable` names the rows left out and why.

    Args:
        name: of a task of lmms-eval.
        data_root: copies of data sets; what it does not hold comes from the Hub.
        seed: of an embedded task.
        split: of an embedded task.
        limit: how many rows are going to be asked; where a metric needs several rows at once, the
            task has no others. None for all, of an embedded task 500.
        check: raises `InputError` for an image that the model does not take.

    Raises:
        InputError: if it needs a judge, packages or data that are not there.
    """
    config = settings(name)
    if "class" in config:
        embedded = config["class"] is EmbeddedTask
        stream: dict[str, object] = {"seed": seed, "split": split}
        if limit is not None:
            stream["count"] = limit
        return config["class"](config=config | ({"dataset_kwargs": stream} if embedded else {}))
    _check_judge(name, config)
    generates = str(config.get("output_type", "generate_until")).startswith("generate")
    kind = _ChatTask if generates else _SimpleTask
    root = None if data_root is None else DataRoot.of(data_root)
    return kind.with_data(config, root, limit, check)


def _judged(config: dict[str, Any]) -> bool:
    """Returns whether another model scores the replies, as far as metrics and metadata tell."""
    metrics = [str(metric.get("metric")) for metric in config.get("metric_list") or []]
    metadata = config.get("metadata")
    named = isinstance(metadata, dict) and "gpt_eval_model_name" in metadata
    named = named or any(word in name for name in metrics for word in ("gpt", "llm", "judge"))
    return named and not str(config.get("task")).endswith("_static")


def _check_judge(name: str, config: dict[str, Any]) -> None:
    if not _judged(config) or any(os.environ.get(key) for key in KEYS):
        return
    static = f"{name}_static"
    instead = f", or run {static}" if static in catalog().all_tasks else ""
    raise InputError(f"task {name!r} is scored by a judge model; set {KEYS[0]}{instead}")


class _DataTask(ConfigurableTask):  # type: ignore[misc]
    """Loads from `data_root` where it holds the data set, and says clearly what is missing."""

    data_root: DataRoot | None = None
    videos: DataRoot | None = None
    limit: int | None = None
    check: Check
    dataset: Any
    dataset_no_image: Any

    @classmethod
    def with_data(
        cls, config: dict[str, Any], data_root: DataRoot | None, limit: int | None, check: Check
    ) -> Any:
        """Returns the task, bound to local data and to a check of its images.

        Args:
            config: the task's.
            data_root: copies of data sets, or None.
            limit: rows that will be asked.
            check: raises `InputError` for an image that the model cannot take.
        """
        attributes = {"data_root": data_root, "limit": limit, "check": staticmethod(check)}
        if not _judged(config):  # a judge may fail and be asked again; a wrong row stays wrong
            attributes["process_results"] = ConfigurableTask.process_results.__wrapped__
        bound = type(cls.__name__, (cls,), attributes)
        if config.get("num_fewshot") and not config.get("fewshot_config"):
            # without a configuration lmms-eval 0.7.3 makes no sampler, and then asks for it
            config = config | {"fewshot_config": {"sampler": "default"}}
        metrics = config.get("metric_list") or []
        scored = [metric for metric in metrics if metric.get("metric") != "submission"]
        if metrics and not scored:  # a file for a server, or replies sent to one
            raise InputError(
                f"task {config['task']!r} has no answers to score; run its validation set"
            )
        if metrics:  # such a file fails where a reply does not fit into it
            config = config | {"metric_list": scored}
        return bound(config=config)

    def doc_to_visual(self, doc: dict[str, Any]) -> Any:
        """Returns the images of a row, or the names of its video files."""
        if self.videos is not None:
            return [str(video_of(doc, self, self.videos))]
        try:
            return super().doc_to_visual(doc)
        except SystemExit as error:  # how tasks say that a video is missing
            raise InputError(first_line(error)) from error

    def download(self, dataset_kwargs: Any = None) -> None:
        folder = folder_of(self.data_root, self.DATASET_PATH) if self.data_root else None
        if folder is not None:
            self._from(folder)
        else:
            self._from_hub(dataset_kwargs)
        split = self.config.test_split or self.config.validation_split
        key = GROUPS.get(self.config.task)
        if key is not None:
            self._keep_whole_groups(split, key)
            self.limit = None
        whole = self.dataset[split]
        _, self.unreadable = readable(whole, self.limit, self.check)
        if folder is not None and self.DATASET_PATH in FILES:
            self.videos = folder
            self.unreadable |= missing_videos(whole, self, folder, self.limit)
        if self.unreadable:
            broken = {key(row) for row in self._texts(split, self.unreadable)} if key else set()
            self._select(
                split,
                [
                    number
                    for number, row in enumerate(self._texts(split))
                    if number not in self.unreadable and not (key and key(row) in broken)
                ],
            )

    def _texts(self, split: str, numbers: Iterable[int] | None = None) -> Any:
        """Returns the rows of a split without their images."""
        rows = self.dataset[split]
        texts = rows.remove_columns(image_fields(rows))
        return texts if numbers is None else texts.select(list(numbers))

    def _keep_whole_groups(self, split: str, key: Key) -> None:
        if self.limit is not None and self.limit < len(self.dataset[split]):
            self._select(split, whole_groups(list(map(key, self._texts(split))), self.limit))

    def _select(self, split: str, numbers: list[int]) -> None:
        if self.dataset_no_image is not self.dataset:
            self.dataset_no_image[split] = self.dataset_no_image[split].select(numbers)
        self.dataset[split] = self.dataset[split].select(numbers)

    def _from_hub(self, dataset_kwargs: Any) -> None:
        options = dict(dataset_kwargs or {})
        if options.get("token") is True:  # public data sets need none
            options.pop("token")
        options.pop("trust_remote_code", None)
        download: Callable[..., None] = ConfigurableTask.download.__wrapped__  # without retries
        try:
            download(self, options)
        except Exception as error:  # the Hub, datasets, pyarrow and the network each have theirs
            raise InputError(self._reason(error)) from error
        shared = self.dataset_no_image is self.dataset
        cache = DataRoot(Path(datasets.config.HF_CACHE_HOME), allow_outside=self.allow_outside)
        for split, rows in self.dataset.items():
            self.dataset[split] = row_images(rows, cache, named=False)
        if shared:
            self.dataset_no_image = self.dataset

    @property
    def allow_outside(self) -> bool:
        return self.data_root is not None and self.data_root.allow_outside

    def _from(self, folder: DataRoot) -> None:

        wanted = {getattr(self.config, key) for key in SPLITS} - {None}
        tested = self.config.test_split or self.config.validation_split
        found = {}
        for split in wanted:
            try:
                found[split] = load_split(folder, self.DATASET_NAME, split)
            except InputError:
                if split in (tested, self.config.fewshot_split):
                    raise
        if (
            self.DATASET_NAME == "testdev_balanced_instructions"
            and "image" not in found[tested].features
        ):
            found[tested] = _with_gqa_images(found[tested], folder, tested)
        elif self.config.process_docs is not None and "GQA" not in self.DATASET_PATH:
            try:
                found = {split: self.config.process_docs(rows) for split, rows in found.items()}
            except Exception as error:
                raise InputError(
                    f"the task cannot rewrite the rows of {folder.folder} ({first_line(error)}); "
                    "give every column values of one type, as the Hub's copy has them"
                ) from error
        self.dataset = datasets.DatasetDict(found)
        self.dataset_no_image = self.dataset
        if not self.config.process_results_use_image:
            self.dataset_no_image = datasets.DatasetDict(
                {split: rows.remove_columns(image_fields(rows)) for split, rows in found.items()}
            )

    def _reason(self, error: Exception) -> str:
        """Says in one line what could not be loaded, why, and what to do."""
        chain, cause = [], error
        while cause is not None:
            chain.append(f"{type(cause).__name__} {cause}")
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        text = " ".join(chain)
        what = f"data set {self.DATASET_PATH!r} of task {self.config.task!r}"
        name = str(self.DATASET_PATH).split("/")[-1]
        local = f"give --data-root FOLDER with a copy in FOLDER/{name}"
        if "Gated" in text or "gated" in text:
            return f"{what} is gated; accept its terms on the Hub and log in, or {local}"
        if "Token is required" in text or "LocalTokenNotFound" in text:
            return f"{what} is read with a Hub token; run 'hf auth login', or {local}"
        if any(word in text for word in ("ArrowInvalid", "Incomplete", "NonMatching", "Checksum")):
            return f"{what} is damaged or half downloaded; download it again, or {local}"
        if any(word in text for word in ("Offline", "offline", "Connect", "resolve", "Timeout")):
            return f"{what} cannot be downloaded (no connection, or offline mode); {local}"
        return f"{what} cannot be loaded ({first_line(error)}); {local}"


class _ChatTask(_DataTask, ConfigurableMessagesTask):  # type: ignore[misc]
    """Asked through messages."""


class _SimpleTask(_DataTask):
    """Scores given texts, which lmms-eval offers in simple mode alone."""


def _with_gqa_images(questions: Any, root: DataRoot, split: str) -> Any:
    """Returns GQA's questions with its images, which are kept apart.

    Images are in `testdev_balanced_images`, or are `images/<imageId>.jpg`.

    Args:
        questions: rows that name their image.
        root: folder of the data set.
        split: of the questions.

    Raises:
        InputError: if an image is missing.
    """
    folder = root.folder
    if (folder / "images").is_dir():
        names = [f"images/{number}.jpg" for number in questions["imageId"]]
        lost = next((name for name in names if not root.path(name).is_file()), None)
        if lost:
            raise InputError(f"{folder} lacks the image {folder / lost}; download it again")
        return row_images(questions.add_column("image", names), root)
    pictures = load_split(root, "testdev_balanced_images", split)
    row_of = {number: row for row, number in enumerate(pictures["id"])}
    lost = next((number for number in questions["imageId"] if number not in row_of), None)
    if lost:
        raise InputError(f"{folder} lacks the image {lost!r}; download it again")
    raw = pictures.cast_column("image", datasets.Image(decode=False))
    chosen = raw.select([row_of[number] for number in questions["imageId"]])
    column = questions.add_column("image", list(chosen["image"]))
    return row_images(column.cast_column("image", datasets.Image()), root)
