"""What a run writes: its settings, a row for each question, and its results.

A record is checked where it is read and where it is written: kinds, ranges and what must go together.
Numbers in JSON are finite; a folder of another version is refused.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Protocol

import msgspec

from vlm_prune.pruning import DecoderPruner, Pruner
from vlm_prune.pruning.registry import build, check_own
from vlm_prune.pruning.schedule import Schedule

SCHEMA_VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=0)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Interval = tuple[float, float]
Argument = bool | int | float | str | list[int | float | str] | Schedule | None
FolderKind = Literal["eval", "compare", "suite", "answers", "search"]


@dataclass(frozen=True)
class Variant:
    """A method with its budget and other hyperparameters."""

    method: str
    budget: int | float | str
    positions: str = "auto"
    arguments: dict[str, Argument] = field(default_factory=dict)

    def build(self, seed: int) -> Pruner:
        """Builds the pruner with the variant's budget, positions and hyperparameters.

        Raises:
            InputError: if there is no such method or hyperparameter, or a value is out of range.
        """
        check_own(self.arguments)
        pruner: Pruner = build(
            self.method,
            budget=self.budget, positions=self.positions, seed=seed, **self.arguments,
        )  # fmt: skip
        return pruner

    @property
    def with_positions(self) -> dict[str, Argument]:
        """Returns the hyperparameters, and the positions unless they are left to the method."""
        return self.arguments | ({} if self.positions == "auto" else {"positions": self.positions})

    def scheduled(self, schedule: Schedule) -> "Variant | None":
        """Returns the variant that cuts by `schedule`; None for a method that makes no cuts."""
        pruner = self.build(0)
        for part, key in (
            (pruner, "schedule"),
            (getattr(pruner, "inside", None), "inside.schedule"),
        ):
            if isinstance(part, DecoderPruner):
                return replace(self, arguments=self.arguments | {key: schedule})
        return None


@dataclass(frozen=True)
class RunConfig:
    """What decides a run's results; a folder holds the results of one.

    `wings` and `peft` are adapters that the pruned and the unpruned model both have; `device_map`,
    `quantization` and `attn` are those of `load`. `engine` is what answers: `hf` or `vllm`. `frames` are
    those of a video, at most; None for all of an embedded task's and 32 of a file's. `compile` is
    whether decoder layers run prompts compiled, of the pruned and of the unpruned model.
    """

    model: str
    variant: Variant
    tasks: tuple[str, ...]
    limit: int
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0
    split: Literal["train", "val", "test"] = "test"
    wings: str | None = None
    device_map: str | None = None
    quantization: str | None = None
    attn: str | None = None
    peft: str | None = None
    engine: Literal["hf", "vllm"] = "hf"
    frames: Annotated[int, msgspec.Meta(ge=1)] | None = None
    compile: bool = False


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Typed content of a file; other fields than its own are refused."""


class FolderRecord(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`config.json` of a folder: what wrote into it, for a run also with which settings.

    Args:
        kind: the command, or `answers` for one model's in a suite.
        adapter: what tells the weights of `config.wings`, which may change under its name.
        peft_digest: the same of `config.peft`.
        checkpoint: name, size and time of change of the weights of a model in a folder.
        calibration: the same of files that `vlm-prune calibrate` wrote.
    """

    kind: FolderKind
    config: RunConfig | None = None
    adapter: str | None = None
    peft_digest: str | None = None
    checkpoint: list[tuple[str, int, int]] | msgspec.UnsetType = msgspec.UNSET
    calibration: list[tuple[str, int, int]] | msgspec.UnsetType = msgspec.UNSET


class PromptRecord(Record, frozen=True):
    """The images of one prompt and their tokens, pruned.

    Args:
        images: how many there are.
        image_tokens: of each image, unpruned.
        cropped: whether the model sees only the middle of images that are not square.
        grids: rows and columns of each image's tokens; None where they are no grid over it.
        text_tokens: tokens of the prompt that are not of images.
        vision_flops: what the tower spends on all its images.
        pruned_vision_flops: the same where the method changes what the tower sees; None where it does not.
        layer_tokens: tokens of an image that each decoder layer computes, the mean over images.
        kept: indices of each image's tokens that are left after the last cut; empty where nothing
            prunes.
        densities: share of the causal half of its attention that each decoder layer computes; empty
            without sparse attention.
        chosen_density: the same without what all methods compute, the mean over layers; None where a
            method had no choice.
        video_grids: frames, rows and columns of each video's tokens, None for images; empty where the
            prompt has no video.
    """

    images: Count
    image_tokens: list[Count]
    cropped: bool
    grids: list[tuple[Count, Count] | None]
    text_tokens: Count
    vision_flops: Amount
    layer_tokens: Annotated[list[Amount], msgspec.Meta(min_length=1)]
    kept: list[list[Count]]
    densities: list[Share] = []
    chosen_density: Share | None = None
    video_grids: list[tuple[Count, Count, Count] | None] = []
    pruned_vision_flops: Amount | None = None

    def __post_init__(self) -> None:
        check_prompt(self)


class PhaseTimes(Record, frozen=True):
    """Milliseconds of one question; `decode` is all tokens after the first."""

    vision: Amount
    selection: Amount
    prefill: Amount
    decode: Amount


class PairedTimes(PhaseTimes, frozen=True):
    """The same beside those of the unpruned model, which selects nothing."""

    baseline_vision: Amount
    baseline_prefill: Amount
    baseline_decode: Amount


class Costs(Record, frozen=True):
    """A number of the unpruned and of the pruned model: FLOPs, or bytes."""

    baseline: Amount
    pruned: Amount


class AnswerRow(Record, frozen=True):
    """One model's answer to one question.

    Args:
        id: the task and the number of the question, `exist/000012`.
        subset: of the task that the question belongs to.
        answer: the right one.
        prediction: the model's.
        score: 1 for right, 0 for wrong.
        images: how many the conversation shows.
    """

    id: str
    task: str
    subset: str
    question: str
    answer: str
    prediction: str
    score: Share
    images: Count

    def __post_init__(self) -> None:
        number_of(self.id, self.task)

    @property
    def number(self) -> int:
        """Returns which question of its task this is."""
        return number_of(self.id, self.task)


class PairedRow(AnswerRow, frozen=True):
    """The unpruned and the pruned model's answers to one question, and what they cost.

    `prediction` and `score` are the pruned model's; what is not listed is as in `PromptRecord`.

    Args:
        baseline: the unpruned model's answer.
        baseline_score: and its score.
        flops: of tower and prefill.
        kv_bytes: of keys and values after the prefill.
        time_ms: by phase.
    """

    baseline: str
    baseline_score: Share
    image_tokens: list[Count]
    cropped: bool
    grids: list[tuple[Count, Count] | None]
    text_tokens: Count
    vision_flops: Amount
    layer_tokens: Annotated[list[Amount], msgspec.Meta(min_length=1)]
    kept: list[list[Count]]
    flops: Costs
    kv_bytes: Costs
    time_ms: PairedTimes
    densities: list[Share] = []
    chosen_density: Share | None = None
    video_grids: list[tuple[Count, Count, Count] | None] = []
    pruned_vision_flops: Amount | None = None

    def __post_init__(self) -> None:
        number_of(self.id, self.task)
        check_prompt(self)

    @property
    def baseline_right(self) -> bool:
        """Returns whether the unpruned model's answer counts as right."""
        return self.baseline_score >= 0.5

    @property
    def right(self) -> bool:
        """Returns whether the pruned model's answer counts as right."""
        return self.score >= 0.5

    @property
    def broken(self) -> bool:
        """Returns whether pruning turned a right answer into a wrong one."""
        return self.baseline_right and not self.right

    @property
    def fixed(self) -> bool:
        """Returns whether pruning turned a wrong answer into a right one."""
        return self.right and not self.baseline_right


class MeasuredRow(msgspec.Struct, frozen=True):
    """The part of a `PairedRow` that results are made of."""

    task: str
    score: Share
    images: Count
    baseline_score: Share
    image_tokens: list[Count]
    layer_tokens: list[Amount]
    flops: Costs
    kv_bytes: Costs
    time_ms: PairedTimes
    densities: list[Share] = []
    chosen_density: Share | None = None


class NotedImages(Protocol):
    """What a record notes of the images of a prompt, as `PromptRecord` does."""

    @property
    def images(self) -> int:
        """Returns the number of images."""

    @property
    def image_tokens(self) -> list[int]:
        """Returns the number of tokens of each image, unpruned."""

    @property
    def grids(self) -> list[tuple[int, int] | None]:
        """Returns rows and columns of each image's tokens."""

    @property
    def kept(self) -> list[list[int]]:
        """Returns the token indices of each image that are left."""

    @property
    def video_grids(self) -> list[tuple[int, int, int] | None]:
        """Returns frames, rows and columns of each video's tokens."""


def check_prompt(prompt: NotedImages) -> None:
    """Raises `ValueError` if what is noted of a prompt's images does not go together."""
    videos = prompt.video_grids or [None] * len(prompt.grids)
    for part in (prompt.image_tokens, prompt.grids, prompt.kept or prompt.grids, videos):
        if len(part) != prompt.images:
            raise ValueError(f"{len(part)} entries for {prompt.images} images")
    kept_tokens = prompt.kept or [[]] * prompt.images
    for tokens, grid, kept in zip(prompt.image_tokens, prompt.grids, kept_tokens, strict=True):
        if max(kept, default=-1) >= tokens:
            raise ValueError(f"a kept token outside the {tokens} of an image")
        if grid is not None and math.prod(grid) != tokens:
            raise ValueError(f"a grid of {grid} for the {tokens} tokens of an image")
    for tokens, video in zip(prompt.image_tokens, videos, strict=True):
        # newlines may stand behind the frames
        if video is not None and not 0 < math.prod(video) <= tokens:
            raise ValueError(f"frames of {video} for the {tokens} tokens of a video")


def number_of(id: str, task: str) -> int:
    """Returns the number of a question of a task; raises `ValueError`
    if the id is of another one.
    """
    name, _, number = id.rpartition("/")
    if name != task or not (number.isascii() and number.isdecimal()):
        raise ValueError(f"{id!r} is no question of task {task!r}")
    return int(number)


class Accuracy(Record, frozen=True):
    """Accuracies, and the share of the unpruned one that is retained with its 95 % interval; None
    where the unpruned model has no right answer.
    """

    accuracy: Share
    baseline_accuracy: Share
    retained: Amount | None
    ci: Interval | None


class TaskResult(Accuracy, frozen=True):
    """Results of one task.

    Args:
        n: questions.
        accuracy_ci: 95 % interval of the pruned accuracy.
        kept: image tokens that a layer computes, the mean over layers and images.
        metrics: the task's own, of the pruned model, where lmms-eval ran it.
        baseline_metrics: the same of the unpruned model.
    """

    n: Annotated[int, msgspec.Meta(ge=1)]
    accuracy_ci: Interval
    kept: Amount
    metrics: dict[str, float] = {}
    baseline_metrics: dict[str, float] = {}


class TokenCounts(Record, frozen=True):
    """An image's tokens in three ways, means over images.

    Args:
        kept: left after the last cut.
        layer_mean: that a decoder layer computes, the mean over layers.
        papers: as the method's paper counts; None where there is none to ask.
    """

    kept: Amount
    layer_mean: Amount
    papers: Amount | None


class Tokens(TokenCounts, frozen=True):
    """The same beside `full`, the tokens of an unpruned image."""

    full: Count | Amount


class Speedup(Record, frozen=True):
    """Unpruned over pruned time: of the prefill with selection, and of everything."""

    prefill: Amount
    end_to_end: Amount


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What ran: the device, the most memory that it held, and the model's images.

    Args:
        device: its name.
        peak_memory_bytes: the most that was held at once.
        tokens_per_image: of all images; None for a family whose images have several sizes.
    """

    device: str
    peak_memory_bytes: Count
    tokens_per_image: Count | None


class Results(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`results.json`.

    Args:
        definition: what the method's name stands for, if it stands for another.
        fixed_size: whether all images have as many tokens.
        time_ms: medians over questions.
        flops: means over questions.
        kv_bytes: means over questions.
        density: share of the causal half of attention that is computed, the mean over questions and
            layers; None without sparse attention.
        chosen_density: the same without what all methods compute.
        skipped: tasks and rows that could not be used, each with the reason.
    """

    model: str
    method: str
    budget: int | float | str
    definition: str
    seed: int
    config: RunConfig
    versions: dict[str, str]
    device: str
    command: str
    tasks: dict[str, TaskResult]
    overall: Accuracy
    fixed_size: bool
    tokens: Tokens
    time_ms: PairedTimes
    speedup: Speedup
    flops: Costs
    kv_bytes: Costs
    peak_memory_bytes: Count
    density: Share | None = None
    chosen_density: Share | None = None
    skipped: dict[str, str] = {}

    def __post_init__(self) -> None:
        variant = self.config.variant
        if (self.model, self.method, self.budget, self.seed) != (
            self.config.model, variant.method, variant.budget, self.config.seed
        ):  # fmt: skip
            raise ValueError("other model, method, budget or seed than in the configuration")
        if not self.tasks:
            raise ValueError("no task")


class Gain(Record, frozen=True):
    """A difference of accuracies with its paired 95 % interval."""

    accuracy: float
    ci: Interval


class SuiteEntry(Record, frozen=True):
    """Accuracies of the models that were asked all of some tasks, and paired differences.

    Args:
        n: questions.
        accuracy: by model.
        differences: by pair, as `wings - vlm`.
    """

    n: Count
    accuracy: dict[str, Share]
    differences: dict[str, Gain]


class SuiteTask(SuiteEntry, frozen=True):
    """The same of one task, with intervals of the accuracies; `images` tells whether it shows any."""

    images: bool
    accuracy_ci: dict[str, Interval]


class SuiteResults(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`results.json` of a suite; `text` and `images` are means over tasks without and with images."""

    suite: str
    models: dict[str, str]
    seed: int
    config: RunConfig
    versions: dict[str, str]
    device: str
    command: str
    tasks: dict[str, SuiteTask]
    text: SuiteEntry
    images: SuiteEntry
    skipped: dict[str, dict[str, str]]
