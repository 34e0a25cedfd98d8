"""Sequential selection against slow loops; backends choose the same tokens."""

import pytest
import torch
from torch.nn.functional import normalize

from vlm_prune.kernels.dispatch import backend
from vlm_prune.kernels.greedy_select import greedy_select

RULES = ["diverse", "farthest", "dpp", "coverage"]


def similarity_of(features):
    unit = normalize(features, dim=-1)
    return unit @ unit.transpose(-1, -2)


def slow(similarity, scores, k, rule, valid):
    """One image, float64, each step from its definition; determinants taken whole."""
    picked = []
    kernel = scores[:, None] * similarity * scores if rule == "dpp" else None
    while len(picked) < k:
        gains = torch.full_like(scores, -torch.inf)
        for i in range(len(scores)):
            if i in picked or not valid[i]:
                continue
            if rule == "coverage":
                covered = similarity[picked].amax(0) if picked else torch.zeros(())
                gains[i] = scores[i] * (similarity[i] - covered.clamp(min=0)).clamp(min=0).sum()
            elif rule == "dpp":
                both = [*picked, i]
                gains[i] = torch.linalg.det(kernel[both][:, both])
            elif not picked:
                gains[i] = scores[i]
            else:
                near = similarity[i, picked].max()
                gains[i] = scores[i] * (1 - near) if rule == "diverse" else -near
        picked.append(int(gains.argmax()))
    return picked


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 21, 9)], ids=str)
def test_equals_the_slow_loop(make, device, rule, name, shape):
    images, tokens, k = shape
    similarity = similarity_of(make(images, tokens, 16))
    scores = make(images, tokens).sigmoid()
    valid = torch.ones(images, tokens, dtype=torch.bool, device=device)
    valid[0, tokens // 2 :: 4] = tokens == 5
    with backend(name):
        chosen = greedy_select(similarity, scores, k, rule, valid)
    for image in range(images):
        inputs = (similarity[image].double().cpu(), scores[image].double().cpu())
        assert chosen[image].tolist() == slow(*inputs, k, rule, valid[image].tolist())


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("things", [4, 40])
def test_covering_other_things_than_tokens_equals_the_slow_loop(make, name, things):
    """Of several images at once, some of which have fewer things: those of zeros add nothing."""
    cover = make(3, 21, things).sigmoid()
    cover[1, :, things // 2 :] = 0
    scores, valid = make(3, 21).sigmoid(), torch.ones(21, dtype=torch.bool)
    with backend(name):
        chosen = greedy_select(cover, scores, 7, "coverage")
        alone = greedy_select(cover[1:2, :, : things // 2], scores[1:2], 7, "coverage")
    assert chosen[1].tolist() == alone[0].tolist()
    for image in range(3):
        inputs = (cover[image].double().cpu(), scores[image].double().cpu())
        assert chosen[image].tolist() == slow(*inputs, 7, "coverage", valid)


@pytest.mark.parametrize("rule", RULES)
def test_backends_agree_on_ties(make, rule):
    features = torch.eye(4, device=make(1).device)[[0, 1, 0, 1, 2, 2, 3, 3]][None].repeat(2, 1, 1)
    similarity, scores = similarity_of(features), torch.ones(2, 8, device=features.device)
    chosen = []
    for name in ("triton", "reference"):
        with backend(name):
            chosen.append(greedy_select(similarity, scores, 8, rule).tolist())
    assert chosen[0] == chosen[1] == [[0, 1, 4, 6, 2, 3, 5, 7]] * 2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_too_few_valid_tokens_leave_minus_one(make, device, rule, name, dtype):
    similarity = similarity_of(make(2, 6, 8)).to(dtype).transpose(1, 2)
    scores = make(2, 6, dtype=dtype).sigmoid()
    valid = torch.tensor([[False] * 6, [True, False, True, False, False, False]], device=device)
    with backend(name):
        chosen = greedy_select(similarity, scores, 7, rule, valid)
        assert greedy_select(similarity, scores, 0, rule).shape == (2, 0)
    assert chosen[0].tolist() == [-1] * 7
    assert sorted(chosen[1].tolist()) == [-1] * 5 + [0, 2]


def test_unknown_rule(make):
    with pytest.raises(ValueError, match="diverse"):
        greedy_select(make(1, 2, 2), make(1, 2), 1, "nearest")
