"""DART: stop looking for important tokens; drop duplicates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm_prune.pruning.base import Counted, DecoderPruner, Rule
from vlm_prune.pruning.schedule import check_layer
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.tokens import DecoderTokens, Kept, top


@dataclass
class Dart(DecoderPruner):
    """Keep a few pivots and, for each, the image tokens least similar to it.

    https://arxiv.org/abs/2502.11494

    Args:
        layer: decoder layers (of 32) that have run when tokens are dropped.
        image_pivots: image tokens with the largest keys, always kept.
        text_pivots: question tokens with the largest keys.

    Similarity is the cosine of hidden states. The paper thresholds it; thresholds that meet a
    budget give each pivot an equal share of it. The norm of a key is L2 before rotation, which
    rotation leaves as it is, and before a decoder's own norm of keys (Qwen3), after which all are
    nearly equal. Text pivots come from the question only. Kept tokens keep their positions, as in
    the authors' code.
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    counted: ClassVar[Counted] = "kept"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"
    authors_positions: ClassVar[Rule] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)
        if min(self.image_pivots, self.text_pivots) < 0 or not self.image_pivots:
            raise InputError("give at least one image pivot and no negative number of text pivots")

    def pattern(self) -> list[tuple[int, float]]:
        return [(self.layer, 1)]

    def reduce(self, tokens: DecoderTokens, keep: int) -> Kept:
        image_keys, text_keys = tokens.keys()
        chosen = []
        for image, features in enumerate(tokens.features):
            pivots = top(image_keys[image].float().norm(dim=-1), min(keep, self.image_pivots))
            mask = tokens.question_mask[image]
            length = text_keys[image][mask].float().norm(dim=-1)
            texts = tokens.question[image][mask][top(length, self.text_pivots)]
            chosen.append(distinct(features, pivots, texts, keep))
        return Kept.at(tokens.features, torch.stack(chosen))


def distinct(features: Tensor, pivots: Tensor, texts: Tensor, keep: int) -> Tensor:
    """Pivots and the tokens least similar to each of them and to `texts`, in equal shares.

    Pivots choose one after the other, image tokens first, among tokens not yet chosen.

    Shapes: features (n, D), pivots (p,), texts (q, D) -> (keep,).
    """
    unit = normalize(features.float(), dim=-1)
    against = torch.cat([unit[pivots], normalize(texts.float(), dim=-1)])
    taken = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    taken[pivots] = True
    left = keep - len(pivots)
    for number, pivot in enumerate(against):
        share = left * (number + 1) // len(against) - left * number // len(against)
        difference = (-unit @ pivot).masked_fill(taken, -torch.inf)
        taken[top(difference, share)] = True
    return taken.nonzero()[:, 0]
