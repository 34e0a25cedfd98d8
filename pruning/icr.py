"""In-context re-ranking: images by the attention of a question less that of an empty one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from vlm_prune.pruning.base import PositionRule, Pruner, Stage
from vlm_prune.pruning.divprune import DivPrune
from vlm_prune.pruning.none import NoPruning
from vlm_prune.pruning.received import from_rows
from vlm_prune.vlm.chat import encode_prompts, render
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family, Need, family_of
from vlm_prune.vlm.layer_pruning import InsideModel
from vlm_prune.vlm.layout import alike, image_rows
from vlm_prune.vlm.probe import question_rows
from vlm_prune.vlm.prompt_pruning import BeforeModel, PromptItems

OUTLIER = 2.0
NO_QUESTION = "N/A"


@dataclass
class ICR(Pruner):
    """Any pruner, on the images or frames alone that matter to the question: `icr+divprune`.

    https://arxiv.org/abs/2410.02642

    Of a prompt's images, each frame of a video counted as one, the `keep` that the question's tokens
    pay most attention stay, and the method prunes these; nothing is left of the others. `image_relevance`
    says how they are scored. The unpruned model reads each prompt with more images up to twice for it, so
    that no time is won before the first token: the choice of images is what this is for. What is left of
    a video is one row of tokens to the method.

    Args:
        method: prunes the images that stay; its own budget, positions and seed are replaced.
        keep: images and frames that stay in each prompt.
        empty: tokens that stand for the text behind the last image in a prompt without a question,
            as `empty_question` returns them; without any the attention of the question alone decides.
            `PrunedVLM` and `eval` fill it in.
    """

    method: Pruner = field(default_factory=DivPrune)
    keep: int = 8
    empty: Sequence[int] = ()
    stage: ClassVar[Stage] = "projector"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.02642"
    authors_positions: ClassVar[PositionRule] = "as its parts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 1:
            raise InputError(f"keep {self.keep} leaves no image; give 1 or more")
        if not isinstance(self.empty, list | tuple) or not all(
            type(token) is int for token in self.empty
        ):
            raise InputError(f"empty {self.empty!r} are no token ids; leave it out")
        name, method = type(self.method).__name__, self.method
        if not isinstance(method, Pruner):
            raise InputError(f"method {method!r} is no pruner; give one, such as divprune")
        if method.stage == "input":
            raise InputError(
                f"{name} changes images before they are encoded, and ranking reads them whole; give a "
                "method behind the encoder, such as divprune"
            )
        if "videos" in method.needs:
            raise InputError(
                f"{name} compares the frames of a video, of which icr leaves some; give a method for "
                "images, such as divprune"
            )
        if type(method).parts is Pruner.parts or isinstance(method, ICR):
            raise InputError(f"{name} cannot stand behind icr; give divprune or another method")

    @classmethod
    def in_front_of(cls, method: Pruner) -> Self:
        """Returns the choice of images in front of a method."""
        return cls(method=method)

    @property
    def needs(self) -> frozenset[Need]:
        reading: frozenset[Need] = frozenset(
            {
                "softmax attention in every decoder layer",
                "decoder layers with keys and values, and no inputs but hidden states, of their own",
            }
        )
        return self.method.needs | reading

    def check(self, tokens: int, layers: int) -> None:
        self.wrapped().check(tokens, layers)

    def papers_count(self, tokens: int, layer_tokens: list[float]) -> float | None:
        return self.method.papers_count(tokens, layer_tokens)

    def wrapped(self) -> Pruner:
        """Returns the method with this one's budget, positions and seed."""
        return replace(self.method, budget=self.budget, positions=self.positions, seed=self.seed)

    def prepared(self, model: Any, processor: Any) -> Pruner:
        if self.empty:
            return self
        return replace(self, empty=empty_question(model, processor))

    def parts(
        self, family: Family, vision: Images | None
    ) -> tuple[BeforeModel | None, InsideModel | None]:
        before, inside = self.wrapped().parts(family, vision)
        if before is None:
            before = NoPruning(positions=self.positions).before_model(family, vision)
        return replace(before, shown=partial(self.shown, family.model)), inside

    def shown(self, model: Any, items: PromptItems) -> list[Tensor]:
        """Returns which placeholders of each image or video belong to the images and frames that stay,
        (n_i,) each.

        Args:
            model: of the prompts.
            items: the images and videos.
        """
        parts = [max(1, frames) for frames in items.frames]
        rows = image_rows(items.ordinal, len(parts)).tolist()
        of_row = [
            sum(part for part, own in zip(parts, rows, strict=True) if own == row)
            for row in range(len(items.ordinal))
        ]
        if max(of_row) <= self.keep:
            return [torch.ones(count, dtype=torch.bool) for count in items.counts]
        # one score for each image and frame, one after the other
        tokens = calibrated_tokens(model, items, self.empty)
        scores = [
            float(without_outliers(frame[None]))
            for own, part in zip(tokens, parts, strict=True)
            for frame in own.split(frame_sizes(len(own), part))
        ]
        starts = [0, *accumulate(parts)]
        stay = set[int]()
        for row in range(len(items.ordinal)):
            # the highest scores of a row, of equal ones the first
            own = [
                number
                for item, at in enumerate(rows)
                if at == row
                for number in range(starts[item], starts[item + 1])
            ]
            stay.update(sorted(own, key=lambda number: -scores[number])[: self.keep])
        return [
            torch.cat(
                [
                    torch.full((size,), starts[item] + number in stay)
                    for number, size in enumerate(frame_sizes(count, parts[item]))
                ]
            )
            for item, count in enumerate(items.counts)
        ]


def frame_sizes(count: int, frames: int) -> list[int]:
    """Returns how many placeholders of a video are of each frame; those behind the last one go with it."""
    size = count // frames
    return [size] * (frames - 1) + [count - size * (frames - 1)]


def empty_question(model: Any, processor: Any) -> tuple[int, ...]:
    """Returns the tokens that follow a prompt's last image where N/A stands for its question.

    Args:
        model: of a supported family.
        processor: the model's.
    """
    parts = [{"type": "image"}, {"type": "text", "text": NO_QUESTION}]
    text = render(processor, [{"role": "user", "content": parts}], add_generation_prompt=True)
    family, blank = family_of(model), Image.new("RGB", (64, 64))
    ids = encode_prompts(model, processor, [text], [[blank]])["input_ids"][0].tolist()
    last = max(number for number, token in enumerate(ids) if token == family.image_token)
    return tuple(ids[last + 1 :])


def calibrated_tokens(model: Any, items: PromptItems, empty: Sequence[int]) -> list[Tensor]:
    """Returns the score of each token of each image or video, (n_i,): the question's attention, less that of
    an empty one where it is given.

    Args:
        model: of a supported family.
        items: the images and videos, and their prompts.
        empty: tokens of an empty question.
    """
    found = _by_item(model, items.inputs, items.ordinal, items.counts)
    if not empty:
        return found
    ids, valid = items.inputs["input_ids"], items.inputs["attention_mask"].bool()
    # each row up to its last image, then the empty question
    rows = []
    for row, real in enumerate(valid):
        last = int(((items.ordinal[row] >= 0) & real).nonzero()[-1:].sum())
        rows.append(real.nonzero()[:, 0][: int(real[: last + 1].sum())])
    length = max(map(len, rows)) + len(empty)
    blank_ids = ids.new_zeros(len(ids), length)
    mask, ordinal = torch.zeros_like(blank_ids), torch.full_like(blank_ids, -1)
    for row, kept in enumerate(rows):
        start = length - len(empty) - len(kept)
        blank_ids[row, start : length - len(empty)] = ids[row, kept]
        blank_ids[row, length - len(empty) :] = ids.new_tensor(empty)
        ordinal[row, start : length - len(empty)] = items.ordinal[row, kept]
        mask[row, start:] = 1
    inputs = items.inputs | {"input_ids": blank_ids, "attention_mask": mask}
    inputs |= items.arguments(blank_ids, mask)
    blank = _by_item(model, inputs, ordinal, items.counts)
    return [ours - theirs for ours, theirs in zip(found, blank, strict=True)]


def _by_item(
    model: Any, inputs: Mapping[str, Any], ordinal: Tensor, counts: list[int]
) -> list[Tensor]:
    """Returns the attention that tokens get of their questions, summed over layers, (n_i,) for each image.

    Args:
        model: of a supported family.
        inputs: as for `question_rows`.
        ordinal: likewise, of its `items`.
        counts: likewise.
    """
    groups = _summed(model, inputs, (ordinal, counts))
    found: dict[int, Tensor] = {}
    for members, scores in zip(alike(counts), groups, strict=True):
        found.update(zip(members, scores, strict=True))
    return [found[item] for item in range(len(counts))]


def without_outliers(calibrated: Tensor) -> Tensor:
    """Returns the sum of an image's scores (M, n) but for those far below its mean, (M,)."""
    mean, spread = calibrated.mean(1, keepdim=True), calibrated.std(1, keepdim=True)
    # one token has no spread
    low = mean - OUTLIER * spread.nan_to_num()
    total: Tensor = (calibrated * (calibrated >= low)).sum(1)
    return total


def image_relevance(model: Any, inputs: Mapping[str, Any], empty: Mapping[str, Any]) -> Tensor:
    """Returns how relevant each image of some prompts is to its question, (M,), without generating.

    https://arxiv.org/abs/2410.02642

    A token's score is the attention of the question's tokens to it, the mean over them and over heads,
    summed over all layers. That of an empty question, such as N/A, is taken off, which leaves what
    images get whatever is asked. Tokens more than two standard deviations below their image's mean
    are left out; an image has the sum of the others. The paper caches the documents for both
    questions, here both prompts run whole.

    Args:
        model: of a supported family; only images are ranked.
        inputs: what the processor gives for prompts, as for `question_rows`.
        empty: the same with an empty question in place of each.

    Raises:
        InputError: if the prompts have other images, or a layer has no attention that could be scored.
    """
    family = family_of(model)
    counts = family.counts(inputs["input_ids"], inputs)
    if family.counts(empty["input_ids"], empty) != counts:
        raise InputError(
            "the prompts with an empty question have other images; give the same prompts with N/A for "
            "the question"
        )
    question, blank = (_summed(model, given) for given in (inputs, empty))
    found = torch.zeros(len(counts), device=question[0].device)
    for members, ours, theirs in zip(alike(counts), question, blank, strict=True):
        found[list(members)] = without_outliers(ours - theirs)
    return found


def _summed(
    model: Any, inputs: Mapping[str, Any], items: tuple[Tensor, list[int]] | None = None
) -> list[Tensor]:
    """Returns the attention that images' tokens get of their questions, summed over layers: a tensor
    (M, n) for the images of each number of tokens.

    Args:
        model: of a supported family.
        inputs: as for `question_rows`.
        items: likewise.
    """
    total: list[Tensor] = []
    for groups in question_rows(model, inputs, items):
        received = [from_rows(rows, rows.columns).float() for rows in groups]
        total = [a + b for a, b in zip(total, received, strict=True)] if total else received
    return total
