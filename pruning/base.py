"""What a pruner is: a dataclass of hyperparameters, applied to a model as a context manager."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from vlm_prune.pruning.registry import methods
from vlm_prune.pruning.schedule import Schedule, fit_cuts, nearest, scaled
from vlm_prune.vlm.block import pruned
from vlm_prune.vlm.budget import Budget, check_budget, check_fits, even_shares, tokens_for
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry, unknown
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family, Need, family_of
from vlm_prune.vlm.layer_pruning import Cut, InsideModel, Side, cut_depths
from vlm_prune.vlm.prompt_pruning import BeforeModel, Positions
from vlm_prune.vlm.tokens import DecoderTokens, Kept, VisionTokens, ranked, top
from vlm_prune.vlm.trace import Trace

Stage = Literal["input", "encoder", "projector", "decoder"]
PARTS = 32  # of a video, to methods for images
CountedTokens = Literal["computed", "at the cut", "kept"]
PositionRule = Literal["contiguous", "original", "as its parts"]


@dataclass(kw_only=True)
class Pruner(ABC):
    """Keep part of an image's tokens.

    `with pruner(model) as trace:` prunes every `generate` and forward inside the block and leaves
    the model as it was. `trace` says what was kept.

    Args:
        budget: image tokens kept per image, or a fraction of them in (0, 1]; of a video all its frames
            count together, and `8/frame` keeps 8 of each, on average.
        positions: what kept tokens' positions become: `contiguous` renumbers them, `original`
            keeps the gaps, and `auto` is `authors_positions`. Positions with rows and columns
            always stay.
        seed: for methods that draw random numbers; the same seed keeps the same tokens in any
            batch.

    Raises:
        InputError: if a hyperparameter is out of range.
    """

    budget: Budget = 64
    positions: Positions = "auto"
    seed: int = 0

    stage: ClassVar[Stage]
    paper: ClassVar[str] = ""
    authors_positions: ClassVar[PositionRule] = "contiguous"
    """What the authors' code does to positions of kept tokens."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        self._choice("positions", get_args(Positions))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and type(value) is not int:
                raise InputError(f"{field.name} {value!r} is not a whole number")
            if field.type is float and not (type(value) in (int, float) and abs(value) < math.inf):
                raise InputError(f"{field.name} {value!r} is not a finite number")
            if field.type is bool and type(value) is not bool:
                raise InputError(f"{field.name} {value!r} is neither true nor false")
            if field.type is str and type(value) is int:
                setattr(self, field.name, str(value))
            elif field.type is str and type(value) is not str:
                raise InputError(f"{field.name} {value!r} is not a text")

    def _choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise InputError(unknown(name, str(getattr(self, name)), allowed))

    def __call__(
        self, model: Any, vision: Images | None = None, video_frames: Sequence[int] | None = None
    ) -> AbstractContextManager[Trace]:
        """Prunes `model` inside a `with` block.

        Args:
            model: of a supported family.
            vision: the prompt's images where they were encoded beforehand; `generate` then gets
                them as `mm_encoder_outputs` instead of pixels.
            video_frames: the number of frames of each video of the prompt in its order, 0 for an image;
                for models to which frames are images, which are each by themselves unless given.
        """
        family = self.admit(model)
        frames = self.frames_on(family, vision, video_frames)
        return pruned(model, *self.parts(family, vision), video_frames=frames)

    def parts(
        self, family: Family, vision: Images | None
    ) -> tuple[BeforeModel | None, InsideModel | None]:
        """Returns what the engine runs of this method before and inside the language model of `family`.

        Args:
            family: the model's adapter.
            vision: as for a call.

        Raises:
            InputError: if that cannot be told, as the method does more than this and has a `__call__` of its
                own.
        """
        raise InputError(
            f"{type(self).__name__} is more than a choice of tokens before or inside the language "
            "model; give one that is not, such as divprune or fastv"
        )

    def prepared(self, model: Any, processor: Any) -> "Pruner":
        """Returns the method with what it needs of a model's processor; here the method itself."""
        return self

    def resolved(self, family: Family) -> "Pruner":
        """Returns the method that this one stands for on images of `family`; methods that stand for the
        same one do the same. Here it is the method itself.
        """
        return self

    def frames_on(
        self, family: Family, vision: Images | None, video_frames: Sequence[int] | None
    ) -> Sequence[int] | None:
        """Returns the frames of each video of the prompt where they are images to the model.

        Args:
            family: the model's adapter.
            vision: as the pruner got it.
            video_frames: likewise.

        Raises:
            InputError: when the method compares frames, and nothing tells which images they are.
        """
        if not family.frames_as_images:
            return video_frames
        if video_frames is None and vision is not None:
            return vision.frames
        if video_frames is None and "videos" in self.needs:
            raise InputError(
                f"{type(self).__name__} compares the frames of a video, which are images to "
                f"{family.model.config.model_type} models; give video_frames, the frames of each video "
                "of the prompt and 0 for an image"
            )
        return video_frames

    def check(self, tokens: int, layers: int) -> None:
        """Raises `InputError` when the budget cannot be met on images of
        `tokens` in a decoder of `layers`.
        """
        check_fits(self.budget, tokens)

    def positions_on(self, family: Family) -> Positions:
        """Returns `positions` with `auto` replaced by the authors' rule, where there is a choice."""
        if self.positions != "auto" or family.mrope or self.authors_positions == "as its parts":
            return self.positions
        return self.authors_positions

    @property
    def needs(self) -> frozenset[Need]:
        """Returns what a model must have for this method."""
        return frozenset()

    def needs_on(self, layers: int) -> frozenset[Need]:
        """Returns the same of a model of `layers` decoder layers."""
        return self.needs

    def admit(self, model: Any) -> Family:
        """Returns the model's adapter, if the method goes with the model.

        Raises:
            InputError: when this method or its budget does not go with the model.
        """
        family = family_of(model)
        layers, lacks = len(family.decoder.layers), family.lacks
        for need in sorted(self.needs_on(layers) & lacks):
            works = [n for n, method in methods().items() if not method().needs_on(layers) & lacks]
            raise InputError(
                f"{type(self).__name__} needs {need}, which {model.config.model_type} models lack; "
                f"give one of {', '.join(works)}"
            )
        if family.fixed_size:
            self.check(family.tokens_per_image, layers)
        return family

    def papers_count(self, tokens: int, layer_tokens: list[float]) -> float | None:
        """Returns an image's tokens as the method's paper would count them.

        `layer_tokens` are those that each layer computes of an image of `tokens`. Where all layers
        compute the same there is one way to count; None where there is no paper to ask.
        """
        return layer_tokens[-1] if len(set(layer_tokens)) == 1 else None

    def counts(self, tokens: int, layer_tokens: list[float]) -> dict[str, float | None]:
        """Returns an image's tokens in three ways: left at the end, as a mean over layers,
        and as the paper counts them.

        Arguments are those of `papers_count`.
        """
        return {
            "kept": layer_tokens[-1],
            "layer_mean": sum(layer_tokens) / len(layer_tokens),
            "papers": self.papers_count(tokens, layer_tokens),
        }

    @classmethod
    def at_layer(cls, layer: int) -> "Pruner":
        """Returns the method as one cut after `layer` of 32 decoder layers: `name@layer`.

        Raises:
            InputError: if it has no such form.
        """
        raise InputError(f"{cls.__name__} cannot cut after a decoder layer; apet@16 can")

    def definition(self, layers: int) -> str:
        """Returns what the name stands for on a model of `layers` decoder layers, empty
        unless it stands for another method.
        """
        return ""


@dataclass
class VisionPruner(Pruner):
    """Acts before the language model: reduces each image's or video's tokens to exactly the budget."""

    changes_attention: ClassVar[bool] = False
    """Whether the language model must attend to what is kept in another way than to other tokens."""

    @property
    def only_chooses(self) -> bool:
        """Returns whether the method does nothing but choose tokens before
        an unchanged language model.
        """
        return type(self).__call__ is VisionPruner.__call__ and not self.changes_attention

    @abstractmethod
    def reduce(self, vision: VisionTokens) -> Kept:
        """Chooses or merges tokens of images."""

    def reduce_video(self, vision: VisionTokens) -> Kept:
        """Chooses or merges tokens of videos: each frame is an image
        with its share of the budget.

        One of `PARTS` of the frames is seen at a time, so that little is held beside the tokens.
        """
        videos, tokens, frames = len(vision.projected), vision.projected.shape[1], vision.frames
        # frames with equal shares are reduced together, as images
        shares, most = even_shares(self.count(vision), frames), max(1, frames // PARTS)
        found: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        equal: dict[int, list[int]] = {}
        for frame, share in enumerate(shares):
            equal.setdefault(share, []).append(frame)
        runs = [
            (share, alike[first : first + most])
            for share, alike in sorted(equal.items())
            if share
            for first in range(0, len(alike), most)
        ]
        for share, members in runs:
            kept = replace(self, budget=share).reduce(vision.in_frames(members))
            parts = [kept.indices, kept.features, *([kept.sizes] if kept.sizes else [])]
            at = [(video, frame) for video in range(videos) for frame in members]
            for (video, frame), (indices, *more) in zip(at, zip(*parts, strict=True), strict=True):
                # indices of a frame become those of its video
                found[video, frame] = indices + frame * (tokens // frames), *more
        # of each video its frames' indices, features and sizes, joined in order
        whole = [
            [
                torch.cat(part)
                for part in zip(*(found[at] for at in sorted(found) if at[0] == video), strict=True)
            ]
            for video in range(videos)
        ]
        return Kept(*map(list, zip(*whole, strict=True)))

    def select(self, vision: VisionTokens) -> Kept:
        """Chooses or merges tokens of images or videos."""
        return self.reduce_video(vision) if vision.frames else self.reduce(vision)

    def count(self, vision: VisionTokens) -> int:
        """Returns how many tokens to keep of each image; newlines come with all
        N of them, never with fewer.
        """
        return self.count_of(vision.projected.shape[1], vision.available, vision.frames)

    def count_of(self, tokens: int, available: int, frames: int) -> int:
        """Returns the same of an image or video.

        Args:
            tokens: of it.
            available: its placeholders, newlines included.
            frames: of a video, 0 for an image.
        """
        wanted = tokens_for(self.budget, available, frames)
        # where everything stays newlines do; otherwise at least one token goes with them
        return tokens if wanted == available else min(wanted, tokens - (available > tokens))

    def parts(
        self, family: Family, vision: Images | None
    ) -> tuple[BeforeModel | None, InsideModel | None]:
        return self.before_model(family, vision), None

    def before_model(self, family: Family, vision: Images | None) -> BeforeModel:
        """Returns what the engine runs of this method before the language model of `family`."""
        return BeforeModel(self.select, self.positions_on(family), vision=vision)


@dataclass
class OrderPruner(VisionPruner):
    """Takes tokens in one order, whatever the budget: a smaller one keeps the first of those that a
    larger one keeps. Where several budgets are measured, one order serves them all.
    """

    @abstractmethod
    def order(self, vision: VisionTokens, count: int) -> Tensor:
        """Returns the first `count` tokens of each image, in the order in which they are taken, (M, count)."""

    def order_kind(self, vision: VisionTokens, count: int) -> Hashable:
        """Returns what two orders of the same method have in common when the shorter one is the beginning
        of the longer; here all do.

        Args:
            vision: the tokens.
            count: how many are taken.
        """
        return None

    def reduce(self, vision: VisionTokens) -> Kept:
        count, find = self.count(vision), partial(self.order, vision)
        if vision.orders is None:
            order = find(count)
        else:
            method = replace(self, budget=1.0, positions="auto")
            key = (method, self.order_kind(vision, count))
            order = vision.orders.first(count, key, find)
        return Kept.at(vision.projected, order.sort(1).values)


@dataclass
class ScorePruner(OrderPruner):
    """Keeps the tokens with the highest scores, in their original order."""

    @abstractmethod
    def score(self, vision: VisionTokens) -> Tensor:
        """Scores the tokens of each image, (M, N); higher is kept."""

    def order(self, vision: VisionTokens, count: int) -> Tensor:
        return ranked(self.score(vision), count)


@dataclass
class DecoderPruner(Pruner):
    """Acts inside the language model; the budget is the mean over layers of tokens computed.

    Cuts are stated for 32 decoder layers and scaled to the model's depth. Where the layers before
    the first cut alone would spend the budget, that cut moves up, at most to the input of the
    first layer, which then supplies the scores itself.

    Args:
        preset: the authors' own token counts by name, instead of counts solved from `budget`.
        schedule: where to cut and in which proportions, instead of the method's own pattern; a
            `Schedule` or its fields as a dictionary.
    """

    preset: str = ""
    schedule: Schedule | dict[str, Any] | None = None

    stage: ClassVar[Stage] = "decoder"
    reads: ClassVar[Side] = "before"
    chooses_queries: ClassVar[bool] = False
    counted: ClassVar[CountedTokens] = "computed"
    presets: ClassVar[Registry[tuple[float, ...]]] = Registry("preset")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.schedule, dict):
            self.schedule = Schedule.of(self.schedule)
        elif not isinstance(self.schedule, Schedule | None):
            raise InputError(
                f"schedule {self.schedule!r} is none; give --schedule with a file of "
                "vlm-prune schedule"
            )
        if self.preset:
            self.presets[str(self.preset)]
            if self.schedule is not None:
                raise InputError("a preset says where to cut and so does a schedule; give one")

    @classmethod
    def at_layer(cls, layer: int) -> Pruner:
        if "layer" not in {field.name for field in fields(cls)}:
            return super().at_layer(layer)
        return cls(layer=layer)  # type: ignore[call-arg]  # a field of those that have one cut

    @abstractmethod
    def pattern(self) -> list[tuple[int, float]]:
        """Returns for each cut how many of 32 layers have run, and the
        relative number of tokens kept.
        """

    @abstractmethod
    def reduce(self, tokens: DecoderTokens, keep: int) -> Kept:
        """Chooses or merges the tokens of each image, to `keep` each; `keep` is below n."""

    def query_mask(self, tokens: DecoderTokens) -> Tensor:
        """Returns the query mask (M, T): which tokens' attention is read, given the
        first layer's input; here the question's.
        """
        return tokens.question_mask

    def cuts(
        self, tokens: int, layers: int, allowed: Sequence[int] = (), frames: int = 0
    ) -> list[Cut]:
        """Returns where to cut, and to how many tokens.

        Args:
            tokens: of an image.
            layers: of the decoder.
            allowed: how many of them can have run at a cut, ascending; any number unless given.
            frames: of a video; 0 for an image.
        """
        # where to cut: stated for another depth, moved to layers where the method can
        allowed = allowed or range(layers)
        if isinstance(self.schedule, Schedule):
            cut_layers, shares = self.schedule.scaled(layers), list(self.schedule.shares)
        else:
            depths, shares = map(list, zip(*self.pattern(), strict=True))
            cut_layers = scaled(depths, layers)
        cut_layers = nearest(cut_layers, allowed, layers)
        if self.preset:
            counts = [
                count if isinstance(count, int) else round(count * tokens)
                for count in self.presets[str(self.preset)]
            ]
        else:
            budget = tokens_for(self.budget, tokens, frames)
            cut_layers, counts = fit_cuts(budget, tokens, layers, cut_layers, shares, allowed)
        # in a shallow model two cuts may fall on one place; the later one decides
        at = dict(zip(cut_layers, counts, strict=True))
        return [Cut(depth, min(keep, tokens)) for depth, keep in at.items() if depth < layers]

    def depths_on(self, family: Family) -> list[int]:
        """Returns after how many decoder layers the method can cut on a model of `family`."""
        return cut_depths(family.decoder, self.reads, family.last_cut)

    def check(self, tokens: int, layers: int) -> None:
        if not self.preset:
            check_fits(self.budget, tokens)

    def papers_count(self, tokens: int, layer_tokens: list[float]) -> float | None:
        """Returns an image's tokens by the paper's way of counting, `counted`.

        It is the mean that layers compute, the mean with the layer before each cut already counted
        as pruned, or what is left after the last cut.
        """
        if self.counted == "kept":
            return layer_tokens[-1]
        # each layer counts as the one behind it
        if self.counted == "at the cut":
            layer_tokens = [*layer_tokens[1:], layer_tokens[-1]]
        return sum(layer_tokens) / len(layer_tokens)

    def parts(
        self, family: Family, vision: Images | None
    ) -> tuple[BeforeModel | None, InsideModel | None]:
        return None, self.inside_model(family)

    def inside_model(self, family: Family) -> InsideModel:
        """Returns what the engine runs of this method inside the language model of `family`."""
        layers, allowed = len(family.decoder.layers), self.depths_on(family)
        cuts = partial(self.cuts, layers=layers, allowed=allowed)
        return InsideModel(cuts, self, self.positions_on(family))


@dataclass
class DecoderScorePruner(DecoderPruner):
    """Keeps the tokens with the highest scores at each cut."""

    @abstractmethod
    def score(self, tokens: DecoderTokens) -> Tensor:
        """Scores the tokens of each image, (M, n); higher is kept."""

    def reduce(self, tokens: DecoderTokens, keep: int) -> Kept:
        return Kept.at(tokens.features, top(self.score(tokens), keep))
