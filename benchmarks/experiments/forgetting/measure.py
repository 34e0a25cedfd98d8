"""What is measured of an arm: right answers by scene, and where attention goes."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_prune.benchmarks.embedded_models.language import IGNORE, Row, pack, projected
from vlm_prune.benchmarks.experiments.forgetting.train import answer_logits
from vlm_prune.learners.laws import laws
from vlm_prune.vlm.families import family_of

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
        right = iter(bool(piece.all()) for piece in (logits.argmax(-1) == labels).split(lengths))
        for name, row in part:
            for block in row.blocks:
                kinds = counted.setdefault(name, {})
                clusters = kinds.setdefault(block.kind, [])
                if not clusters or clusters[-1][2] != id(row):
                    clusters.append([0, 0, id(row)])
                clusters[-1][0] += next(right)
                clusters[-1][1] += 1
    return {
        name: {kind: [entry[:2] for entry in entries] for kind, entries in kinds.items()}
        for name, kinds in counted.items()
    }


def accuracy(counts: list[list[int]]) -> float:
    """Share of right answers of [right, asked] counts."""
    right, asked = np.array(counts).sum(0)
    return float(right / asked)


def accuracy_over_kinds(kinds: dict[str, list[list[int]]]) -> float:
    """Mean over kinds, which weigh the same."""
    return float(np.mean([accuracy(counts) for counts in kinds.values()]))


Seeds = list[dict[str, list[list[int]]]]


def interval(seeds: Seeds) -> tuple[float, list[float]]:
    """Mean accuracy over seeds and kinds with a 95 % interval.

    Seeds are resampled, and within each its rows, whole: questions about one scene are not
    independent. With three seeds the spread between seeds is itself poorly known.
    """
    return _mean(seeds), _percentiles(_resampled(seeds))


def accuracy_difference(ours: Seeds, other: Seeds) -> tuple[float, list[float]]:
    """Our mean accuracy minus another with a 95 % interval, paired: both had the same questions."""
    return _mean(ours) - _mean(other), _percentiles(_resampled(ours) - _resampled(other))


def _mean(seeds: Seeds) -> float:
    return float(np.mean([accuracy_over_kinds(kinds) for kinds in seeds]))


def _percentiles(draws: NDArray[np.float64]) -> list[float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return [float(low), float(high)]


def _resampled(seeds: Seeds, draws: int = 2000) -> NDArray[np.float64]:
    """Bootstrap means, (draws,); those of the same questions take the same rows and seeds."""
    rng = np.random.default_rng(0)
    resampled: list[NDArray[np.float64]] = []
    for kinds in seeds:
        total = np.zeros(draws)
        for counts in kinds.values():
            table = np.array(counts, float)
            chosen = table[rng.integers(0, len(table), (draws, len(table)))].sum(1)
            total += chosen[:, 0] / chosen[:, 1]
        resampled.append(total / len(kinds))
    stacked = np.stack(resampled)
    means: NDArray[np.float64] = stacked[
        rng.integers(0, len(seeds), (len(seeds), draws)), np.arange(draws)
    ].mean(0)
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
