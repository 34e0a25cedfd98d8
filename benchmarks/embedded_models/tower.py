"""Stage 1: teach the vision tower to name what each patch shows, before any language."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlm_prune.benchmarks.embedded_models.log import Say


@dataclass
class PatchBatch:
    """Image windows with their place in the 24 x 24 patch grid and labels per patch.

    Shapes: pixels (B, 3, 14 h, 14 w) normalized; positions (B, h w) indices into the full grid;
    names and colors (B, h w), where name 0 and color -1 are background.
    """

    pixels: Tensor
    positions: Tensor
    names: Tensor
    colors: Tensor


class PatchHeads(nn.Module):
    """Classifies name, color, row and column of each patch; used in training alone.

    Args:
        width: of the tower's features.
        names: number of names, background included.
        colors: number of colors.
        grid: patches per side.
    """

    def __init__(self, width: int, names: int, colors: int, grid: int) -> None:
        super().__init__()
        self.sizes = [names, colors, grid, grid]
        self.grid = grid
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        logits: tuple[Tensor, ...] = self.linear(self.norm(features)).split(self.sizes, -1)
        return logits


def tower_features(tower: Any, pixels: Tensor, positions: Tensor | None = None) -> Tensor:
    """Returns the patch features of the second-to-last layer, (B, patches, width).

    Args:
        tower: a CLIP vision transformer.
        pixels: (B, 3, 14 h, 14 w), normalized.
        positions: (B, h w) indices into the full grid, of a smaller window: windows at a quarter of
            the cost train every position embedding. None for whole images.
    """
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    table = embeddings.position_embedding.weight
    position_embeddings = (
        table[1:].expand(len(pixels), -1, -1) if positions is None else table[1:][positions]
    )
    first = (embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
    hidden_states = tower.pre_layrnorm(torch.cat([first, patches + position_embeddings], 1))
    for layer in tower.encoder.layers[:-1]:
        hidden_states = layer(hidden_states, None)
    features: Tensor = hidden_states[:, 1:]
    return features


class Muon32(torch.optim.Optimizer):
    """Muon (https://arxiv.org/abs/2502.16982) with its Newton-Schulz steps in fp32.

    `torch.optim.Muon` runs them in bf16, which is fifty times slower than fp32 on a CPU without
    bf16 units. The update has AdamW's RMS (0.2), so both optimizers share one learning rate.

    Args:
        params: matrices.
        lr: learning rate.
        momentum: share of the running mean of gradients that stays at a step.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - 0.01 * group["lr"]).sub_(update, alpha=group["lr"] * scale)


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """Sends the singular values of `matrix` to about 1, by Newton-Schulz iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
    result: Tensor = wide if matrix.shape[0] <= matrix.shape[1] else wide.T
    return result


def optimizers(
    modules: list[nn.Module], rate: float, bf16: bool = False
) -> list[torch.optim.Optimizer]:
    """Makes Muon for hidden matrices, and AdamW for the rest.

    AdamW is slow on the tower's prepared embeddings and on a fitted projector: at Muon's rate its
    tokens grow until they drown what a layer adds to them.

    Args:
        modules: whose parameters are trained.
        rate: learning rate of the hidden matrices.
        bf16: whether Newton-Schulz steps run in bf16.
    """
    hidden: list[nn.Parameter] = []
    slow: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if any(part in name for part in ("patch_embedding", "position_embedding", "linear_")):
                slow.append(parameter)
            else:
                inner = parameter.ndim == 2 and "embed" not in name and "linear." not in name
                (hidden if inner else rest).append(parameter)
    muon = (
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        if bf16
        else Muon32(hidden, lr=rate)
    )
    return [
        muon,
        torch.optim.AdamW(
            [{"params": rest, "share": 0.5}, {"params": slow, "share": 0.1}],
            lr=rate, weight_decay=0.0, betas=(0.9, 0.98),
        ),
    ]  # fmt: skip


def set_rate(steppers: list[torch.optim.Optimizer], rate: float) -> None:
    """Sets the learning rate of every group to its own share of `rate`."""
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = rate * group.get("share", 1.0)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 40) -> float:
    """Returns the learning rate of a step: a linear warm-up, then a linear decay to a twentieth.

    Args:
        step: from 0.
        steps: in all.
        peak: rate after the warm-up.
        warmup: steps of it.
    """
    return peak * min(1.0, (step + 1) / warmup) * max(0.05, 1 - step / steps)


def train_tower(
    tower: nn.Module,
    heads: PatchHeads,
    batches: Iterator[PatchBatch],
    steps: int,
    rate: float,
    say: Say,
) -> None:
    """Trains the tower to name what patches show.

    Args:
        tower: a CLIP vision transformer, trained in place.
        heads: classifiers, trained with it.
        batches: of windows or whole scenes.
        steps: how many of them.
        rate: peak learning rate.
        say: takes loss and accuracies on object patches every 50 steps.
    """
    steppers = optimizers([tower, heads], rate)
    running = dict.fromkeys(("name", "color", "row", "column"), 0.0)
    for step in range(steps):
        batch = next(batches)
        set_rate(steppers, learning_rate(step, steps, rate))
        logits = heads(tower_features(tower, batch.pixels, batch.positions))
        rows, columns = batch.positions // heads.grid, batch.positions % heads.grid
        shown = batch.names > 0
        weight = torch.where(shown, 1.0, 0.05).flatten()
        names = cross_entropy(logits[0].flatten(0, 1), batch.names.flatten(), reduction="none")
        loss = (names * weight).sum() / weight.sum()
        targets = {"color": batch.colors, "row": rows, "column": columns}
        for scores, (key, target) in zip(logits[1:], targets.items(), strict=True):
            share = 0.5 if key == "color" else 0.1
            loss = loss + share * cross_entropy(scores[shown], target[shown])
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        with torch.no_grad():
            for scores, (key, target) in zip(
                logits, {"name": batch.names, **targets}.items(), strict=True
            ):
                right = (scores[shown].argmax(-1) == target[shown]).float().mean().item()
                running[key] += (right - running[key]) * max(0.02, 1 / (step + 1))
        if step % 50 == 0 or step == steps - 1:
            say(step, loss=loss.item(), **running)
