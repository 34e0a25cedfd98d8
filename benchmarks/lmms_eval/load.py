"""lmms-eval's task objects, their data from a local copy or the Hub, and what stands against it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

from vlm_prune.benchmarks.lmms_eval.catalog import catalog, settings
from vlm_prune.benchmarks.lmms_eval.embedded import EmbeddedTask
from vlm_prune.benchmarks.lmms_eval.local import folder_of, load_split
from vlm_prune.benchmarks.lmms_eval.readable import image_columns, readable
from vlm_prune.vlm.common.errors import InputError, first_line

KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def load_task(
    name: str,
    data_root: Path | None,
    seed: int = 0,
    split: str = "test",
    limit: int | None = None,
) -> Any:
    """A task with its data; seed and split are those of embedded tasks.

    Its `unreadable` names the rows left out, among the first `limit`, whose images cannot be read.

    Raises:
        InputError: if it needs a judge, packages or data that are not there.
    """
    config = settings(name)
    if "class" in config:
        embedded = config["class"] is EmbeddedTask
        stream = {"dataset_kwargs": {"seed": seed, "split": split}} if embedded else {}
        return config["class"](config=config | stream)
    _check_judge(name, config)
    generates = str(config.get("output_type", "generate_until")).startswith("generate")
    kind = _ChatTask if generates else _SimpleTask
    return kind.with_data(config, data_root, limit)


def _judged(config: dict[str, Any]) -> bool:
    """Whether another model scores the replies, as far as metrics and metadata tell."""
    metrics = [str(metric.get("metric")) for metric in config.get("metric_list") or []]
    metadata = config.get("metadata")
    named = isinstance(metadata, dict) and "gpt_eval_model_name" in metadata
    named = named or any(word in name for name in metrics for word in ("gpt", "llm", "judge"))
    return named and not str(config.get("task")).endswith("_static")


def _check_judge(name: str, config: dict[str, Any]) -> None:
    if not _judged(config) or any(os.environ.get(key) for key in KEYS):
        return
    twin = f"{name}_static"
    instead = f", or run {twin}" if twin in catalog().all_tasks else ""
    raise InputError(f"task {name!r} is scored by a judge model; set {KEYS[0]}{instead}")


class _DataTask(ConfigurableTask):  # type: ignore[misc]
    """Loads from `data_root` where it holds the data set, and says clearly what is missing."""

    data_root: Path | None = None
    limit: int | None = None

    @classmethod
    def with_data(cls, config: dict[str, Any], data_root: Path | None, limit: int | None) -> Any:
        own: dict[str, Any] = {"data_root": data_root, "limit": limit}
        if not _judged(config):  # a judge may fail and be asked again; a wrong row stays wrong
            own["process_results"] = ConfigurableTask.process_results.__wrapped__
        bound = type(cls.__name__, (cls,), own)
        if config.get("num_fewshot") and not config.get("fewshot_config"):
            # without a configuration lmms-eval 0.7.3 makes no sampler, and then asks for it
            config = config | {"fewshot_config": {"sampler": "default"}}
        metrics = config.get("metric_list") or []
        scored = [metric for metric in metrics if metric.get("metric") != "submission"]
        if scored:  # a file for a server, which fails where a reply does not fit into it
            config = config | {"metric_list": scored}
        return bound(config=config)

    def download(self, dataset_kwargs: Any = None) -> None:
        folder = folder_of(self.data_root, self.DATASET_PATH) if self.data_root else None
        if folder is not None:
            self._from(folder)
        else:
            self._from_hub(dataset_kwargs)
        self._leave_out_unreadable()

    def _leave_out_unreadable(self) -> None:
        split = self.config.test_split or self.config.validation_split
        whole = self.dataset[split]
        rows, self.unreadable = readable(whole, self.limit)
        if not self.unreadable:
            return
        kept = [number for number in range(len(whole)) if number not in self.unreadable]
        if self.dataset_no_image is not self.dataset:
            self.dataset_no_image[split] = self.dataset_no_image[split].select(kept)
        self.dataset[split] = rows

    def _from_hub(self, dataset_kwargs: Any) -> None:
        options = dict(dataset_kwargs or {})
        if options.get("token") is True:  # public data sets need none
            options.pop("token")
        options.pop("trust_remote_code", None)
        download: Callable[..., None] = ConfigurableTask.download.__wrapped__  # without retries
        try:
            download(self, options)
        except Exception as error:  # the Hub, datasets, pyarrow and the network each have theirs
            raise InputError(self._why(error)) from error

    def _from(self, folder: Path) -> None:
        import datasets

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
            found = {split: self.config.process_docs(rows) for split, rows in found.items()}
        self.dataset = datasets.DatasetDict(found)
        self.dataset_no_image = self.dataset
        if not self.config.process_results_use_image:
            self.dataset_no_image = datasets.DatasetDict(
                {split: rows.remove_columns(image_columns(rows)) for split, rows in found.items()}
            )

    def _why(self, error: Exception) -> str:
        """One line: what could not be loaded, why, and what to do."""
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


def _with_gqa_images(questions: Any, folder: Path, split: str) -> Any:
    """GQA keeps its images apart: `testdev_balanced_images`, or `images/<imageId>.jpg`."""
    import datasets

    if (folder / "images").is_dir():
        paths = [str(folder / "images" / f"{number}.jpg") for number in questions["imageId"]]
        lost = next((path for path in paths if not Path(path).is_file()), None)
        if lost:
            raise InputError(f"{folder} lacks the image {lost}; download it again")
        return questions.add_column("image", paths).cast_column("image", datasets.Image())
    pictures = load_split(folder, "testdev_balanced_images", split)
    place = {number: row for row, number in enumerate(pictures["id"])}
    lost = next((number for number in questions["imageId"] if number not in place), None)
    if lost:
        raise InputError(f"{folder} lacks the image {lost!r}; download it again")
    raw = pictures.cast_column("image", datasets.Image(decode=False))
    chosen = raw.select([place[number] for number in questions["imageId"]])
    column = chosen["image"]
    return questions.add_column("image", list(column)).cast_column("image", datasets.Image())
