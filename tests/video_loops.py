"""What loops over the definitions of several video methods share."""

import torch


def attention_of(clips):
    """What each token receives, a mean over heads and its frame's tokens; (2, 10, 12)."""
    query, key = (own.double() for own in clips.query_key())
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return weights.mean((1, 2)).unflatten(0, (2, 10))


def peaks(tokens, count, neighbors):
    """Indices of the tokens with the largest density times distance to a denser one."""
    apart = [[float((a - b).norm()) / 16**0.5 for b in tokens] for a in tokens]
    near = [sorted(row)[:neighbors] for row in apart]
    dense = [-sum(d * d for d in own) / len(own) for own in near]
    scores = []
    for i, row in enumerate(apart):
        denser = [d for d, other in zip(row, dense, strict=True) if other > dense[i]]
        weight = float(torch.tensor(dense[i], dtype=torch.double).exp())
        scores.append(weight * (min(denser) if denser else max(row)))
    return sorted(sorted(range(len(tokens)), key=lambda i: -scores[i])[:count])
