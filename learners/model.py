"""Wings on a Hugging Face vision-language model: attach and detach.

There is no `merge_adapter`: the learners are attention over the input features beside the main
attention, not a change of its weights, so there is no matrix that they could be folded into.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlm_prune.learners.columns import ColumnSum, Route, with_column_sum
from vlm_prune.learners.config import WingsConfig
from vlm_prune.learners.lorra import LoRRA
from vlm_prune.learners.rotary import Tables
from vlm_prune.learners.router import Router
from vlm_prune.learners.tokens import PromptTokens, remember
from vlm_prune.vlm.cache import CACHE, cache_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import Family, Need, family_of

REQUIRED: frozenset[Need] = frozenset(
    {"decoder layers with keys and values, and no inputs but hidden states, of their own"}
)


class WingsLayer(nn.Module):
    """The learners and the router of one decoder layer.

    Args:
        config: which learners, and their hyperparameters.
        decoder: the language model's decoder, for its widths.
        head_dim: width of one head.
        generator: draws the initial weights.
    """

    def __init__(
        self, config: WingsConfig, decoder: Any, head_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config = config
        text = decoder.config
        dropout = float(getattr(text, "attention_dropout", 0.0))
        self.learners = nn.ModuleDict(
            {
                name: LoRRA(text.hidden_size, head_dim, config.rank, dropout, generator)
                for name in config.modalities
            }
        )
        heads, summed = text.num_attention_heads, config.router == "sum"
        self.router = (
            Router(len(config.modalities), config.max_positions, heads, summed)
            if config.routed
            else None
        )
        self.residual: Tensor | None = None

    def forward(
        self,
        main: Tensor,
        hidden_states: Tensor,
        tokens: PromptTokens,
        rotary: Tables,
        read: Tensor | None,
    ) -> Tensor:
        """Returns the main attention's output with what the learners add, (B, S, D).

        Args:
            main: the main attention's output, (B, S, D).
            hidden_states: the layer's input, (B, S, D).
            tokens: what the learners attend to.
            rotary: cos and sin of the queries, (B or 1, S, head_dim).
            read: what the main attention made of the router's columns, (B, S, learners); None
                without a router.
        """
        turn = tokens.turn(rotary) if self.config.rope else None
        weights: tuple[Any, ...] = (self.config.scale,) * len(self.learners)
        if self.router is not None:
            weights = (self.config.scale * self.router(read)).to(main.dtype).split(1, -1)
        for name, weight in zip(self.config.modalities, weights, strict=True):
            main = self.learners[name](hidden_states, tokens.keys[name], turn, weight, main)
        return main


@dataclass
class Attached:
    """What a model with learners remembers, as `model.wings`."""

    config: WingsConfig
    handles: list[Any]


def attach(model: Any, config: WingsConfig | None = None, seed: int = 0) -> None:
    """Gives a model learners that leave its output as it is until they are trained.

    They become submodules of the attention layers, on their device and in their dtype, so `to`,
    optimizers and distributed training see them; the model is otherwise unmodified.

    Args:
        model: of a family whose tokens have one position each and see those before them alone.
        config: the learners; the default is `WingsConfig()`.
        seed: for their initial weights.

    Raises:
        InputError: if the model has learners already or cannot take these.
    """
    config = config or WingsConfig()
    family = family_of(model)
    decoder = family.decoder
    if getattr(model, "wings", None) is not None:
        raise InputError("this model has Wings already; call detach(model) first")
    text = decoder.config
    kind = model.config.model_type
    if family.mrope:
        raise InputError(f"Wings needs one position for each token, and {kind} models have three")
    if needed := sorted(REQUIRED & family.lacks):
        raise InputError(f"Wings needs {needed[0]}, which {kind} models lack")
    if family.both_ways:
        raise InputError(
            f"Wings needs causal attention, and the image tokens of {kind} models attend to each "
            "other both ways"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise InputError("Wings needs full attention in every layer; turn use_sliding_window off")
    width, head_dim = text.hidden_size, decoder.layers[0].self_attn.head_dim
    if config.rank > width:
        raise InputError(f"rank {config.rank} is above the model's width; give 1 to {width}")
    if width % head_dim:
        raise InputError(f"a width of {width} does not split into heads of {head_dim}")
    layers, generator = config.layers_of(len(decoder.layers)), torch.Generator().manual_seed(seed)
    learners = {
        number: WingsLayer(config, decoder, head_dim, generator).to(
            decoder.layers[number].input_layernorm.weight
        )
        for number in layers
    }
    record = Attached(config, [])
    model.wings = record
    try:
        _hook(family, record, learners)
    except BaseException:
        detach(model)
        raise


def _hook(family: Family, record: Attached, learners: dict[int, WingsLayer]) -> None:
    """Puts learners into the layers, and notes the handles of all hooks as they are made.

    Args:
        family: the model's adapter.
        record: gets the handles.
        learners: by number of the layer.
    """
    add, decoder = record.handles.append, family.decoder
    mark = partial(_mark_images, family.image_token)
    add(family.multimodal.register_forward_pre_hook(mark, with_kwargs=True))
    note = partial(_note_tokens, record.config)
    add(decoder.register_forward_pre_hook(note, with_kwargs=True))
    for number, learner in learners.items():
        layer = decoder.layers[number]
        attention, norm = layer.self_attn, layer.input_layernorm
        attention.wings = learner.train(attention.training)
        if record.config.routed:
            add(Route(attention))
        add(attention.register_forward_pre_hook(_read_columns, with_kwargs=True))
        add(attention.register_forward_hook(_add_learners, with_kwargs=True))
        if record.config.query == "sequential":
            add(norm.register_forward_pre_hook(partial(_keep_residual, learner)))


def detach(model: Any) -> None:
    """Takes the learners away again; nothing of them stays.

    Raises:
        InputError: if the model has none.
    """
    for handle in attached(model).handles:
        handle.remove()
    for layer in family_of(model).decoder.layers:
        if hasattr(layer.self_attn, "wings"):
            del layer.self_attn.wings
    del model.wings


def attached(model: Any) -> Attached:
    """Returns the record of a model's learners.

    Raises:
        InputError: if the model has none.
    """
    record: Attached | None = getattr(model, "wings", None)
    if record is None:
        raise InputError("this model has no Wings; call attach(model, WingsConfig()) first")
    return record


def wings_layers(model: Any) -> dict[int, WingsLayer]:
    """Returns the learners of each layer that has some.

    Raises:
        InputError: if the model has none.
    """
    attached(model)
    layers = family_of(model).decoder.layers
    return {n: x.self_attn.wings for n, x in enumerate(layers) if hasattr(x.self_attn, "wings")}


def _mark_images(
    image_token: int, _: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Adds which tokens are an image's, (B, N), as `wings`; a pre-hook of the whole model.

    Args:
        image_token: id of the placeholder.
        _: the model.
        args: of its forward.
        kwargs: of its forward.
    """
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        raise InputError("Wings needs input_ids, not inputs_embeds, to tell image from text")
    shown = kwargs.get("pixel_values") is not None or bool(kwargs.get("mm_encoder_outputs"))
    return args, kwargs | {"wings": (ids == image_token) & shown}


def _note_tokens(
    config: WingsConfig, decoder: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Turns the image mask into the tokens that every layer's learners attend to.

    Args:
        config: of the learners.
        decoder: whose pre-hook this is.
        args: of its forward.
        kwargs: of its forward, with the mask as `wings`, which the tokens replace.
    """
    features, is_image = kwargs["inputs_embeds"], kwargs.get("wings")
    if is_image is None:
        raise InputError("Wings works in the whole model's forward, not the language model's alone")
    mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
    use_cache = kwargs.get("use_cache")
    caches = bool(decoder.config.use_cache if use_cache is None else use_cache)
    visible_to = None
    if isinstance(mask, Tensor) and mask.ndim == 4 and cache is None and not caches:
        visible_to, mask = (mask if mask.dtype == torch.bool else mask == 0)[:, 0], None
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise InputError("Wings needs a 2D attention mask (batch, length) and a dynamic cache")
    if cache is None and caches:
        cache = kwargs[CACHE] = DynamicCache(config=decoder.config)
    batch, length = is_image.shape
    past = 0 if cache is None else cache.get_seq_length()
    positions = kwargs.get("position_ids")
    if visible_to is not None and positions is None:
        raise InputError("packed rows, with a 4D attention mask, need position_ids")
    if positions is None:
        positions = torch.arange(past, past + length, device=features.device)[None]
    valid = torch.ones_like(is_image) if mask is None else mask[:, -length:]
    facts = torch.stack([is_image.long(), valid.long(), positions.expand(batch, -1)], -1)
    learner_caches = None
    if cache is not None:
        features, facts, learner_caches = remember(cache, len(decoder.layers), features, facts)
    is_image, valid, positions = facts[..., 0].bool(), facts[..., 1].bool(), facts[..., 2]
    rotary = decoder.rotary_emb
    tokens = PromptTokens(
        features, is_image, valid, positions, length, rotary, config, visible_to, learner_caches
    )
    if config.routed and int(tokens.ranks.max()) >= config.max_positions:
        raise InputError(
            f"{int(tokens.ranks.max()) + 1} tokens are more than the router's "
            f"{config.max_positions}; attach with a larger max_positions"
        )
    return args, kwargs | {"wings": tokens}


def _read_columns(
    attention: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Asks attention for the sums of the router's columns; a pre-hook.

    Args:
        attention: the attention module.
        args: of its forward.
        kwargs: of its forward; `router` holds the sums.
    """
    router = attention.wings.router
    if router is None:
        return None
    tokens: PromptTokens = kwargs["wings"]
    columns = router.columns(tokens.ranks, tokens.unpadded)
    kwargs["router"] = column_sum = ColumnSum(columns)
    return args, with_column_sum(kwargs, column_sum)


def _add_learners(attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Returns the output of attention with that of the learners added; a hook.

    Args:
        attention: the attention module.
        args: of its forward.
        kwargs: of its forward.
        output: attention (B, S, D) and maps.
    """
    main, maps = output
    hidden_states = args[0] if args else kwargs["hidden_states"]
    layer: WingsLayer = attention.wings
    if layer.residual is not None:
        hidden_states, layer.residual = layer.residual + main, None
    read = kwargs["router"].result if layer.router is not None else None
    return layer(main, hidden_states, kwargs["wings"], kwargs["position_embeddings"], read), maps


def _keep_residual(layer: WingsLayer, _: Any, args: tuple[Tensor, ...]) -> None:
    layer.residual = args[0]
