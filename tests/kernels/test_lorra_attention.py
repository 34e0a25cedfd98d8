"""Learner attention and its gradients against float64, and no leak from the future."""

import pytest
import torch

from vlm_prune.kernels.dispatch import backend
from vlm_prune.kernels.lorra_attention import lorra_attention

NAMES = ["query", "key", "value", "router"]
# batch, heads, groups, queries, keys, width, value width, routes
SHAPES = [(1, 1, 1, 7, 3, 16, 16, 2), (2, 4, 2, 9, 5, 20, 12, 2), (1, 2, 1, 35, 34, 8, 40, 0)]


def build(make, device, shape, dtype=torch.float32):
    batch, heads, groups, queries, keys, width, value_width, routes = shape
    tensors = [
        make(batch, queries, heads, width, dtype=dtype).transpose(1, 2),
        make(batch, groups, keys, width, dtype=dtype),
        make(batch, keys, groups, value_width, dtype=dtype).transpose(1, 2),
        make(batch, keys, routes, dtype=dtype),
    ]
    query_at = torch.arange(queries, device=device).repeat(batch, 1)
    key_at = torch.arange(keys, device=device).repeat(batch, 1) * 2
    if keys > 1:
        key_at[:, 0] = -1
        query_at[-1, -1] = -1
    return tensors, query_at, key_at


def run(name, tensors, query_at, key_at):
    query, key, value, router = leaves = [t.detach().requires_grad_() for t in tensors]
    with backend(name):
        attended, logits = lorra_attention(query, key, value, query_at, key_at, router)
        loss = (attended.double() * torch.arange(attended.shape[-1], device=query.device)).sum()
        loss = loss + (logits.double() * torch.arange(1, 1 + logits.shape[-1], device=query.device)
                       * torch.arange(logits.shape[1], device=query.device)[:, None]).sum()  # fmt: skip
        gradients = torch.autograd.grad(loss, leaves)
    return attended, logits, gradients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernel_equals_the_reference_in_float64(make, device, assert_near, shape, dtype):
    tensors, query_at, key_at = build(make, device, shape, dtype)
    exact = run("reference", [t.double() for t in tensors], query_at, key_at)
    ours = run("triton", tensors, query_at, key_at)
    assert ours[0].dtype == dtype
    assert_near("attended", ours[0], exact[0], dtype)
    if shape[-1]:
        assert_near("logits", ours[1], exact[1], dtype)
    for name, gradient, expected in zip(NAMES, ours[2], exact[2], strict=True):
        if expected.numel():
            assert_near(f"gradient of {name}", gradient, expected, dtype)


def test_reference_equals_a_loop_over_rows(make, device):
    (query, key, value, router), query_at, key_at = build(make, device, SHAPES[1])
    with backend("reference"):
        attended, logits = lorra_attention(query, key, value, query_at, key_at, router)
    for b in range(2):
        for s in range(9):
            seen = (key_at[b] >= 0) & (key_at[b] <= query_at[b, s])
            routed = torch.zeros(2, device=device)
            for h in range(4):
                scores = key[b, h // 2, seen] @ query[b, h, s] / 20**0.5
                weights = scores.softmax(0)
                routed += weights @ router[b, seen] / 4
                torch.testing.assert_close(attended[b, h, s], weights @ value[b, h // 2, seen])
            torch.testing.assert_close(logits[b, s], routed)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_rows_that_see_nothing_are_zero_and_the_future_does_not_leak(make, device, name):
    (query, key, value, router), query_at, key_at = build(make, device, SHAPES[1])
    attended, logits, _ = run(name, (query, key, value, router), query_at, key_at)
    blind = ~((key_at[:, None] >= 0) & (key_at[:, None] <= query_at[..., None])).any(-1)
    assert blind.any() and not blind.all()
    assert not attended.transpose(1, 2)[blind].any() and not logits[blind].any()
    late = key_at == 6
    for tensor in (key.transpose(1, 2), value.transpose(1, 2), router):
        tensor[late] += 1
    moved = run(name, (query, key, value, router), query_at, key_at)
    before = query_at < 6
    assert torch.equal(moved[0].transpose(1, 2)[before], attended.transpose(1, 2)[before])
    assert torch.equal(moved[1][before], logits[before])
    assert not torch.equal(moved[0], attended) and not torch.equal(moved[1], logits)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_no_keys_give_zeros_and_zero_gradients(make, device, name):
    tensors, query_at, key_at = build(make, device, (1, 2, 2, 3, 0, 8, 8, 2))
    attended, logits, gradients = run(name, tensors, query_at, key_at)
    assert not attended.any() and not logits.any() and not gradients[0].any()
