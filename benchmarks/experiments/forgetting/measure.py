"""What is measured of an arm: right answers by scene, and where attention goes."""

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_prune.benchmarks.embedded_models.base_text import package_text
from vlm_prune.benchmarks.embedded_models.language import IGNORE, Row, pack, projected
from vlm_prune.benchmarks.embedded_models.text_skills import (
    chat_prompts,
    greedy_answers,
    text_loss,
)
from vlm_prune.benchmarks.evaluation.records import Amount, Count, Record
from vlm_prune.benchmarks.experiments.forgetting.arms import Plan
from vlm_prune.benchmarks.experiments.forgetting.train import answer_logits
from vlm_prune.benchmarks.stats.bootstrap import Values, percentiles, resampled
from vlm_prune.learners.laws import GROUPS, laws
from vlm_prune.vlm.families import family_of

ADVICE = "remove it, and it is measured again"
FirstToken = Literal["with first token", "without first token"]
Counts = Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]
KindCounts = dict[str, Annotated[list[Counts], msgspec.Meta(min_length=1)]]


class ArmCost(Record, frozen=True):
    """What training an arm took, as in `Cost`."""

    trainable: Count
    step_s: Amount
    memory_bytes: Count


class ArmRecord(Record, frozen=True, omit_defaults=True):
    """The file of one arm with one seed.

    Args:
        hits: `Hits` of the parts `text`, `visual` and `iit`.
        curves: attention to each group of tokens by layer; None where it is undefined.
        shift: of each prompt where it is defined.
        cost: of training.
        alpha: how far merging goes, for the arm that merges.
        validation: what other distances had scored.
        text_losses: on each held-out text, in nats a token, where the plan reads some.
        answers: to held-out instructions, where the plan asks some.
    """

    hits: dict[str, KindCounts]
    curves: dict[FirstToken, list[list[float | None]]]
    shift: dict[FirstToken, list[float]]
    cost: ArmCost
    alpha: float | None = None
    validation: dict[str, float] | None = None
    text_losses: list[float] = msgspec.field(default_factory=list)
    answers: list[str] = msgspec.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.hits.keys() != {"text", "visual", "iit"} or not all(self.hits.values()):
            raise ValueError("hits are of text, visual and iit")
        counts = [two for part in self.hits.values() for row in part.values() for two in row]
        if any(right > total or not total for right, total in counts):
            raise ValueError("more right answers than questions, or no question")
        if len(self.curves) != 2 or len(self.shift) != 2:
            raise ValueError("curves and shift are with and without the first token")
        if any(
            len(curve) != len(GROUPS) or len({*map(len, curve)}) > 1
            for curve in self.curves.values()
        ):
            raise ValueError(f"a curve is not of {len(GROUPS)} groups")


Hits = dict[str, dict[str, list[list[int]]]]
BATCH = 4


@torch.inference_mode()
def right_answers(model: Any, processor: Any, rows: list[tuple[str, Row]]) -> Hits:
    """Returns, for each part and kind, [right, asked] counts of every row that asks such questions.

    An answer is right when each of its tokens and the end token are the most likely ones after
    the right ones before, which is when greedy decoding gives exactly this answer.

    Args:
        model: with projector, and learners if it has some.
        processor: the model's.
        rows: each with the part that it measures.
    """
    counted: Hits = {}
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        logits, labels = answer_logits(model, [row for _, row in part], processor.tokenizer)
        lengths = [
            len(processor.tokenizer(block.answer).input_ids) + 1
            for _, row in part
            for block in row.blocks
        ]
        # an answer is right if all of its tokens are
        right = iter(bool(piece.all()) for piece in (logits.argmax(-1) == labels).split(lengths))
        for name, row in part:
            for block in row.blocks:
                kinds = counted.setdefault(name, {})
                clusters = kinds.setdefault(block.kind, [])
                # questions of one row are a cluster: [right, asked, row]
                if not clusters or clusters[-1][2] != id(row):
                    clusters.append([0, 0, id(row)])
                clusters[-1][0] += next(right)
                clusters[-1][1] += 1
    return {
        name: {kind: [entry[:2] for entry in entries] for kind, entries in kinds.items()}
        for name, kinds in counted.items()
    }


def language_skills(model: Any, processor: Any, plan: Plan) -> tuple[list[float], list[str]]:
    """Returns the mean loss on each held-out text in nats, and answers to held-out instructions.

    Args:
        model: with learners if it has some.
        processor: the model's.
        plan: says how much is read and asked; both are empty where it says nothing.
    """
    tokenizer, losses, answers = processor.tokenizer, [], []
    if plan.text_tokens:
        for text in package_text("held out"):
            losses.append(text_loss(model, tokenizer, [text], most=plan.text_tokens).mean().item())
    if plan.instructions:
        prompts = chat_prompts(processor)
        chosen = prompts[:: max(1, len(prompts) // plan.instructions)][: plan.instructions]
        answers = greedy_answers(model, tokenizer, chosen)
    return losses, answers


def mean_over_seeds(values: NDArray[np.float64]) -> tuple[float, tuple[float, float]]:
    """Returns the mean of values (seeds, items) with a 95 % interval; both are resampled."""
    drawn = resampled(
        lambda seeds, items: values[seeds[..., None], items[..., None, :]].mean((-2, -1)),
        values.shape,
    )
    return float(values.mean()), percentiles(drawn)


def accuracy(counts: list[list[int]]) -> float:
    """Returns the share of right answers of [right, asked] counts."""
    right, total = np.array(counts).sum(0)
    return float(right / total)


def accuracy_over_kinds(kinds: dict[str, list[list[int]]]) -> float:
    """Returns the mean accuracy over kinds, which weigh the same."""
    return float(np.mean([accuracy(counts) for counts in kinds.values()]))


Seeds = list[dict[str, list[list[int]]]]


def interval(seeds: Seeds) -> tuple[float, tuple[float, float]]:
    """Returns the mean accuracy over seeds and kinds with a 95 % interval.

    Seeds are resampled, and within each the rows of each kind, whole: questions about one scene are
    not independent. With three seeds the spread between seeds is itself poorly known.
    """
    drawn = resampled(lambda *chosen: _means(seeds, *chosen), _sizes(seeds))
    return _mean(seeds), percentiles(drawn)


def accuracy_difference(ours: Seeds, other: Seeds) -> tuple[float, tuple[float, float]]:
    """Returns our mean accuracy minus another, on the same questions, with a 95 % interval."""
    drawn = resampled(lambda *chosen: _means(ours, *chosen) - _means(other, *chosen), _sizes(ours))
    return _mean(ours) - _mean(other), percentiles(drawn)


def _mean(seeds: Seeds) -> float:
    return float(np.mean([accuracy_over_kinds(kinds) for kinds in seeds]))


def _sizes(seeds: Seeds) -> list[int]:
    """Returns the number of members of each stratum: the seeds, then the
    rows of each kind of each seed.
    """
    return [len(seeds), *(len(counts) for kinds in seeds for counts in kinds.values())]


def _means(seeds: Seeds, chosen: NDArray[np.int64], *rows: NDArray[np.int64]) -> Values:
    """Returns mean accuracies (D,) of seeds that are drawn, each of rows that are drawn in it.

    Args:
        seeds: counts by kind of each seed.
        chosen: seeds drawn, (D, S).
        rows: for each kind of each seed the rows drawn, (D, n).
    """
    strata, accuracies = iter(rows), []
    for kinds in seeds:
        # (D, 2) right and asked answers of each kind's rows
        counts = [np.array(counts, float)[next(strata)].sum(-2) for counts in kinds.values()]
        accuracies.append(np.mean([both[:, 0] / both[:, 1] for both in counts], 0))
    means: Values = np.take_along_axis(np.stack(accuracies, -1), chosen, -1).mean(-1)
    return means


@torch.inference_mode()
def shift_curves(model: Any, processor: Any, rows: list[Row], first_token: bool) -> Tensor:
    """Returns the attention of the tokens that predict an answer, (rows, 3, layers), by `laws`.

    Args:
        model: with projector, and learners if it has some.
        processor: the model's.
        rows: of one block each.
        first_token: whether attention to the first token counts.
    """
    curves = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        batch = pack(part, processor.tokenizer, model.config.image_token_id)
        images = [row.image for row in part if row.image is not None]
        tokens = projected(model)(images).split([len(image) for image in images])
        # right padding only: one block a row, so its places are its positions
        lengths = batch.positions.argmax(1)
        valid = torch.arange(batch.ids.shape[1]) <= lengths[:, None]
        inputs = {
            "input_ids": batch.ids,
            "attention_mask": valid.long(),
            "mm_encoder_outputs": family_of(model).output(tokens),
        }
        curves.append(laws(model, inputs, batch.labels != IGNORE, first_token))  # type: ignore[arg-type]
    return torch.cat(curves)
