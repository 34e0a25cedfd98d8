"""Merging a vision-language model with a language model of its kind, without training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_prune.vlm.adapter import add_adapter, is_adapter
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import output_folder
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import DTYPES, config_of, has_vision, load, load_language, save, sees_images


class LanguageModel(nn.Module):
    """The decoder and the output embeddings of a model, under the names that text-only models use.

    Args:
        model: a text-only language model, or a VLM of a supported family.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = family_of(model).decoder if has_vision(model.config) else model.get_decoder()
        self.lm_head = model.get_output_embeddings()
        self.config = model.config.get_text_config()

    def merged(self, first_layer: int) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters that merging moves: of layers from `first_layer` on and of what
        follows them, and the embeddings if that is the first layer of all."""
        for name, parameter in self.named_parameters():
            _, _, rest = name.partition("model.layers.")
            if int(rest.split(".")[0]) >= first_layer if rest else _follows(name, first_layer):
                yield name, parameter


def _follows(name: str, first_layer: int) -> bool:
    return first_layer == 0 or name.startswith(("lm_head.", "model.norm."))


@torch.no_grad()
def merge(
    base: Any, tuned: Any, alpha: float, first_layer: int = 0, shared: Tensor | None = None
) -> None:
    """Moves the tuned language model back toward its base, in place: base + alpha (tuned - base).

    Needs no training, and rescues a model that has been tuned already; sweep `alpha` over [0, 1].
    With `alpha` 0 and a `first_layer` it is what PlaM does, https://github.com/wzj1718/PlaM: the
    later layers, in which image tokens are hardly read, get the base's weights.

    Args:
        base: the model before tuning, with or without a vision tower.
        tuned: the tuned model, which is changed.
        alpha: share of the tuning that stays, in [0, 1].
        first_layer: layers before this one stay as tuned, and embeddings, too, if it is above 0.
        shared: indices of the tokens that both vocabularies have, (n,); other rows stay as tuned.
            All
            by default.

    Raises:
        InputError: if `alpha` or `first_layer` is out of range, or the two language models differ
            in
            shape.
    """
    _check(alpha)
    ours, theirs = LanguageModel(tuned), LanguageModel(base)
    layers = len(ours.model.layers)
    if not 0 <= first_layer < layers:
        raise InputError(f"layer {first_layer} is out of range; give 0 to {layers - 1}")
    shapes, base_shapes = (
        {n: p.shape for n, p in each.named_parameters()} for each in (ours, theirs)
    )
    rows = {n for n in shapes if n.startswith(("lm_head.", "model.embed_tokens."))}
    for name in rows if shared is not None else ():
        shapes[name], base_shapes[name] = shapes[name][1:], base_shapes.get(name, shapes[name])[1:]
    for name in {"lm_head.weight"} & (shapes.keys() ^ base_shapes.keys()):
        # one of the two ties it to its embeddings
        shapes.pop(name, None)
        base_shapes.pop(name, None)
    if shapes != base_shapes:
        raise InputError("the two models' language models differ; merge a model with its own base")
    sources = dict(theirs.named_parameters())
    for name, parameter in ours.merged(first_layer):
        if name not in shapes:
            continue
        index: Any = slice(None)
        if shared is not None and name in rows:
            index = shared[shared < min(len(parameter), len(sources[name]))]
        between = sources[name][index].float().lerp(parameter[index].float(), alpha)
        parameter[index] = between.to(parameter.dtype)


@torch.no_grad()
def merge_adapter(name: str, tuned: Any, alpha: float, first_layer: int = 0) -> None:
    """Adds a LoRA that was trained on a text-only model to a VLM's language model, in place.

    As `merge` does, with the VLM and the adapter on it as the base: `alpha` 0 adds the whole
    adapter, 1 nothing.

    Args:
        name: folder of a PEFT adapter of the text-only model.
        tuned: the VLM, which is changed.
        alpha: in [0, 1].
        first_layer: layers before this one stay as they are.

    Raises:
        InputError: if `alpha` is out of range, or the adapter cannot be read or does not fit.
    """
    _check(alpha)
    language = LanguageModel(tuned)
    before = {n: p.clone() for n, p in language.named_parameters()}
    add_adapter(language, name).merge_and_unload()
    moved = {n for n, _ in language.merged(first_layer)}
    for n, parameter in language.named_parameters():
        share = alpha if n in moved else 1.0
        parameter.copy_(parameter.float().lerp(before[n].float(), share))


def shared_tokens(base: Any, tuned: Any) -> Tensor:
    """Returns the indices of the tokens that two tokenizers have in common, (n,).

    Added tokens may differ: VLMs name reserved ones anew.

    Args:
        base: the tokenizer of the model before tuning.
        tuned: that of the tuned model.

    Raises:
        InputError: if an ordinary token is another one in the other vocabulary.
    """
    ours, theirs = tuned.get_vocab(), base.get_vocab()
    added = {*base.get_added_vocab(), *tuned.get_added_vocab()}
    for token, index in theirs.items():
        if ours.get(token) != index and token not in added:
            raise InputError(
                f"token {token!r} is number {index} in the base and {ours.get(token)} in the tuned "
                "model; merge a model with its own base"
            )
    return torch.tensor(sorted(i for token, i in theirs.items() if ours.get(token) == i))


def _check(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha {alpha} is out of range; give 0 (the base) to 1 (as tuned)")


def sweep(
    base: str, tuned: str, output: Path, alphas: Sequence[float], first_layer: int = 0
) -> list[Path]:
    """Writes one checkpoint of a tuned model for each alpha, and returns their folders.

    Args:
        base: folder or name of the checkpoint before tuning, with or without a vision tower; or the
            folder of a PEFT adapter of the text-only model.
        tuned: folder or name of the tuned checkpoint, whose weights keep their type.
        output: folder that gets a folder for each alpha, with model and processor.
        alphas: as for `merge`.
        first_layer: as for `merge`.

    Raises:
        InputError: if an alpha is out of range, `output` is no folder for results, or the two
            language models differ in shape or vocabulary.
    """
    output_folder(output)
    for alpha in alphas:
        _check(alpha)
    kind = str(config_of(tuned).dtype).removeprefix("torch.")
    dtype = kind if kind in DTYPES else "float32"
    adapter = is_adapter(base)
    original: Any = None
    if not adapter:
        original, processor = (load if sees_images(base) else load_language)(base, "cpu", dtype)
        tokenizer = getattr(processor, "tokenizer", processor)
    shared: Tensor | None = None
    folders = [output / f"alpha-{alpha:g}" for alpha in alphas]
    for alpha, folder in zip(alphas, folders, strict=True):
        model, processor = load(tuned, "cpu", dtype)
        if adapter:
            merge_adapter(base, model, alpha, first_layer)
        else:
            if shared is None:
                shared = shared_tokens(tokenizer, processor.tokenizer)
            merge(original, model, alpha, first_layer, shared)
        save(model, processor, folder)
    return folders
