"""Choosing image and video tokens before the language model: encode, group, reduce.

What is chosen is cut at the input of the first decoder layer, so the rest of the model, `generate`
and the cache see the full prompt.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from itertools import chain
from types import MethodType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.distinct_views import distinct_views
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families import Family
from vlm_prune.vlm.families.base import KINDS, PIXELS, Kind, loaded
from vlm_prune.vlm.layout import TokenLayout, merged_ordinals, repeated
from vlm_prune.vlm.smaller import GridOf
from vlm_prune.vlm.tokens import Kept, VisionTokens
from vlm_prune.vlm.trace import SELECTION, VISION, Trace, phase_timer

Positions = Literal["auto", "contiguous", "original"]


@dataclass(frozen=True)
class PromptItems:
    """The images and videos of prompts, before any of their tokens go.

    Args:
        inputs: of a forward of the unpruned model: `input_ids` and `attention_mask` (B, L), images and
            videos as `mm_encoder_outputs`, and what the family needs beside.
        ordinal: for each token the image or video that it belongs to, -1 for text, (B, L).
        counts: placeholders of each image or video, in the prompts' order.
        frames: of each, 0 for images.
        arguments: returns what the family needs beside ids (B, L) and a mask (B, L) of prompts with the
            same images and videos.
        numbers: of each, among the images and videos of all rows, those that beam search repeats
            included.
    """

    inputs: dict[str, Any]
    ordinal: Tensor
    counts: list[int]
    frames: list[int]
    arguments: Callable[[Tensor, Tensor], dict[str, Any]]
    numbers: list[int]


@dataclass(frozen=True)
class BeforeModel:
    """A method before the language model.

    Args:
        reduce: what it keeps of images, or videos, of equal shape.
        positions: what positions of kept tokens become.
        grid_of: says how many tokens images and videos are to have that are shrunk before they are
            encoded; what is kept of these stands in the middle of what it shows.
        vision: the prompt's images, and its videos behind them, where they were encoded beforehand.
        distinct_views: whether the tower encodes views with equal pixels once.
        shown: which placeholders of each image or video are left to the method, (n_i,) each, before it
            chooses; all unless given.
    """

    reduce: Callable[[VisionTokens], Kept]
    positions: Positions
    grid_of: GridOf | None = None
    vision: Images | None = None
    distinct_views: bool = False
    shown: Callable[[PromptItems], list[Tensor]] | None = None


@dataclass
class Encoded:
    """How images were encoded: the model's output as it was, and what it was made from.

    `counts` says how many placeholders the model counts for each part of its output, `places` where
    the tokens of images that were shrunk stand among these.
    """

    output: Any
    pixel_values: Tensor
    inputs: dict[str, Any]
    counts: list[int]
    places: list[Tensor] | None = None


@dataclass
class Encoder:
    """Stands in for a model's `get_image_features` or `get_video_features` inside a block, and notes
    how it encoded.

    `generate` encodes images before it calls the model; methods before the language model need more
    of it than the features.

    Args:
        family: the model's adapter.
        before: the method before the language model, if there is one.
        trace: gets the seconds that encoding took.
        kind: of what is encoded.
        nested: its `inside` is true in a thread where an encoder of the block runs: some models
            encode videos with their method for images.
    """

    family: Family
    before: BeforeModel | None
    trace: Trace
    kind: Kind
    nested: threading.local
    module: Any = field(init=False)
    original: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.module = self.family.multimodal
        self.original = getattr(self.module, self.name)
        # a user's own function may take what the class's does without naming it
        self.__signature__ = signature(
            MethodType(getattr(type(self.module), self.name), self.module)
        )

    @property
    def name(self) -> str:
        """Returns the name of the method that this stands in for."""
        return f"get_{self.kind}_features"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.nested, "inside", False):
            return self.original(*args, **kwargs)
        given = self.__signature__.bind(*args, **kwargs).arguments
        inputs = given | given.pop("kwargs", {})
        # the pixels apart: they may be shrunk first
        whole = inputs.pop(PIXELS[self.kind])
        with phase_timer(VISION, whole.device, self.trace), loaded(self.module), self.alone():
            if self.before is None:
                output = self.original(whole, **inputs)
                if self.kind == "video" and isinstance(output, ModelOutput):
                    grids = self.family.video_grids(inputs | {PIXELS[self.kind]: whole})
                    # beam search repeats the features and not this
                    videos = zip(map(len, output["pooler_output"]), grids, strict=True)
                    output["frames"] = [(count, grid[0]) for count, grid in videos]
                return output
            seen, smaller = whole, None
            if self.before.grid_of is not None:
                smaller = self.family.smaller(self.kind, whole, inputs, self.before.grid_of)
            if smaller is not None:
                seen, inputs = smaller.pixel_values, inputs | smaller.inputs
            tower = self.family.view_tower if self.before.distinct_views else None
            with distinct_views(tower) as views:
                output = self.family.run(self.original, seen, **inputs)
            if views.source is not None:
                output.projections = views.expanded(output.projections)
        kept = copy.copy(output)
        vars(kept).update(vars(output))
        if smaller is not None:
            # the model counts features against placeholders, and reads none of those that are dropped
            spread = partial(spread_out, smaller.places, smaller.counts)
            output.pooler_output = spread(output.pooler_output)
            if getattr(output, "deepstack_features", None):
                output.deepstack_features = [spread(layer) for layer in output.deepstack_features]
            if self.kind == "video":
                output = self.family.video_output(output)
        if "hidden_states" in output and not inputs.get("output_hidden_states"):
            output.hidden_states = None
        counts = [rows.numel() // rows.shape[-1] for rows in output.pooler_output]
        # a key, since accelerate makes a mapping anew and drops attributes
        places = None if smaller is None else smaller.places
        output["encoded"] = Encoded(kept, seen, inputs, counts, places)
        return output

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lets the block's encoders that are called meanwhile do
        what the model's own methods do.
        """
        self.nested.inside = True
        try:
            yield
        finally:
            self.nested.inside = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Returns what a copy of the model encodes with: the method of its class."""
        module = memo.get(id(self.module), self.module)
        return MethodType(getattr(type(module), self.name), module)


def spread_out(places: list[Tensor], counts: list[int], features: Sequence[Tensor]) -> list[Tensor]:
    """Returns features of whole images or videos, those of smaller ones in their places and zeros beside.

    Args:
        places: of the features of each, (n_i,).
        counts: of the placeholders of each.
        features: of each, (n_i, d), perhaps with others behind.
    """
    found = []
    for own, count, rows in zip(places, counts, features, strict=True):
        whole = rows.new_zeros(count, rows.shape[-1])
        whole[own] = rows[: len(own)]
        found.append(whole)
    return found


@dataclass
class Choice:
    """What a method keeps of the images and videos of a prompt, each once.

    Args:
        family: the model's adapter.
        method: the method.
        encoded: the images, and the videos behind them.
        images: which of these each image or video of the prompt is, in the prompt's order; beam
            search repeats rows.
        counts: placeholders of each image or video of the prompt.
        ordinal: for each token of the prompt the image or video that it belongs to, -1 for text.
        places: of each of these where its tokens stand among its placeholders; None for those that
            were not shrunk.
    """

    family: Family
    method: BeforeModel
    encoded: Images
    images: list[int]
    counts: list[int]
    ordinal: Tensor
    places: list[Tensor | None]

    @classmethod
    def of(
        cls,
        family: Family,
        method: BeforeModel,
        outputs: dict[Kind, Any],
        input_ids: Tensor,
        video_frames: Sequence[int] | None = None,
    ) -> Self:
        """Returns the choice to be made of images and videos.

        Args:
            family: the model's adapter.
            method: the method.
            outputs: what the model encoded, by kind.
            input_ids: of the prompt, (B, L).
            video_frames: of each video, 0 for images, where frames are images to the model.

        Raises:
            InputError: when it is not known how they were encoded, or they do not fit the prompt.
        """
        encoded, masks = Images([]), []
        counts: list[list[int]] = []
        orders: list[list[int]] = []
        places: list[Tensor | None] = []
        for kind in KINDS:
            if (output := outputs.get(kind)) is None:
                continue
            is_kind, noted = input_ids == family.placeholder(kind), getattr(output, "encoded", None)
            given: Images | None = None
            if method.vision is not None:
                frames = method.vision.frames
                each = [
                    count
                    for count, video in zip(method.vision.counts, frames, strict=True)
                    if family.kind_of(video) == kind
                ]
            elif noted is not None:
                each = noted.counts
            else:
                raise InputError(
                    f"these {kind}s were encoded outside the pruning block; give "
                    f"{PIXELS[kind]}, or give what was encoded to the pruner"
                )
            # beam search repeats the rows of a prompt, but not what it encoded
            copies = max(1, int(is_kind.sum()) // max(1, sum(each)))
            if method.vision is None:
                assert noted is not None
                read = family.images if kind == "image" else family.videos
                inputs = noted.inputs | {"input_ids": input_ids[::copies]}
                if video_frames is not None:
                    inputs["video_frames"] = video_frames
                given = read(noted.output, noted.pixel_values, **inputs)
                each = given.counts if noted.places is None else each
                places += noted.places or [None] * len(each)
            found = int(is_kind.sum())
            if found != copies * sum(each):
                raise InputError(f"{found} {kind} placeholders do not fit {len(each)} {kind}s")
            # numbers of this kind follow those of the kinds before it
            first = sum(len(before) for before in counts)
            orders.append([first + index for index in repeated(each, is_kind)])
            counts.append(each)
            masks.append(is_kind)
            encoded = encoded if given is None else encoded.followed_by(given)
        # images and videos of the prompt in its order, by their numbers among all that were encoded
        flat = list(chain.from_iterable(counts))
        in_prompt = [[flat[index] for index in order] for order in orders]
        ordinal, items = merged_ordinals(masks, in_prompt)
        images = [orders[kind][index] for kind, index in items]
        encoded = encoded if method.vision is None else method.vision
        places = places or [None] * len(flat)
        in_order = [flat[image] for image in images]
        return cls(family, method, encoded, images, in_order, ordinal, places)

    def items(self, ids: Tensor, valid: Tensor, given: dict[str, Any]) -> PromptItems:
        """Returns the images and videos of prompts as the unpruned model gets them; of rows that beam search
        repeats the first.

        Args:
            ids: of the prompts, (B, L), without answers.
            valid: which tokens are no padding, (B, L).
            given: arguments of the forward.
        """
        family, device = self.family, self.family.device
        copies = max(1, len(self.images) // max(1, max(self.images, default=0) + 1))
        ids, valid = ids[::copies], valid[::copies]
        # items of the rows that are left, numbered anew in the order of the prompts
        ordinal = self.ordinal[::copies, : ids.shape[1]].contiguous()
        first = ordinal.unique()
        first = first[first >= 0]
        ordinal = torch.where(ordinal < 0, -1, torch.searchsorted(first, ordinal))
        members, described = first.tolist(), given | self.encoded.inputs

        def arguments(ids: Tensor, valid: Tensor) -> dict[str, Any]:
            return family.arguments(ids, valid, described)

        tensors = {"input_ids": ids.to(device), "attention_mask": valid.long().to(device)}
        return PromptItems(
            tensors
            | {"mm_encoder_outputs": family.outputs(self.encoded)}
            | arguments(tensors["input_ids"], tensors["attention_mask"]),
            ordinal.to(device),
            [self.counts[item] for item in members],
            [self.encoded.frames[self.images[item]] for item in members],
            arguments,
            members,
        )

    def reduce(
        self,
        layout: TokenLayout,
        visible: Sequence[Tensor],
        embed: Callable[[int, Tensor], Tensor],
        trace: Trace,
    ) -> Kept:
        """Returns what is kept of each image or video of the prompt:
        indices on the host, and features.

        Args:
            layout: the prompt's.
            visible: which of each image's placeholders are not masked, (n_i,).
            embed: embeddings of the tokens of a row where a mask (L,) is true.
            trace: gets the seconds that choosing took.
        """
        # each image is reduced once, at its first copy in the prompt
        unique = range(max(self.images, default=-1) + 1)
        first = [self.images.index(image) for image in unique]
        masks = [visible[at] for at in first]

        # the text behind each image of a group, embedded when a method asks for it
        def questions(members: list[int]) -> tuple[Tensor, ...]:
            rows = [int(layout.rows[first[image]]) for image in members]
            return tuple(embed(row, layout.question_mask[row]) for row in rows)

        changed = self.method.grid_of is not None
        chosen: list[tuple[int, Tensor, Tensor]] = []
        sizes: dict[int, Tensor] = {}
        with phase_timer(SELECTION, self.family.device, trace):
            for group in self.encoded.groups if changed else self.encoded.visible(masks):
                question = partial(questions, group.members)
                kept = self.method.reduce(replace(group.tokens, question=question))
                for member, image in enumerate(group.members):
                    rows, own = kept.features[member], self.places[image]
                    if own is not None:
                        chosen.append((image, own[kept.indices[member]], rows))
                        continue
                    # where nothing is dropped, newlines between the tokens have features, too
                    if len(rows) == group.size:
                        rows = group.filled(member, rows)
                    chosen.append((image, group.placeholders(kept.indices[member]), rows))
                    if kept.sizes is not None:
                        sizes[image] = kept.sizes[member].float().cpu()
            found = on_host([indices for _, indices, _ in chosen])
        # a masked image is none of the groups: nothing is kept of it
        indices, features = [torch.arange(0)] * len(first), [torch.zeros(0)] * len(first)
        for (image, _, rows), at in zip(chosen, found, strict=True):
            if changed:
                seen = masks[image][at]
                indices[image], features[image] = at[seen], rows[seen.to(rows.device)]
            else:
                # methods count the placeholders that are not masked
                indices[image] = masks[image].nonzero()[:, 0][at]
                features[image] = rows
        counted = None
        if sizes:
            counted = [sizes.get(i, torch.ones(len(indices[i]))) for i in self.images]
        return Kept(
            [indices[image] for image in self.images],
            [features[image] for image in self.images],
            counted,
        )


def on_host(indices: list[Tensor]) -> list[Tensor]:
    """Returns each image's indices (k,) on the CPU, in one transfer."""
    if not indices:
        return []
    return list(torch.cat(indices).cpu().split([len(one) for one in indices]))
