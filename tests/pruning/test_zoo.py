"""ZOO-Prune's selection against a slow loop written from the paper's equations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, gelu
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from vlm_prune.kernels.token_sensitivity.reference import mean_lengths, mean_lengths_in_bf16
from vlm_prune.pruning.select import diverse, min_max
from vlm_prune.pruning.zoo import BoundedSensitivity, Zoo, ZooExact
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.projector import Projector
from vlm_prune.vlm.tokens import VisionTokens


def test_greedy_selection_equals_the_papers_loop():
    torch.manual_seed(1)
    scores, features = min_max(torch.rand(3, 20)), torch.randn(3, 20, 8)
    chosen = diverse(scores, features, 9)
    for image in range(3):
        picked = [int(scores[image].argmax())]
        while len(picked) < 9:
            gains = [
                -1.0
                if i in picked
                else scores[image, i]
                * (
                    1
                    - max(
                        cosine_similarity(features[image, i], features[image, j], 0) for j in picked
                    )
                )
                for i in range(20)
            ]
            picked.append(int(torch.tensor(gains).argmax()))
        assert chosen[image].tolist() == picked


def slow_sensitivity(project, tokens, pruner):
    """The mean over u of |M(x + h u) - M(x - h u)| / 2h for each of (N, d_v), in float64."""
    generator, step = torch.Generator().manual_seed(pruner.seed), pruner.step
    bank = torch.randn(pruner.directions, tokens.shape[-1], generator=generator).double()
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for u in bank / bank.norm(dim=1, keepdim=True):
        total += (project(tokens.double() + step * u) - project(tokens.double() - step * u)).norm(
            dim=1
        )
    return total / (2 * step * len(bank))


@pytest.mark.parametrize("combine", ["product", "sensitivity"])
def test_reduce_equals_the_papers_loop_over_the_models_projector(combine, llava, vision):
    """S_i is the mean over u of |M(x_i + h u) - M(x_i - h u)| / 2h; then S_i (1 - max cos) by turns."""
    directions, step, budget = 3, 0.01, 12
    project = copy.deepcopy(llava.model.multi_modal_projector).double()
    pruner = Zoo(budget=budget, directions=directions, step=step, seed=7, combine=combine)
    kept = pruner.reduce(vision)
    for image, tokens in enumerate(vision.features):
        with torch.no_grad():
            sensitivity = slow_sensitivity(project, tokens, pruner)
        low, high = sensitivity.min(), sensitivity.max()
        score = ((sensitivity - low) / (high - low + 1e-8)).tolist()
        ranked = sorted(range(len(score)), key=lambda i: -score[i])
        picked = ranked[:1]
        projected = vision.projected[image].double()
        closest = cosine_similarity(projected, projected[picked[0]], 1).tolist()
        while len(picked) < budget and combine == "product":
            free = [i for i in range(len(score)) if i not in picked]
            picked.append(max(free, key=lambda i: score[i] * (1 - closest[i])))
            newest = cosine_similarity(projected, projected[picked[-1]], 1).tolist()
            closest = [max(pair) for pair in zip(closest, newest, strict=True)]
        expected = picked if combine == "product" else ranked[:budget]
        assert kept.indices[image].tolist() == sorted(expected)


def random_tokens(count, widths, images=2):
    """Tokens of a random projector in float64, some of them alike and one that moves nothing."""
    narrow, hidden, wide = widths
    w1, b1, w2 = torch.randn(hidden, narrow), torch.randn(hidden), torch.randn(wide, hidden)
    scale = torch.rand(images, count, 1) * 3
    features = torch.randn(images, count, narrow) * scale
    features[:, 1] = features[:, 0] + 1e-3 * torch.randn(narrow)
    projector = Projector.of(*(w.double() for w in (w1, b1)), gelu, w2.double(), None)
    features = features.double()
    return VisionTokens(
        features=features, projected=projector(features), grids=((1, count),),
        seeds=tuple(range(images)), projector=projector, query_key=None,
    )  # fmt: skip


def test_tokens_that_are_no_numbers_end_the_search():
    tokens = random_tokens(40, (5, 9, 3))
    tokens.features[:, 3], tokens.projected[:, 3] = torch.nan, torch.nan
    assert [len({*kept.tolist()}) for kept in Zoo(budget=8).reduce(tokens).indices] == [8, 8]


@pytest.mark.parametrize("widths", [(5, 9, 3), (24, 150, 140), (40, 30, 200)], ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"directions": 1}, {"rank": 2}, {"directions": 300}], ids=str
)
def test_tokens_that_are_not_computed_would_not_be_chosen(widths, arguments, monkeypatch):
    """The choice by bounds is that by all sensitivities, in its order, and most are not computed."""
    computed = []
    compute = BoundedSensitivity.compute

    def counted(self, order):
        before = int(self.known.sum())
        compute(self, order)
        computed.append(int(self.known.sum()) - before)

    monkeypatch.setattr(BoundedSensitivity, "compute", counted)
    torch.manual_seed(sum(widths))
    tokens = 0
    for budget in (1, 7, 40, 90):
        vision = random_tokens(200, widths)
        pruner = Zoo(budget=budget, seed=budget, **arguments)
        full = diverse(min_max(pruner.sensitivity(vision)), vision.projected, budget)
        assert pruner.product(vision, budget).tolist() == full.tolist()
        tokens += 2 * 200
    # lengths that differ much between directions leave little to bound
    assert sum(computed) < (1.01 if "rank" in arguments else 0.6) * tokens


@pytest.mark.parametrize("widths", [(24, 150, 140), (40, 30, 200)], ids=str)
@pytest.mark.parametrize("directions", [3, 64])
def test_tokens_that_low_precision_rules_out_would_not_be_chosen(widths, directions, monkeypatch):
    """On any processor, as if it had matrix units for bfloat16; fewer are computed than by bounds alone."""
    known = {True: 0, False: 0}
    diverse_of = BoundedSensitivity.diverse
    for quick in (False, True):

        def counted(self, *arguments, quick=quick):
            chosen = diverse_of(self, *arguments)
            known[quick] += int(self.known.sum())
            assert (self.rough is not None) == quick
            return chosen

        monkeypatch.setattr(BoundedSensitivity, "diverse", counted)
        monkeypatch.setattr("vlm_prune.pruning.zoo.multiplies_bf16", lambda device, q=quick: q)
        torch.manual_seed(sum(widths))
        for budget in (64, 90):
            vision = random_tokens(300, widths)
            pruner = Zoo(budget=budget, directions=directions)
            full = diverse(min_max(pruner.sensitivity(vision)), vision.projected, budget)
            assert pruner.product(vision, budget).tolist() == full.tolist()
    assert known[True] < known[False]


@torch.no_grad()
def test_lengths_in_low_precision_are_near_the_exact_ones():
    torch.manual_seed(5)
    slope, shifts, root = torch.rand(50, 96), torch.randn(64, 96), torch.randn(80, 96).triu()
    exact, rough = mean_lengths(slope, shifts, root), mean_lengths_in_bf16(slope, shifts, root)
    assert rough.dtype == torch.float32 and 0 < (rough / exact - 1).abs().max() < 2**-10


@torch.no_grad()
def test_bounds_hold_and_alike_tokens_are_all_of_them_the_largest():
    torch.manual_seed(4)
    vision = random_tokens(60, (6, 20, 12), images=1)
    pruner = Zoo(directions=5)
    weights = pruner.weights(vision)
    arguments = (weights, gelu, pruner.bank(vision))
    (bounded,) = BoundedSensitivity.of(vision.features, *arguments)
    exact = pruner.sensitivity(vision)[0]
    assert (exact <= bounded.values).all() and (exact > 0.5 * bounded.values).any()
    assert bounded.largest() == bounded.values[exact.argmax()] and 0 < int(bounded.known.sum()) < 60
    torch.testing.assert_close(bounded.smallest(), exact.min(), rtol=1e-12, atol=0)
    same = vision.features[:, :1].expand(1, 60, 6)
    (bounded,) = BoundedSensitivity.of(same, *arguments)
    assert bounded.diverse(torch.eye(60, dtype=torch.float64), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("rank", [1, 5, 10_000])
@torch.no_grad()
def test_a_rank_is_that_of_both_layers(rank, llava, vision):
    """The estimate on a projector whose weights are cut by singular value decomposition."""
    project = copy.deepcopy(llava.model.multi_modal_projector).double()
    for layer in (project.linear_1, project.linear_2):
        first, sizes, rows = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_(first[:, :rank] @ torch.diag(sizes[:rank]) @ rows[:rank])
    whole = Zoo(directions=4, seed=3).sensitivity(vision)
    for estimator in ("auto", "difference"):
        pruner = Zoo(directions=4, rank=rank, seed=3, estimator=estimator)
        ours = pruner.sensitivity(vision)
        for image, tokens in enumerate(vision.features):
            expected = slow_sensitivity(project, tokens, pruner).float()
            torch.testing.assert_close(ours[image], expected, rtol=2e-3, atol=1e-5)
        assert torch.allclose(ours, whole, rtol=1e-3) == (rank == 10_000)
    closed = ZooExact(rank=rank).sensitivity(vision)
    assert torch.allclose(closed, ZooExact().sensitivity(vision), rtol=1e-3) == (rank == 10_000)


@torch.no_grad()
def test_weights_are_cut_once_for_each_rank(vision):
    assert Zoo(rank=2).weights(vision) is Zoo(rank=2).weights(vision)
    assert Zoo(rank=2).weights(vision) is not Zoo(rank=3).weights(vision)


def test_a_projector_of_other_layers_is_sampled_as_written():
    """That of Gemma 3 is a norm and a linear map; a token's length decides how much it moves."""
    torch.manual_seed(0)
    project = nn.Sequential(Gemma3RMSNorm(8), nn.Linear(8, 6, bias=False)).eval()
    features = torch.randn(2, 20, 8) * torch.rand(2, 20, 1).add(0.2)
    vision = VisionTokens(
        features=features, projected=project(features), grids=((4, 5),), seeds=(0, 1),
        projector=project, query_key=None,
    )  # fmt: skip
    pruner = Zoo(budget=6, directions=8)
    exact = copy.deepcopy(project).double()
    for image, ours in enumerate(pruner.sensitivity(vision)):
        expected = slow_sensitivity(exact, features[image], pruner)
        torch.testing.assert_close(ours, expected.float(), rtol=2e-3, atol=1e-4)
    assert [len(own) for own in pruner.reduce(vision).indices] == [6, 6]
    for method in (ZooExact(), Zoo(rank=2)):
        with pytest.raises(InputError, match="a projector of two layers"):
            method.reduce(vision)


def test_what_zoo_needs_of_a_projector():
    linear = "a nonlinear projector (a linear one is equally sensitive to all tokens)"
    assert Zoo().needs == {linear}
    assert Zoo(rank=8).needs == {linear, "a two-layer projector"}
    assert Zoo(estimator="derivative").needs == {linear, "a two-layer projector"}
    assert ZooExact().needs == {"a two-layer projector"}
    assert not Zoo(combine="diversity").needs and not ZooExact(combine="diversity").needs


def test_min_max_of_equal_scores_is_ones():
    assert torch.equal(min_max(torch.full((1, 4), 3.0)), torch.ones(1, 4))


@pytest.mark.parametrize(
    "wrong",
    [{"step": 0}, {"directions": 0}, {"combine": "sum"}, {"rank": -1}, {"estimator": "exact"}],
)
def test_bad_hyperparameters_are_refused(wrong):
    with pytest.raises(InputError):
        Zoo(**wrong)


def test_the_closed_form_follows_weights_that_change():
    """The matrix that is kept per projector must not outlive the weights it was made from."""
    torch.manual_seed(2)
    w1, w2 = torch.randn(8, 4), torch.randn(6, 8)

    def vision():
        return VisionTokens(
            features=torch.ones(1, 3, 4), projected=torch.ones(1, 3, 6), grids=((1, 3),), seeds=(0,),
            projector=Projector.of(w1, None, gelu, w2, None), query_key=None,
        )  # fmt: skip

    pruner = ZooExact(budget=1)
    first = pruner.sensitivity(vision())
    torch.testing.assert_close(pruner.sensitivity(vision()), first)
    w2.mul_(2)
    torch.testing.assert_close(pruner.sensitivity(vision()), 2 * first)
    w2 = w2 / 4
    torch.testing.assert_close(pruner.sensitivity(vision()), first / 2)
