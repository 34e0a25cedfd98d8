"""Survival against the initial gates, and the rank map."""

import numpy as np
import pytest
import torch

from vlm_prune.continual.attention import sites, split
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.delta import Delta, Factors
from vlm_prune.continual.diagnostics import draw_ranks, null_ranks, ranks, survival, update_norms
from vlm_prune.continual.methods import make_method
from vlm_prune.continual.prox import total_shrinkage
from vlm_prune.continual.train import ContinualRun, train_tasks

NAME = "visual.transformer.resblocks.1.attn.q_proj"


def delta(kept):
    start = torch.tensor([0.9, -0.8, 0.1, 0.2])
    kept = torch.tensor(kept, dtype=torch.long)
    factors = Factors(torch.ones(len(kept), 3), torch.ones(2, len(kept)), start[kept], start, kept)
    return Delta({NAME: factors})


def test_survival_that_follows_the_initial_gates():
    found = survival(delta([0, 1]), 0.65)
    assert (found.components, found.kept, found.expected, found.agreement) == (4, 2, 2, 1.0)
    assert found.correlation == pytest.approx(
        np.corrcoef([0.9, 0.8, 0.1, 0.2], [1, 1, 0, 0])[0, 1], abs=1e-6
    )


def test_survival_that_does_not():
    found = survival(delta([2, 3]), 0.65)
    assert found.agreement == 0 and found.correlation < -0.9
    for kept in ([0, 1, 2, 3], []):
        one = survival(delta(kept), 0.65)
        assert np.isnan(one.correlation) and one.mean_rank_share == len(kept) / 4


@pytest.mark.slow
def test_the_published_schedule_keeps_what_started_large(clip, tasks, tmp_path):
    method = make_method("codyra", rank=16)
    train_tasks(ContinualRun(tmp_path, method, Recipe(batch=9), cpu=True), clip, tasks[:1])
    path = tmp_path / "deltas" / "task-0.safetensors"
    found = survival(Delta.load(path), total_shrinkage(500, 0.5, 0.005))
    assert found.agreement > 0.95 and found.correlation > 0.7
    assert 7 < 16 * found.mean_rank_share < 10


def test_rank_map_and_picture(clip, tmp_path):
    split(clip.model)
    places = sites(clip.model)
    table = ranks(delta([0, 2, 3]), places, "vision")
    assert table.shape == (6, 2) and table[0, 1] == 3 and np.isnan(table).sum() == 11
    draw_ranks(delta([0, 2, 3]), places, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000
    assert null_ranks(delta([0]), 0.65) == {NAME: 2}
    assert update_norms(delta([0])) == {NAME: pytest.approx(0.9 * 6**0.5)}
