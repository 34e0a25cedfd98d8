"""A pruning block: hooks on an unmodified model, and what keeps them from doing harm.

Everything that a forward needs to know travels with it, as an argument of the modules inside, so
several threads may use the model at once. Hooks say nothing to a copy of the model.
"""

import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from vlm_prune.vlm.cache import CachedPrompt, CachedTokens, cache_of, hold, prompt_in
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import Family, family_of
from vlm_prune.vlm.families.base import KINDS, PIXELS, Kind
from vlm_prune.vlm.forwards import Forwards
from vlm_prune.vlm.layer_pruning import Forward, InsideModel, LayerPruning, position_deltas
from vlm_prune.vlm.layout import (
    TokenLayout,
    grid_lines,
    image_columns,
    image_seeds,
    merged_ordinals,
    repeated,
)
from vlm_prune.vlm.prompt_pruning import BeforeModel, Choice, Encoder, Positions, PromptItems
from vlm_prune.vlm.tokens import is_right_padded
from vlm_prune.vlm.trace import Trace

COMPILED = (
    "a compiled model runs without the hooks that prune; prune the model that is not compiled, and "
    "undo compile() on it and its modules"
)

FORWARD, CALL = "vlm_prune_forward", "vlm_prune_call"


def keeps_positions(family: Family, positions: Positions) -> bool:
    """Returns whether kept tokens keep the positions that they had in the full prompt.

    Raises:
        InputError: when the family's positions cannot be renumbered.
    """
    if positions == "contiguous" and family.mrope:
        raise InputError(
            "positions 'contiguous' would lose the rows and columns of this model's positions; "
            "give 'auto' or 'original'"
        )
    return positions == "original" or family.mrope


@dataclass
class Call:
    """What the whole model was asked for, beside what the modules inside it get.

    Args:
        labels: of the full prompt; shortened in place once it is known what is kept.
        drafts: how many of the last tokens are no part of the prompt.
    """

    labels: Tensor | None = None
    drafts: int = 0


def by_name(module: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a module's forward by name, in a dictionary of their own: hooks of
    others may keep what they were given.

    Args:
        module: whose forward they are of.
        args: those given by position.
        kwargs: those given by name.
    """
    if not args:
        return dict(kwargs)
    names = list(signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


@dataclass
class Hook:
    """A hook of a block; in a copy of the model it does nothing."""

    block: object | None
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return None if self.block is None else self.call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(None, print)


@dataclass
class Block:
    """The hooks of one block, and what they know of its model.

    Args:
        family: the model's adapter.
        layers: cuts inside the model.
        before: the method before the language model, if there is one.
        trace: what happened in the last prefill.
        video_frames: of each video of a prompt, 0 for images, where frames are images to the model.
        forwards: those under way, with the prompt that each one's cache holds.
    """

    family: Family
    layers: LayerPruning
    before: BeforeModel | None
    trace: Trace
    video_frames: Sequence[int] | None = None
    open: bool = True
    forwards: Forwards[CachedPrompt | None] = field(default_factory=Forwards)
    last: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        family = self.family
        self.hooked = (family.model, family.multimodal, family.decoder, *family.decoder.layers)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Keeps the hooks on the model, and its way of encoding images replaced, while open."""
        family = self.family
        model, multimodal, decoder = family.model, family.multimodal, family.decoder
        handles = [
            model.register_forward_pre_hook(Hook(self, self.before_model), with_kwargs=True),
            multimodal.register_forward_pre_hook(Hook(self, self.before_merge), with_kwargs=True),
            multimodal.register_forward_hook(Hook(self, self.after_merge), always_call=True),
            decoder.register_forward_pre_hook(Hook(self, self.before_decoder), with_kwargs=True),
            decoder.register_forward_hook(Hook(self, self.after_decoder), with_kwargs=True),
        ]
        for number, layer in enumerate(decoder.layers):
            hook = Hook(self, partial(self.before_layer, number))
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        attributes, previous, nested = vars(multimodal), {}, threading.local()
        # a model that was compiled in a function looks for it, and is compiled anew, with the hooks
        encoders = [Encoder(family, self.before, self.trace, kind, nested) for kind in family.kinds]
        for encoder in encoders:
            previous[encoder.name] = attributes.get(encoder.name)
            setattr(multimodal, encoder.name, encoder)
        try:
            yield
        finally:
            try:
                self.close()
            finally:  # also where waiting is interrupted
                for handle in handles:
                    handle.remove()
                for encoder in encoders:
                    if attributes.get(encoder.name) is encoder:
                        delattr(multimodal, encoder.name)
                        if previous[encoder.name] is not None:
                            setattr(multimodal, encoder.name, previous[encoder.name])

    def close(self) -> None:
        """Lets no forward enter, and waits for those of other threads."""
        self.open = False
        self.forwards.wait()

    def before_model(
        self, model: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Notes the arguments of the whole model's forward, and lets it enter.

        Args:
            model: the whole model.
            args: of its forward.
            kwargs: of its forward.
        """
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
            raise InputError(COMPILED)
        self.refuse_compiled()
        labels, last = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        drafts = last - 1 if isinstance(last, int) and last > 1 else 0
        if not self.open or (labels is None and not drafts):
            return None
        call = Call(drafts=drafts)
        if labels is not None:
            call.labels = kwargs["labels"] = labels.clone()
        return args, kwargs | {CALL: call}

    def before_merge(
        self, module: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Encodes images and videos and chooses among their tokens, where there are some.

        Args:
            module: that puts image features into the prompt.
            args: of its forward.
            kwargs: of its forward.
        """
        call = kwargs.pop(CALL, None) or Call()
        if not self.open:
            return args, kwargs
        if getattr(self.last, "probing", False):
            self.forwards.enter(None)
            return args, kwargs
        self.refuse_compiled()
        kwargs = by_name(module, args, kwargs)
        given = kwargs.get("mm_encoder_outputs") or {}
        features = {} if isinstance(given, Tensor) else given
        # of each kind what was encoded beforehand, else the pixels
        sources: dict[Kind, Any] = {}
        for kind in KINDS:
            for source in (features.get(kind), kwargs.get(PIXELS[kind])):
                if source is not None:
                    sources.setdefault(kind, source)
        if "video" in sources and "video" not in self.family.kinds:
            raise InputError(
                f"videos of {self.family.model.config.model_type} models are not pruned; give their "
                "frames as images"
            )
        # a cache of a pruned prompt may be used while the forward runs, by this thread
        prompt = prompt_in(cache_of(kwargs))
        self.forwards.enter(prompt)
        if prompt is not None:
            prompt.open = True
            if prompt.deltas is not None:
                module.rope_deltas = prompt.deltas
        shown, embeds = bool(sources), kwargs.get("inputs_embeds")
        if not shown and embeds is not None and embeds.shape[1] > 1:
            raise InputError(
                "inputs_embeds alone do not tell which tokens are images'; give input_ids and "
                "pixel_values, or pixel_values beside inputs_embeds"
            )
        if not shown and prompt is None:
            return (), kwargs
        check_arguments(self.family, kwargs)
        # the module merges what it is given, and leaves out the tower
        if shown:
            encoded = {
                kind: features[kind]
                if features.get(kind) is not None
                else self.encode(module, kind, kwargs)
                for kind in sources
            }
            kwargs = kwargs | {"mm_encoder_outputs": encoded}
            for kind in sources:
                kwargs.pop(PIXELS[kind], None)
        kwargs[FORWARD] = call, self.forward(kwargs, call, sources)
        return (), kwargs

    def refuse_compiled(self) -> None:
        """Raises `InputError` when a module that carries hooks, or one around it, has been compiled or
        replaced since the block was entered.
        """
        family, hooked = self.family, self.hooked
        found = (family.model, family.multimodal, family.decoder, *family.decoder.layers)
        if any(map(is_compiled, hooked)) or any(map(operator.is_not, found, hooked)):
            raise InputError(COMPILED)

    def encode(self, module: Any, kind: Kind, kwargs: dict[str, Any]) -> Any:
        """Runs tower and projector, as `generate` does before it calls the model.

        Args:
            module: that puts features into the prompt.
            kind: of what is encoded.
            kwargs: of the module's forward.
        """
        encoder = getattr(module, f"get_{kind}_features")
        names = signature(encoder).parameters
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return encoder(**given, return_dict=True)

    def forward(self, kwargs: dict[str, Any], call: Call, sources: dict[Kind, Any]) -> Forward:
        """Returns where the tokens of a forward are and what is kept of its images and videos.

        Args:
            kwargs: of the module that puts features into the prompt.
            call: what the whole model was asked for.
            sources: what images and videos were given as; empty where the forward has none.
        """
        family, cache = self.family, cache_of(kwargs)
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        ids = self.input_ids(kwargs)
        length = ids.shape[1]
        prompt, past = prompt_in(cache), 0 if cache is None else int(cache.get_seq_length())
        # without a mask all tokens are real; with one it also covers what the cache holds
        whole = torch.ones(len(ids), past + length, dtype=torch.bool)
        if mask is not None:
            whole = mask.bool().cpu()
        seen = whole.sum(1, keepdim=True)
        valid, before = whole[:, -length:], whole[:, : whole.shape[1] - length]
        # a plain cache, or none, counts as a prompt of which nothing was dropped
        if prompt is None:
            prompt = CachedPrompt(past, {0: CachedTokens.whole(before[:, :past])})
        if prompt.batch != len(ids):
            raise InputError(
                f"this cache holds a pruned prompt of {prompt.batch} rows, not of {len(ids)}"
            )
        counts: list[int] = []
        choice, frames = None, list[int]()
        ordinal, lines = torch.full_like(ids, -1), None
        if sources:
            if self.before is not None:
                # which image each placeholder is of, as they were encoded here
                outputs = kwargs["mm_encoder_outputs"]
                choice = Choice.of(family, self.before, outputs, ids, self.video_frames)
                ordinal, counts = choice.ordinal, choice.counts
                frames = [choice.encoded.frames[image] for image in choice.images]
                if self.before.vision is None:
                    spent = choice.encoded.flops
                    self.trace.tower_flops = [spent[image] for image in choice.images]
            else:
                # or as their processor says, where no method needs the encoded images
                given = kwargs | {"video_frames": self.video_frames}
                each = [family.counts(ids, given, kind) for kind in sources]
                masks = [ids == family.placeholder(kind) for kind in sources]
                ordinal, order = merged_ordinals(masks, each)
                counts = [each[kind][index] for kind, index in order]
                of_kind = [
                    family.item_sizes(ids, given)[1]
                    if kind == "image" and self.video_frames is not None
                    else video_frames(kwargs["mm_encoder_outputs"][kind], mask, per_item)
                    for kind, mask, per_item in zip(sources, masks, each, strict=True)
                ]
                frames = [of_kind[kind][index] for kind, index in order]
            if "video" in sources or any(frames):
                lines = family.frame_lines(ids, ordinal, frames)
        # tokens behind the prompt: those that assisted decoding tries, or answers without a cache
        drafts = call.drafts if sources else 0
        if sources and cache is None:
            drafts = self.drafts(next(iter(sources.values())), ids, drafts)
        if lines is None and family.row_breaks:
            lines = grid_lines(ordinal)
        layout = TokenLayout.of(ordinal, valid, counts, drafts, lines)
        forward = Forward(layout, past, prompt, is_right_padded(valid), layout.counts)
        forward.seen = seen
        forward.blocks = family.blocks(kwargs, length)
        if choice is not None:
            # placeholders of each image that the attention mask does not hide
            rows = zip(layout.rows, image_columns(ordinal, counts), strict=True)
            visible = [valid[row, columns] for row, columns in rows]
            if self.before is not None and self.before.shown is not None:
                end = length - drafts
                items = choice.items(ids[:, :end], valid[:, :end], kwargs)
                left = self.shown(self.before.shown, items)
                for number, stays in zip(items.numbers, left, strict=True):
                    visible[number] = visible[number] & stays

            def embed(row: int, chosen: Tensor) -> Tensor:
                if embeds is not None:
                    chosen_rows: Tensor = embeds[row][chosen.to(embeds.device)]
                    return chosen_rows
                table = family.model.get_input_embeddings()
                found: Tensor = table(ids[row][chosen].to(family.device))
                return found

            forward.kept = choice.reduce(layout, visible, embed, self.trace)
        if self.layers.inside is not None:
            # before which layers each image is cut, and to how many tokens
            forward.seeds = image_seeds(ids, layout)
            for number, count in enumerate(layout.counts):
                cuts = self.layers.inside.cuts(count, frames=frames[number]) if count else []
                for cut in cuts:
                    forward.due.setdefault(cut.layer, {})[number] = cut.keep
        return forward

    def shown(
        self, choose: Callable[[PromptItems], list[Tensor]], items: PromptItems
    ) -> list[Tensor]:
        """Returns which placeholders of each image or video are left to the method, on the host; the model
        may be run meanwhile as if there was no block.

        Args:
            choose: finds them.
            items: the images and videos.
        """
        self.last.probing = True
        try:
            return [mask.cpu() for mask in choose(items)]
        finally:
            self.last.probing = False

    def input_ids(self, kwargs: dict[str, Any]) -> Tensor:
        """Returns token ids (B, L) on the host; where embeddings are given,
        zeros but for images and videos.

        Raises:
            InputError: when nothing tells where images are.
        """
        if kwargs.get("input_ids") is not None:
            ids: Tensor = kwargs["input_ids"].cpu()
            return ids
        embeds: Tensor = kwargs["inputs_embeds"]
        table = self.family.model.get_input_embeddings()
        ids = torch.zeros(embeds.shape[:2], dtype=torch.long)
        for kind in self.family.kinds:
            token = self.family.placeholder(kind)
            # a placeholder is where the embedding is that of the kind's token
            shown = table(torch.tensor(token, device=embeds.device)).to(embeds)
            ids[(embeds == shown).all(-1).cpu()] = token
        return ids

    def drafts(self, source: Any, ids: Tensor, drafts: int) -> int:
        """Returns how many of the last tokens answer a prompt that was given before without a
        cache.

        Args:
            source: what the images were given as.
            ids: of the prompt, (B, L).
            drafts: what the call says of their number.
        """
        seen, prompt = getattr(self.last, "prompt", (None, ids))
        length = prompt.shape[1]
        # the same images and the same beginning: what is behind it was answered
        if seen is not None and seen() is source and torch.equal(ids[:, :length], prompt):
            return ids.shape[1] - length
        self.last.prompt = (weakref.ref(source), ids[:, : ids.shape[1] - drafts])
        return drafts

    def after_merge(self, module: Any, args: Any, output: Any) -> None:
        """Notes that the thread's forward is over, or failed.

        Args:
            module: that puts image features into the prompt.
            args: of its forward.
            output: of its forward.
        """
        prompt = self.forwards.leave()
        if prompt is not None:
            prompt.open = False

    def before_decoder(
        self, module: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Cuts at the decoder's input.

        Args:
            module: the decoder.
            args: of its forward.
            kwargs: of its forward.
        """
        if kwargs.get(FORWARD) is None:
            return None
        _, forward = kwargs[FORWARD]
        return args, self.layers.before_decoder(forward, kwargs)

    def before_layer(
        self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Cuts before a layer, and gives it what its tokens need.

        Args:
            number: of the layer, from 0.
            layer: the layer.
            args: of its forward.
            kwargs: of its forward.
        """
        if kwargs.get(FORWARD) is None:
            return None
        kwargs = dict(kwargs)
        _, forward = kwargs.pop(FORWARD)
        args = args or (kwargs.pop("hidden_states"),)
        return self.layers.before_layer(forward, number, layer, args, kwargs)

    def after_decoder(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Notes what the cache holds now, shortens labels, and says what was kept.

        Args:
            module: the decoder.
            args: of its forward.
            kwargs: of its forward.
            output: of its forward.
        """
        if kwargs.get(FORWARD) is None:
            return
        call, forward = kwargs[FORWARD]
        last = forward.active[max(forward.active)]
        cache = cache_of(kwargs) or (cache_of(output) if isinstance(output, dict) else None)
        if cache is not None:
            active = forward.active
            # layers that begin to hold other tokens than the one before them
            starts = [
                n for n in range(len(module.layers)) if not n or active[n] is not active[n - 1]
            ]
            layers = {number: active[number].cached for number in starts}
            length = forward.past + forward.layout.valid.shape[1]
            if any(tokens.pruned for tokens in layers.values()):
                prompt = prompt_in(cache) or CachedPrompt(0, {}, len(module.layers))
                prompt.length, prompt.layers = length, layers
                if self.family.mrope:
                    prompt.deltas = position_deltas(forward)
                hold(cache, prompt)
        if call.labels is not None and last.layout is not forward.layout:
            # in place, so that the loss, outside, sees labels of what is left
            column = last.layout.column.to(call.labels.device)
            valid = last.layout.valid.to(call.labels.device)
            call.labels.data = torch.where(valid, call.labels.gather(1, column), -100)
        if forward.wanted and last.cached.pruned:
            # Gemma 4 tells from the prompt's length whether its decoder has left other rows out
            output.last_hidden_state = output.last_hidden_state[:, -forward.wanted :]
        if forward.available:
            self.note(forward, len(module.layers))

    def note(self, forward: Forward, layers: int) -> None:
        """Writes into the trace what a prefill kept.

        Args:
            forward: the prefill.
            layers: of the decoder.
        """
        trace, first = self.trace, forward.active[-1].layout
        trace.available = forward.available
        trace.entered = [] if forward.kept is None else first.indices()
        trace.cuts = [forward.cuts[number] for number in sorted(forward.cuts)]
        trace.kept = forward.active[layers - 1].layout.indices()
        trace.computed = [forward.active[number].layout.counts for number in range(layers)]


def video_frames(output: Any, mask: Tensor, counts: list[int]) -> list[int]:
    """Returns frames of each video of a prompt, 0 for images and for what was encoded outside.

    Args:
        output: of the model's encoder.
        mask: where the placeholders of the kind are, (B, L).
        counts: placeholders of each image or video of the prompt.
    """
    frames = output.get("frames")
    if frames is None:
        return [0] * len(counts)
    videos = repeated([tokens for tokens, _ in frames], mask)
    return [frames[video][1] for video in videos]


def refuse_compiled(model: Any) -> None:
    """Raises `InputError` when a model or one of its modules is compiled."""
    if any(map(is_compiled, model.modules())):
        raise InputError(COMPILED)


def is_compiled(module: Any) -> bool:
    """Returns whether a module is compiled, its forward is, or it stands for a compiled one."""
    attributes = vars(module)
    return (
        attributes.get("_compiled_call_impl") is not None
        or "_orig_mod" in attributes["_modules"]
        or (
            "forward" in attributes and hasattr(attributes["forward"], "_torchdynamo_orig_callable")
        )
    )


def check_video_frames(family: Family, video_frames: Sequence[int] | None) -> None:
    """Raises `InputError` unless the frames of each video of a prompt may be given.

    Args:
        family: the model's adapter.
        video_frames: of each video, 0 for images; None where they are not given.
    """
    if video_frames is None:
        return
    if not family.frames_as_images:
        raise InputError(
            f"frames of a video are no images to {family.model.config.model_type} models; leave out "
            "video_frames"
        )
    if any(type(count) is not int or count < 0 for count in video_frames):
        raise InputError(
            f"video_frames {list(video_frames)} are no counts; give the frames of each video, 0 for an "
            "image"
        )


def check_arguments(family: Family, kwargs: dict[str, Any]) -> None:
    """Raises `InputError` unless a forward's arguments are such that its prompt can be pruned.

    Args:
        family: the model's adapter.
        kwargs: of the module that puts image features into the prompt.
    """
    mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
    if getattr(cache, "is_compileable", False) or not (
        mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    ):
        raise InputError(
            "pruning needs a cache that grows and an attention mask (batch, length); leave out "
            "static caches and masks made beforehand"
        )
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        configured = getattr(family.model.config, name, None)
        if kwargs.get(name) not in (None, configured):
            raise InputError(
                f"{name} {kwargs[name]!r} is not that of the model's configuration, which methods "
                f"read; set it there instead of {configured!r}"
            )
    if is_packed(family, kwargs):
        raise InputError(
            "these position ids or lengths pack several sequences into one row; give each a row of "
            "its own, or an attention_mask beside position_ids of one sequence"
        )


def is_packed(family: Family, kwargs: dict[str, Any]) -> bool:
    """Returns whether transformers would take a forward's rows for several sequences each: by their
    lengths, or by position ids that do not rise by one where nothing else masks.

    Args:
        family: the model's adapter.
        kwargs: of the module that puts image features into the prompt.
    """
    if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")):
        return True
    positions, config = kwargs.get("position_ids"), family.decoder.config
    if positions is not None and family.mrope:
        # only the row of the text, in front of those of time, height and width, orders tokens
        positions = positions[0] if positions.ndim == 3 and len(positions) == 4 else None
    if positions is None or positions.shape[-1] < 2:
        return False
    mask, flash = kwargs.get("attention_mask"), "flash" in (config._attn_implementation or "")
    if mask is not None and not (flash and bool(mask.all())):
        return False
    steps, use_cache = positions.diff(), kwargs.get("use_cache")
    cached = cache_of(kwargs) is not None or (config.use_cache if use_cache is None else use_cache)
    return bool((steps < 1 if cached and not flash else steps != 1).any())


@contextmanager
def pruned(
    model: Any,
    before: BeforeModel | None = None,
    inside: InsideModel | None = None,
    video_frames: Sequence[int] | None = None,
) -> Iterator[Trace]:
    """Prunes every `generate` and forward of `model` while the block is open.

    `generate`, its stopping rules, streamers and caches see the full prompt. Logits and hidden
    states of a direct forward have the length of what is kept; labels are shortened with it.

    Args:
        model: a model of a supported family, or a PEFT model around one.
        before: a method before the language model.
        inside: a method inside it, which may follow one before it.
        video_frames: of each video of a prompt, 0 for images, in its order; where frames are images to
            the model.

    Raises:
        InputError: when the model is inside a block already, or `video_frames` are no counts or not
            what such a model needs.
    """
    refuse_compiled(model)
    family, trace = family_of(model), Trace()
    check_video_frames(family, video_frames)
    renumbers, contiguous = (
        part is not None and not keeps_positions(family, part.positions)
        for part in (before, inside)
    )
    layers = LayerPruning(family.decoder, inside, renumbers, contiguous, trace, family.both_ways)
    block = Block(family, layers, before, trace, video_frames)
    hooks = family.decoder._forward_pre_hooks.values()
    if any(isinstance(hook, Hook) and hook.block is not None for hook in hooks):
        raise InputError(
            "this model is inside a pruning block already; leave that first, or combine methods "
            "in one, such as 'divprune+fastv'"
        )
    with block.hooks():
        yield trace
