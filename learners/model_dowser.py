"""Model-Dowser: tune the weights that matter least for what the language model says, a share of each map."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.families import family_of


@dataclass(frozen=True)
class ModelDowser:
    """Options of the importance, which needs no data: the model writes the prompts itself.

    https://arxiv.org/abs/2602.04509

    Args:
        share: of each linear map's weights that train, those of the lowest importance, in (0, 1].
        prompts: texts that the model writes, each from a random first token.
        length: tokens of a prompt.
        draws: random sign vectors per prompt, by which the Jacobian's norms are estimated.

    Raises:
        InputError: for a value out of range.
    """

    share: float = 0.1
    prompts: int = 16
    length: int = 32
    draws: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share {self.share} is out of range; give a number in (0, 1]")
        for name in ("prompts", "length", "draws"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is out of range; give 1 or more")


def jacobian_norms(
    output: Tensor, results: Mapping[str, Tensor], signs: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Returns the norms of the Jacobian of an output with respect to each column of results.

    Hutchinson's estimator: the mean square of the gradient of `(sign * output).sum()` over random
    signs is the squared norm. Squares are summed over tokens.

    Args:
        output: of the model, of any shape, with the graph that leads to `results`.
        results: of linear maps by name, each (..., d_out).
        signs: one tensor of +1 and -1 for each draw, shaped as `output`.

    Returns:
        For each name (d_out,), in float32.
    """
    squares = {name: result.new_zeros(result.shape[-1]).float() for name, result in results.items()}
    draws = 0
    for sign in signs:
        gradients = torch.autograd.grad(
            (output * sign).sum(), list(results.values()), retain_graph=True
        )
        for name, gradient in zip(results, gradients, strict=True):
            squares[name] += gradient.float().square().flatten(0, -2).sum(0)
        draws += 1
    return {name: (square / draws).sqrt() for name, square in squares.items()}


@contextmanager
def recorded(
    maps: Mapping[str, nn.Linear],
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Records what linear maps take and give in the forward pass within the block.

    Yields:
        By name the mean magnitude of each input column over tokens, (d_in,), and the results with
        their graph, which starts at the earliest of them.
    """
    inputs: dict[str, Tensor] = {}
    results: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> Tensor:
            # with all parameters frozen, the first maps have no graph to be part of
            results[name] = result if result.requires_grad else result.requires_grad_()
            inputs[name] = arguments[0].detach().float().abs().flatten(0, -2).mean(0)
            return results[name]

        return hook

    handles = [map_.register_forward_hook(note(name)) for name, map_ in maps.items()]
    try:
        yield inputs, results
    finally:
        for handle in handles:
            handle.remove()


def probe(
    forward: Callable[[Tensor], Tensor],
    maps: Mapping[str, nn.Linear],
    prompts: Iterable[Tensor],
    draws: int,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns what the importance of each map's weights is made of, for all prompts.

    Args:
        forward: gives the output for one prompt.
        maps: linear maps by name, whose parameters take no gradients.
        prompts: what `forward` takes.
        draws: sign vectors per prompt.
        generator: draws the signs.

    Returns:
        For each name the Jacobian's norms (prompts, d_out) and the magnitudes of the inputs
        (prompts, d_in).
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in maps}
    for prompt in prompts:
        with torch.enable_grad(), recorded(maps) as (inputs, results):
            output = forward(prompt)
        shape = (draws, *output.shape)
        signs = torch.randint(0, 2, shape, generator=generator).to(output) * 2 - 1
        for name, norms in jacobian_norms(output, results, signs).items():
            found[name].append((norms, inputs[name]))
    return {
        name: (torch.stack([n for n, _ in rows]), torch.stack([h for _, h in rows]))
        for name, rows in found.items()
    }


def importance(weight: Tensor, norms: Tensor, inputs: Tensor) -> Tensor:
    """Returns |W_ij| |h_j| ||J_i||, the mean over prompts: how far the output moves, to first order,
    when a weight goes to 0.

    That h is the mean magnitude over a prompt's tokens, and that J covers all of its tokens, are
    our readings.

    Args:
        weight: of a linear map, (d_out, d_in).
        norms: of the Jacobian of the output with respect to the map's result, (prompts, d_out).
        inputs: mean magnitudes of the map's input, (prompts, d_in).

    Returns:
        (d_out, d_in), in float32.
    """
    return weight.detach().float().abs() * (norms.T @ inputs) / len(norms)


def lowest(scores: Tensor, share: float) -> Tensor:
    """Returns the flat indices of the lowest `share` of scores, rounded, at least one; sorted."""
    number = max(1, round(share * scores.numel()))
    return scores.flatten().topk(number, largest=False).indices.sort().values


class ChosenWeights(nn.Module):
    """A parametrization of a weight: the chosen entries train, the others are the original's.

    Gradients and the optimizer's moments are of the chosen entries alone, and weight decay cannot
    reach the others.

    Args:
        weight: before training.
        index: flat indices of the entries that train, (n,), which are kept as a buffer.
    """

    index: Tensor

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.values = nn.Parameter(weight.detach().flatten()[index].clone())

    def forward(self, original: Tensor) -> Tensor:
        """Returns the weight with the entries as they are trained."""
        return original.flatten().scatter(0, self.index, self.values).view_as(original)


def linear_maps(model: Any) -> dict[str, nn.Linear]:
    """Returns the linear maps of a model's decoder layers by name; embeddings and the head are
    none of them.
    """
    layers = family_of(model).decoder.layers
    return {
        f"{number}.{name}": module
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


@torch.no_grad()
def written_prompts(model: Any, tokenizer: Any, options: ModelDowser, seed: int) -> Tensor:
    """Returns texts that a model samples after random first tokens, token ids (prompts, length).

    Args:
        model: a VLM, which sees no image here.
        tokenizer: its special tokens are no first tokens.
        options: how many, and how long.
        seed: of first tokens and sampling.
    """
    device = model.get_input_embeddings().weight.device
    special = {*tokenizer.all_special_ids, family_of(model).image_token}
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    first = ordinary[torch.randint(len(ordinary), (options.prompts, 1), generator=generator)]
    if options.length == 1:
        return first.to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # a placeholder without an image has no meaning, and a text must not end early
        ids: Tensor = model.generate(
            input_ids=first.to(device), attention_mask=torch.ones_like(first).to(device),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, suppress_tokens=sorted(special),
            min_new_tokens=options.length - 1, max_new_tokens=options.length - 1,
        )  # fmt: skip
    return ids


def open_least_important(model: Any, tokenizer: Any, options: ModelDowser, seed: int) -> None:
    """Makes each decoder layer's linear maps train their least important weights alone.

    `close` makes them plain again. The rest of the model is left as it is, with gradients off.

    Args:
        model: a VLM, changed in place.
        tokenizer: the model's.
        options: of the importance.
        seed: of prompts and signs.
    """
    model.requires_grad_(False)
    maps, prompts = linear_maps(model), written_prompts(model, tokenizer, options, seed)
    generator = torch.Generator().manual_seed(seed)
    found = probe(
        lambda ids: model(input_ids=ids, use_cache=False).logits,
        maps, prompts.split(1), options.draws, generator,
    )  # fmt: skip
    for name, map_ in maps.items():
        # of one map at a time: all scores together would take as much memory as the model
        scores = importance(map_.weight, *found[name])
        chosen = ChosenWeights(map_.weight, lowest(scores, options.share))
        parametrize.register_parametrization(map_, "weight", chosen)


def chosen_indices(model: nn.Module) -> dict[str, Tensor]:
    """Returns which entries train, by name; a run that goes on must train the same ones."""
    return {
        f"{name}.index": module.index
        for name, module in model.named_modules()
        if isinstance(module, ChosenWeights)
    }


def close(model: nn.Module) -> None:
    """Puts trained entries into plain weights; a model without any stays as it is."""
    chosen = [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    for module in chosen:
        if isinstance(module.parametrizations.weight[0], ChosenWeights):  # type: ignore[union-attr, index]
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
