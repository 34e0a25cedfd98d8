"""DART: stop looking for important tokens; drop duplicates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm_prune.pruning.base import CountedTokens, DecoderPruner, PositionRule
from vlm_prune.pruning.schedule import check_layer
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import DecoderTokens, Kept, take, top


@dataclass
class Dart(DecoderPruner):
    """Keep a few pivots and, for each, the image tokens least similar to it.

    https://arxiv.org/abs/2502.11494

    Args:
        layer: decoder layers (of 32) that have run when tokens are dropped.
        image_pivots: image tokens with the largest keys, always kept.
        text_pivots: question tokens with the largest keys.
        released: compare as the authors' code does: keys after rotation by their L1 norm, and
            hidden states after the model's final norm. The paper says neither; the default takes
            keys before rotation by their L2 norm, and hidden states as they are.

    Similarity is the cosine of hidden states. The paper thresholds it; thresholds that meet a
    budget give each pivot an equal share of it. The norm of a key is L2 before rotation, which
    rotation leaves as it is, and before a decoder's own norm of keys (Qwen3), after which all are
    nearly equal. Text pivots come from the question only. Kept tokens keep their positions, as in
    the authors' code.
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    released: bool = False
    counted: ClassVar[CountedTokens] = "kept"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"
    authors_positions: ClassVar[PositionRule] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)
        if min(self.image_pivots, self.text_pivots) < 0 or not self.image_pivots:
            raise InputError("give at least one image pivot and no negative number of text pivots")

    def pattern(self) -> list[tuple[int, float]]:
        return [(self.layer, 1)]

    def reduce(self, tokens: DecoderTokens, keep: int) -> Kept:
        image_keys, text_keys = rotated_keys(tokens) if self.released else tokens.keys()
        states, question, norm = tokens.features, tokens.question, 2
        if self.released:
            states, question, norm = tokens.final_norm(states), tokens.final_norm(question), 1
        chosen = []
        for image, features in enumerate(states):
            # pivots are the tokens with the longest keys, of the image and of its question
            lengths = image_keys[image].float().norm(p=norm, dim=-1)
            pivots = top(lengths, min(keep, self.image_pivots))
            real = tokens.question_mask[image]
            lengths = text_keys[image][real].float().norm(p=norm, dim=-1)
            texts = question[image][real][top(lengths, self.text_pivots)]
            chosen.append(distinct(features, pivots, texts, keep))
        return Kept.at(tokens.features, torch.stack(chosen))


def rotated_keys(tokens: DecoderTokens) -> tuple[Tensor, Tensor]:
    """Returns keys after rotation, heads side by side, of image tokens (M, n, d) and question
    (M, T, d).
    """
    rows = tokens.question_rows(slice(None))
    keys = rows.key.transpose(1, 2).flatten(2)
    return take(keys, rows.image), take(keys, rows.columns.clamp_min(0))


def distinct(features: Tensor, pivots: Tensor, texts: Tensor, keep: int) -> Tensor:
    """Returns the pivots and the tokens least similar to each of them and
    to `texts`, in equal shares.

    Pivots choose one after the other, image tokens first, among tokens not yet chosen.

    Shapes: features (n, D), pivots (p,), texts (q, D) -> (keep,).

    Args:
        features: image tokens.
        pivots: indices of those that are kept as pivots.
        texts: further pivots, which are no image tokens.
        keep: tokens kept, pivots included.
    """
    unit = normalize(features.float(), dim=-1)
    # each pivot takes its share of the least similar tokens that are not taken yet
    against = torch.cat([unit[pivots], normalize(texts.float(), dim=-1)])
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    taken[pivots] = True
    left = keep - len(pivots)
    for number, pivot in enumerate(against):
        share = left * (number + 1) // len(against) - left * number // len(against)
        difference = (-unit @ pivot).masked_fill(taken, -torch.inf)
        taken[top(difference, share)] = True
    return taken.nonzero()[:, 0]
