"""Choosing tokens inside vLLM: its own tower and projector give `VisionTokens`, a pruner chooses."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlm_prune.pruning.base import VisionPruner
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.layout import alike
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.serving.settings import kept_tokens
from vlm_prune.vlm.tokens import VisionTokens, as_is


@dataclass
class RecordedInputs:
    """What one pass through tower and projector has gone through.

    Args:
        normed: input of the attention in the tower layer whose output the projector gets.
        arguments: that attention's other arguments, by name.
        features: input of the projector's first linear layer.
    """

    normed: Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: dict[str, Any] = field(default_factory=dict)
    features: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def recorded_inputs(attention: nn.Module, linear: nn.Module) -> Iterator[RecordedInputs]:
    """Notes what goes into a tower layer's attention and a linear layer inside the block."""
    seen = RecordedInputs()

    def before_attention(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.normed = args[0] if args else kwargs["hidden_states"]
        seen.arguments = kwargs

    def before_linear(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.features = args[0]

    hooks = [
        attention.register_forward_pre_hook(before_attention, with_kwargs=True),
        linear.register_forward_pre_hook(before_linear),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Image:
    """One image after tower and projector, T of whose views the tower saw apart.

    Args:
        features: what the projector's first layer reads, (N, d_v).
        projected: the projector's output, (N, d_l).
        grids: rows and columns of each view, as in `VisionTokens`.
        seed: a number that depends on its pixels alone.
        tower: what queries and keys are made of, (T, ...) each.
        placeholders: N, or more where there are newlines.
    """

    features: Tensor
    projected: Tensor
    grids: tuple[tuple[int, int], ...]
    seed: int
    tower: tuple[Tensor, ...]
    placeholders: int

    @property
    def shape(self) -> Hashable:
        """Returns what images that can be reduced together have in common."""
        return (self.grids, self.placeholders, *(part.shape for part in self.tower))


@torch.no_grad()
def choose(
    pruner: VisionPruner,
    images: Sequence[Image],
    projector: Callable[[Tensor], Tensor],
    query_key: Callable[..., tuple[Tensor, Tensor]],
    has_cls: bool,
    pool: Callable[[Image, Tensor], Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Returns what a pruner keeps of each image: token indices (k,),
    ascending, and features (k, d_l).

    Args:
        pruner: the method.
        images: those of one batch.
        projector: from `Image.features` to `Image.projected`.
        query_key: queries and keys (M T, H, S, d) of `Image.tower`, concatenated over M images.
        has_cls: whether the first of the S tokens is a CLS token.
        pool: from what the tower says about the patches of T views (T, S, c) to tokens (N, c);
            the patches are the tokens unless given.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for members in alike([image.shape for image in images]):
        group = [images[index] for index in members]
        first = group[0]

        # images of one shape share tensors, as in a batch of transformers
        def queries_and_keys(group: list[Image] = group) -> tuple[Tensor, Tensor]:
            parts = zip(*(image.tower for image in group), strict=True)
            return query_key(*(torch.cat(part) for part in parts))

        def pooled(values: Tensor, group: list[Image] = group) -> Tensor:
            if pool is None:
                return as_is(values)
            views = values.split(len(values) // len(group))
            return torch.stack([pool(*both) for both in zip(group, views, strict=True)])

        tokens = VisionTokens(
            features=torch.stack([image.features for image in group]),
            projected=torch.stack([image.projected for image in group]),
            grids=first.grids,
            seeds=tuple(image.seed for image in group),
            projector=projector,
            query_key=queries_and_keys,
            has_cls=has_cls,
            pool=pooled,
            available=first.placeholders,
        )
        reduced = pruner.reduce(tokens)
        # vLLM has made placeholders for so many before it saw the image
        expected = kept_tokens(pruner, tokens.projected.shape[1], first.placeholders)
        for index, indices, features in zip(
            members, reduced.indices, reduced.features, strict=True
        ):
            if expected < first.placeholders and len(indices) != expected:
                raise InputError(
                    f"{type(pruner).__name__} kept {len(indices)} tokens where its budget means "
                    f"{expected}; vLLM needs the number before it sees the image"
                )
            kept[index] = (indices, features)
    return [kept[index] for index in range(len(images))]


def weight_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns weight (out, in) and bias of a linear layer of vLLM, whole, however it is stored.

    vLLM packs weights for the processor, quantizes them and splits them over GPUs; what the layer
    does to a unit matrix is its weight. On a CPU it keeps the bias of a bfloat16 layer in fp32.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight, linear.bias
    from vllm.distributed import tensor_model_parallel_all_gather

    layer: Any = linear
    # this GPU's part of the weight, then that of all, split along inputs or outputs
    size = layer.input_size_per_partition
    unit = torch.eye(size, dtype=layer.params_dtype, device=next(layer.parameters()).device)
    weight: Tensor = layer.quant_method.apply(layer, unit, None).T.contiguous()
    bias: Tensor | None = None if layer.bias is None else layer.bias.to(weight.dtype)
    if layer.input_size > size:
        weight = tensor_model_parallel_all_gather(weight, 1)
    elif layer.output_size > len(weight):
        weight = tensor_model_parallel_all_gather(weight, 0)
        bias = None if bias is None else tensor_model_parallel_all_gather(bias, 0)
    return weight, bias


def two_layers(one: nn.Module, act: Callable[[Tensor], Tensor], two: nn.Module) -> Projector:
    """Returns the projector that two linear layers of vLLM and the activation between them are.

    Args:
        one: the first layer.
        act: between them.
        two: the second layer.
    """
    return Projector.of(*weight_of(one), act, *weight_of(two))


def all_heads(tensor: Tensor, splits: int) -> Tensor:
    """Returns heads (M, H, S, d) of all GPUs that a tower is split
    over, given those of this one.
    """
    if splits == 1:
        return tensor
    from vllm.distributed import tensor_model_parallel_all_gather

    whole: Tensor = tensor_model_parallel_all_gather(tensor.contiguous(), 1)
    return whole
