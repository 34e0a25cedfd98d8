"""The embedded tasks in lmms-eval's form: the same samples, prompts and scores."""

from collections.abc import Iterator
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask

from vlm_prune.benchmarks.tasks import TASKS, Sample, Split

DOCUMENTS = 500


class Documents:
    """The first samples of a task's stream, each made when it is asked for.

    Args:
        task: name of the embedded task.
        seed: of its questions.
        split: that they are drawn from.
        count: how many there are.
    """

    features = dict.fromkeys(("index", "question", "answer", "category"))

    def __init__(
        self, task: str, seed: int = 0, split: Split = "test", count: int = DOCUMENTS
    ) -> None:
        self.task, self.seed, self.split, self.count = task, seed, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample = self.sample(index)
        return {
            "index": index,
            "question": sample.turns[-1].text,
            "answer": sample.answer,
            "category": sample.subset,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def sample(self, index: int) -> Sample:
        return TASKS[self.task].sample(index, self.seed, self.split)


class EmbeddedTask(ConfigurableMessagesTask):  # type: ignore[misc]
    """`dataset_path` of the YAML file names the embedded task, `dataset_kwargs` seed, split and count."""

    def __init__(self, config: dict[str, Any], model_name: str | None = None) -> None:
        options = {key: value for key, value in config.items() if key != "class"}
        self.documents = Documents(options["dataset_path"], **(options.get("dataset_kwargs") or {}))
        super().__init__(config=options, model_name=model_name)

    def download(self, dataset_kwargs: Any = None) -> None:
        """Uses the embedded task's questions; nothing is fetched."""
        self.dataset = self.dataset_no_image = {"test": self.documents}

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        """Returns the question of a document."""
        return str(doc["question"])

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        """Returns the right answer."""
        return str(doc["answer"])

    def doc_to_messages(self, doc: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        """Returns the conversation with its images."""
        sample = self.documents.sample(doc["index"])
        messages, images = sample.messages(), iter(sample.images)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["url"] = next(images)
        return messages

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        """Scores the first reply by the embedded task's own metric."""
        score = TASKS[self.documents.task].score
        return {"exact_match": score(results[0].strip(), doc["answer"])}
