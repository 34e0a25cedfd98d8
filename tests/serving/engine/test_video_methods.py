"""EVS and VidCom2 beside those that vLLM ships, on the same tensors."""

import pytest
import torch

from vlm_prune.pruning.registry import build
from vlm_prune.vlm.tokens import VisionTokens

FRAMES, SIDE = 16, 8
N = FRAMES * SIDE**2


def scenes(seed):
    """Five scenes of 64 tokens, with noise."""
    draw = torch.Generator().manual_seed(seed)
    shown = torch.randn(5, SIDE**2, 256, generator=draw)[torch.arange(FRAMES) * 5 // FRAMES]
    return (shown + 0.4 * torch.randn(FRAMES, SIDE**2, 256, generator=draw)).flatten(0, 1)


def both(name, tokens, share, budget=None):
    """Indices that vLLM and our method keep of the tokens (N, d) at a share of them."""
    module = pytest.importorskip(f"vllm.multimodal.video_prune.{name}")
    mask = module.compute_retention_mask(tokens, (FRAMES, 2 * SIDE, 2 * SIDE), 2, 1 - share)
    vision = VisionTokens(
        features=tokens[None], projected=tokens[None], grids=((SIDE, SIDE),) * FRAMES, seeds=(0,),
        projector=torch.nn.Identity(), query_key=None, has_cls=False, frames=FRAMES,
    )  # fmt: skip
    kept = build(name, budget=share if budget is None else budget).select(vision).indices[0]
    return {*mask.nonzero()[:, 0].tolist()}, {*kept.tolist()}


@pytest.mark.parametrize("name", ["evs", "vidcom2"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_same_tokens_are_kept_in_fp32(name, share):
    for seed in range(4):
        theirs, ours = both(name, scenes(seed), share)
        assert theirs == ours and len(ours) == round(share * N)


def test_below_a_frame_vllm_keeps_a_frame_for_evs_and_a_token_of_each_for_vidcom2():
    theirs, ours = both("evs", scenes(0), 0.02)
    assert theirs == {*range(SIDE**2)} > ours and len(ours) == round(0.02 * N)
    theirs, ours = both("vidcom2", scenes(0), 0.01)
    assert len(theirs) == FRAMES > len(ours) == round(0.01 * N)


@pytest.mark.parametrize(("name", "least", "most"), [("evs", 1, 0.05), ("vidcom2", 10, 0.4)])
def test_in_bf16_vllm_scores_in_bf16_and_we_do_in_fp32(name, least, most):
    tokens = scenes(0).bfloat16()
    theirs, ours = both(name, tokens, 0.25)
    assert least <= len(theirs - ours) < most * len(ours)
    whole, _ = both(name, tokens.float(), 0.25)
    assert whole == ours
