"""Scenes written as symbols: what the language model reads before it reads the tower's features.

An image token is the sum of the word embeddings of what its patch shows and of its place. The
language model learns to answer from such tokens first; the projector then learns to produce them,
and both are trained together from there. Symbols are thrown away afterward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import PreTrainedTokenizerFast

from vlm_prune.benchmarks.embedded_models.log import Say


class Symbols(nn.Module):
    """Embeds (name, color, place) triples with the language model's own word embeddings.

    Args:
        words: the word embedding, shared with the language model.
        names: token ids of the names, in label order without background.
        colors: token ids of the colors, in label order.
        grid: patches per side.
    """

    def __init__(self, words: nn.Embedding, names: Tensor, colors: Tensor, grid: int) -> None:
        super().__init__()
        self.words = [words]
        self.names, self.colors, self.grid = names, colors, grid
        width = words.embedding_dim
        line = torch.linspace(0, 1, grid)[:, None]
        smooth = torch.cat([2 * line - 1, *(torch.cos(k * torch.pi * line) for k in (1, 2, 3))], 1)
        # as large as the word embeddings: much smaller ones beside names and colors are not learned
        scale = words.weight.detach().std() / smooth.square().sum(1).mean().sqrt()
        self.rows = nn.Parameter(scale * smooth @ torch.randn(4, width))
        self.columns = nn.Parameter(scale * smooth @ torch.randn(4, width))
        self.background = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, triples: Tensor) -> Tensor:
        """Returns the tokens of symbols, (tokens, 3) -> (tokens, width).

        A symbol is a name (0 for background), a color (-1 for none) and a place.
        """
        name, color, place = triples.unbind(-1)
        table = self.words[0].weight
        shown = table[self.names[(name - 1).clamp(min=0)]] + table[self.colors[color.clamp(min=0)]]
        what = torch.where((name > 0)[:, None], shown, self.background)
        return what + self.place(place)

    def place(self, cell: Tensor) -> Tensor:
        """Returns the embeddings of patch indices, (tokens,) -> (tokens, width)."""
        return self.rows[cell // self.grid] + self.columns[cell % self.grid]


def word_ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> Tensor:
    """Returns the last token of each word, as it follows a space."""
    return torch.tensor([tokenizer(f" {word}").input_ids[-1] for word in words])


def align_projector(
    projector: nn.Module, features: Tensor, targets: Tensor, shown: Tensor, steps: int, say: Say
) -> None:
    """Fits the projector to the symbols by mean squared error, objects weighing more than the rest.

    Args:
        projector: trained in place.
        features: (N, width) of the tower.
        targets: (N, width) symbols of the same patches.
        shown: (N,) bool, which patches show an object.
        steps: of the optimizer.
        say: takes the loss every 50 steps.
    """
    stepper = torch.optim.AdamW(projector.parameters(), lr=3e-3, weight_decay=0.0)
    scale = targets.var(0).sum().sqrt()
    objects, rest = shown.nonzero()[:, 0], (~shown).nonzero()[:, 0]
    for step in range(steps):
        for group in stepper.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        chosen = torch.cat(
            [
                objects[torch.randint(len(objects), (1536,))],
                rest[torch.randint(len(rest), (512,))],
            ]
        )
        loss = mse_loss(projector(features[chosen].float()) / scale, targets[chosen] / scale)
        loss = loss * targets.shape[1]
        loss.backward()
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            say(step, loss=loss.item())
