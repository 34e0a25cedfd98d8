"""Attention of a decoder's layers computed by another function, while a block is open.

transformers looks an attention function and a mask function up under the name in a model's
configuration. Both are registered under one name here: without a mask function of that name a model
would get no mask at all, padded or not. What the other function does not compute runs on SDPA, with
the mask that SDPA would have got.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_prune.vlm.attention import SPARSE, expanded_mask
from vlm_prune.vlm.block import Hook, by_name, refuse_compiled
from vlm_prune.vlm.cache import cache_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import Family, family_of
from vlm_prune.vlm.forwards import Forwards
from vlm_prune.vlm.layout import image_runs

OTHER_SOFTMAX = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that change what is summed or normalized."""


@dataclass(frozen=True)
class AttentionCall:
    """Attention of one layer in one forward, after rotation and with the cache appended.

    Args:
        query: (B, H, n, d).
        key: (B, G, K, d).
        value: (B, G, K, v).
        valid: which keys are no padding, (B, K); None where all are.
        scaling: factor of the products.
        layer: number of the decoder layer, from 0.
        tails: tokens of each row behind its last image token; 0 where that is not known.
        rotary: cosines and sines of the tokens' positions, as the layer got them; None unless the
            function reads them.
        cache: keys and values of all layers; None without one.
        frames: of each row the image, or frame of a video, of each token that is no padding, -1 for
            text, (n_i,), as they were before any was dropped; None unless the function reads them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    scaling: float
    layer: int
    tails: tuple[int, ...]
    rotary: tuple[Tensor, Tensor] | None
    cache: Any
    frames: Sequence[Tensor] | None = None


class AttentionFunction(Protocol):
    """What computes attention in a block; it may leave a call to SDPA by returning None."""

    @property
    def reads_rotation(self) -> bool:
        """Returns whether it reads the cosines and sines of positions."""

    @property
    def reads_frames(self) -> bool:
        """Returns whether it reads which image or frame each token is of."""

    def prefill(self, call: AttentionCall) -> Tensor | None:
        """Returns the causal attention of a whole prompt, n = K, as (B, n, H, v);
        None leaves the call to SDPA.
        """

    def decode(self, call: AttentionCall) -> Tensor | None:
        """Returns the attention of one new token, n = 1, as (B, 1, H, v);
        None leaves the call to SDPA.
        """

    def left_dense(self, reason: str) -> None:
        """Notes that a call of more than one query went to SDPA, and why."""


@dataclass
class Current:
    """What a thread's forward was given.

    Args:
        tails: as for `AttentionCall`.
        cache: likewise.
        rotary: likewise, of the layer under way.
        frames: as for `AttentionCall`.
    """

    tails: tuple[int, ...] = ()
    cache: Any = None
    rotary: tuple[Tensor, Tensor] | None = None
    frames: Sequence[Tensor] | None = None


@dataclass
class AttentionBlock:
    """One model's block: its function, and the forwards that are under way.

    Args:
        family: the model's adapter.
        function: computes attention.
        forwards: those under way, with what their layers are given.
    """

    family: Family
    function: AttentionFunction
    forwards: Forwards[Current] = field(default_factory=Forwards)

    def __post_init__(self) -> None:
        self.config = self.family.decoder.config

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Keeps the hooks on the model, and the function's name in
        its configuration, while open.
        """
        multimodal = self.family.multimodal
        handles = [
            multimodal.register_forward_pre_hook(Hook(self, self.before_merge), with_kwargs=True),
            multimodal.register_forward_hook(Hook(self, self.after_merge), always_call=True),
        ]
        if self.function.reads_rotation:
            for layer in self.family.decoder.layers:
                hook = Hook(self, self.before_layer)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        _BLOCKS[id(self.config)] = self
        self.config._attn_implementation_internal = SPARSE
        try:
            yield
        finally:
            try:
                # the masks of other threads are made for this block's function
                self.forwards.wait()
            finally:  # also where waiting is interrupted
                self.config._attn_implementation_internal = "sdpa"
                del _BLOCKS[id(self.config)]
                for handle in handles:
                    handle.remove()

    @property
    def current(self) -> Current:
        """Returns what this thread's forward was given."""
        return self.forwards.given or Current()

    def before_merge(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes where the prompts' last image tokens are.

        Args:
            module: that puts image features into the prompt.
            args: of its forward.
            kwargs: of its forward.
        """
        given = by_name(module, args, kwargs)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        tails: tuple[int, ...] = ()
        if ids is not None and ids.shape[1] > 1:
            tails = tokens_behind_images(self.family, ids, mask)
        current = Current(tails, cache_of(given))
        if ids is not None and tails and self.function.reads_frames:
            found = frame_numbers(self.family, ids, given.get("video_grid_thw"))
            rows = zip(found, valid_tokens(ids, mask), strict=True)
            current.frames = [frames[valid] for frames, valid in rows]
        self.forwards.enter(current)

    def after_merge(self, module: Any, args: Any, output: Any) -> None:
        """Notes that the thread's forward is over, or failed.

        Args:
            module: that puts image features into the prompt.
            args: of its forward.
            output: of its forward.
        """
        self.forwards.leave()

    def before_layer(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes the rotation of a layer's tokens.

        Args:
            module: the layer.
            args: of its forward.
            kwargs: of its forward.
        """
        self.current.rotary = kwargs.get("position_embeddings")


_BLOCKS: dict[int, AttentionBlock] = {}
"""Open blocks by the identity of the configuration that their layers look the function up in."""


def tokens_behind_images(family: Family, ids: Tensor, mask: Any) -> tuple[int, ...]:
    """Returns how many tokens of each row follow its last image or video token; 0 without one.

    Pruning keeps them all, so that the number holds in layers with fewer image tokens too.

    Args:
        family: the model's adapter.
        ids: of the prompt, (B, n).
        mask: its attention mask, (B, past + n); None where nothing is padding.
    """
    placeholders = [family.placeholder(kind) for kind in family.kinds]
    shown = torch.isin(ids, torch.tensor(placeholders, device=ids.device))
    valid = valid_tokens(ids, mask)
    # of each token, how many image tokens stand at or behind it
    left = (shown & valid).flip(1).cumsum(1).flip(1)
    behind = ((left == 0) & valid).sum(1) * shown.any(1)
    return tuple(behind.tolist())


def valid_tokens(ids: Tensor, mask: Any) -> Tensor:
    """Returns which tokens of a prompt are no padding, (B, n); arguments are those of
    `tokens_behind_images`.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -ids.shape[1] :].bool().to(ids.device)
    return torch.ones_like(ids, dtype=torch.bool)


def frame_numbers(family: Family, ids: Tensor, grids: Tensor | None) -> Tensor:
    """Returns the image or frame of each token, counted in its row, -1 for text, (B, n).

    An image is an unbroken run of placeholders, as is a frame that stands between markers; a run of
    several frames is split by their grid, or where all frames have as many tokens; what stands behind
    the last frame goes with it.

    Args:
        family: the model's adapter.
        ids: of the prompt, (B, n).
        grids: frames, rows and columns of patches of each video; None unless they are given.
    """
    found = torch.full_like(ids, -1)
    # tokens of each frame of all videos
    known = [] if grids is None else family.video_grids({"video_grid_thw": grids})
    sizes = iter([rows * columns for frames, rows, columns in known for _ in range(frames)])
    video = family.placeholder("video") if "video" in family.kinds else None
    for row, own in enumerate(ids.cpu()):
        shown = [own == family.placeholder(kind) for kind in family.kinds]
        number = 0
        runs = image_runs(torch.stack(shown).any(0)[None])
        for _, first, length in runs:
            frames = 1
            if int(own[first]) == video:
                size = family.tokens_per_frame or next(sizes, length)
                frames = max(1, length // size)
                for _ in range(frames - 1):  # those of the same run
                    next(sizes, None)
            part = (torch.arange(length) // max(1, length // frames)).clamp(max=frames - 1)
            found[row, first : first + length] = (number + part).to(found)
            number += frames
    return found


def _causal_mask(**kwargs: Any) -> Tensor | None:
    """Returns what tells padding, (B, K), of a prompt whose attention is plainly causal; None where
    there is none. All else gets SDPA's own mask.
    """
    length, mask = int(kwargs["q_length"]), kwargs.get("attention_mask")
    if (
        kwargs.get("mask_function") is not causal_mask_function
        or not kwargs.get("allow_is_causal_skip", True)
        or not 1 < length == int(kwargs["kv_length"])
        or (mask is not None and mask.shape[1] != length)
    ):
        own: Tensor | None = sdpa_mask(**kwargs)
        return own
    return None if mask is None or bool(mask.all()) else mask


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends as the block's function does where it can, else as SDPA; transformers calls it.

    Args:
        module: the attention module.
        query: (B, H, n, d).
        key: (B, G, K, d).
        value: (B, G, K, v).
        attention_mask: valid keys (B, K), a mask (B, 1, n, K), or None.
        kwargs: of the call.
    """
    block = _BLOCKS.get(id(module.config))
    if block is not None:
        function = block.function
        reason = _unfit(module, query, key, attention_mask, kwargs)
        if not reason:
            valid, current = attention_mask, block.current
            if valid is not None and valid.ndim == 4:
                valid = valid[:, 0, 0]
            tails = current.tails or (0,) * len(query)
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            call = AttentionCall(
                query, key, value, valid, scaling, module.layer_idx, tails,
                current.rotary, current.cache, current.frames,
            )  # fmt: skip
            output = function.decode(call) if query.shape[2] == 1 else function.prefill(call)
            if output is not None:
                return output, None
        elif query.shape[2] > 1:
            function.left_dense(reason)
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = expanded_mask(attention_mask)
    found: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, **kwargs
    )
    return found


def _unfit(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> str:
    """Returns why a call is left to SDPA, or nothing.

    Args:
        module: the attention module that calls.
        query: (B, H, n, d).
        key: (B, G, K, d).
        mask: that the module was given, or None.
        kwargs: of the call.
    """
    length, causal = query.shape[2], kwargs.get("is_causal")
    if getattr(module, "layer_idx", None) is None:
        return "no decoder layer"
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "not causal"
    if any(kwargs.get(name) is not None for name in OTHER_SOFTMAX):
        return "another softmax"
    if kwargs.get("sliding_window") is not None:
        return "a sliding window"
    if (
        module.training
        or kwargs.get("dropout")
        or (torch.is_grad_enabled() and query.requires_grad)
    ):
        return "gradients"
    if length > 1 and length != key.shape[2]:
        return "tokens behind a cache"
    if mask is not None and mask.ndim == 4 and (length > 1 or mask.dtype != torch.bool):
        return "a mask of its own"
    return ""


def check_attention(family: Family) -> None:
    """Raises `InputError` unless the decoder's attention is causal and SDPA's, whose place a function can
    take.
    """
    decoder = family.decoder
    if "full_attention" in family.both_ways:
        raise InputError(
            f"an image's tokens see each other both ways in {family.model.config.model_type} models, "
            "and sparse attention is causal; prune their tokens instead"
        )
    found = decoder.config._attn_implementation
    if found == SPARSE:
        raise InputError(
            "this model is inside a block of sparse attention already; leave that first"
        )
    if not decoder._supports_sdpa:
        raise InputError(
            f"sparse attention stands in for SDPA, which {decoder.config.model_type} models lack"
        )
    if found != "sdpa":
        raise InputError(
            f"sparse attention stands in for SDPA, and this model has {found!r}; "
            "load it with --attn sdpa"
        )


@contextmanager
def replaced_attention(model: Any, function: AttentionFunction) -> Iterator[None]:
    """Lets `function` compute the attention of a model's decoder while the block is open.

    Args:
        model: a model of a supported family, or a PEFT model around one.
        function: of its attention.

    Raises:
        InputError: when the model has no SDPA, is compiled, or is inside such a block already.
    """
    refuse_compiled(model)
    family = family_of(model)
    check_attention(family)
    ALL_ATTENTION_FUNCTIONS.register(SPARSE, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SPARSE, _causal_mask)
    with AttentionBlock(family, function).hooks():
        yield
