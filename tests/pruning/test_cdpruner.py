"""CDPruner: its kernel, and the fast greedy selection against determinants computed outright."""

from dataclasses import replace

import torch
from torch.nn.functional import cosine_similarity

from vlm_prune.pruning.cdpruner import CDPruner, conditioned, relevance
from vlm_prune.pruning.select import dpp, min_max


def test_greedy_selection_maximizes_the_determinant_at_each_step():
    torch.manual_seed(0)
    features = torch.randn(2, 15, 10, dtype=torch.float64)
    kernel = conditioned(torch.rand(2, 15, dtype=torch.float64), features)
    chosen = dpp(kernel, 7)
    for image in range(2):
        picked = []
        for _ in range(7):
            volume = {
                i: float(torch.linalg.det(kernel[image][picked + [i]][:, picked + [i]]))
                for i in range(15)
                if i not in picked
            }
            picked.append(max(volume, key=volume.__getitem__))
        assert chosen[image].tolist() == picked


def test_beyond_the_rank_the_lowest_indices_follow():
    features = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2, 1, 0]][None]
    assert dpp(conditioned(torch.ones(1, 6), features), 6).tolist() == [[0, 2, 3, 1, 4, 5]]


def test_kernel_equals_the_papers_loop():
    torch.manual_seed(1)
    image, text = torch.randn(1, 6, 4), torch.randn(1, 3, 4)
    scores = [sum(float(cosine_similarity(v, t, 0)) for t in text[0]) / 3 for v in image[0]]
    torch.testing.assert_close(relevance(image, text)[0], torch.tensor(scores))
    low, high = min(scores), max(scores)
    scaled = [(s - low) / (high - low) for s in scores]
    expected = [
        [
            scaled[i] * float(cosine_similarity(image[0, i], image[0, j], 0)) * scaled[j]
            for j in range(6)
        ]
        for i in range(6)
    ]
    kernel = conditioned(min_max(relevance(image, text)), image)
    torch.testing.assert_close(kernel[0], torch.tensor(expected))


def test_the_question_decides(llava, vision, images, make_inputs):
    """Asking another question keeps other tokens; asking none is the unconditioned process."""
    kept = []
    for question in ("Is there a 7?", "What color is the star?"):
        with CDPruner(budget=32)(llava) as trace, torch.no_grad():
            llava(**make_inputs([(1, question)], images))
        kept.append(trace.kept[0].tolist())
    assert kept[0] != kept[1]
    alone = CDPruner(budget=32).reduce(vision).indices[0]
    plain = dpp(conditioned(torch.ones(2, 576), vision.projected.double()), 32)[0]
    assert alone.tolist() == plain.sort().values.tolist()


def test_negated_relevance_prefers_the_least_similar(vision):
    text = vision.projected[:, 7]
    with_question = replace(vision, question=lambda: tuple(text[:, None]))
    straight, negated = (
        CDPruner(budget=1, negated=flag).reduce(with_question).indices for flag in (False, True)
    )
    assert [int(p) for p in straight] == [7, 7]
    toward = relevance(vision.projected, text[:, None])
    assert [int(p) for p in negated] == toward.argmin(1).tolist()
