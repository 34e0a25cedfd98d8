"""The sensitivity estimate against the literal finite difference, the closed form against autograd."""

import pytest
import torch
from torch.nn.functional import gelu, linear, silu
from transformers.activations import ACT2FN

from vlm_prune.kernels.dispatch import backend
from vlm_prune.kernels.token_sensitivity import (
    closed_form,
    directional,
    monte_carlo,
    reference,
    triton_kernel,
    weight_kernel,
    weight_root,
)


def parts(make, tokens, features, hidden, width, dtype):
    weights = (make(hidden, features) / 4, make(hidden) / 4, make(width, hidden) / 4)
    return make(*tokens, features).to(dtype), *(w.to(dtype) for w in weights)


def literal(x, w1, b1, act, w2, bank, h):
    def project(x):
        return linear(act(linear(x, w1, b1)), w2)

    norms = [(project(x + h * u) - project(x - h * u)).norm(dim=-1) / (2 * h) for u in bank]
    return torch.stack(norms).mean(0)


def jacobian_norm(x, w1, b1, act, w2):
    def project(x):
        return linear(act(linear(x, w1, b1)), w2)

    flat = torch.func.vmap(torch.func.jacrev(project))(x.flatten(0, -2))
    return (flat.flatten(1).norm(dim=1) / x.shape[-1] ** 0.5).view(x.shape[:-1])


SHAPES = [((1, 1), 3, 5, 2), ((2, 7), 24, 40, 70), ((67,), 5, 33, 9), ((5,), 6, 150, 140)]


@pytest.mark.parametrize("bias", [True, False])
def test_the_estimate_is_exact_in_float64(make, bias):
    x, w1, b1, w2 = parts(make, (2, 7), 24, 150, 140, torch.float64)
    b1 = b1 if bias else None
    bank = make(5, 24).double()
    for act in (gelu, silu):
        ours = monte_carlo(x, w1, b1, act, weight_root(w2), bank, 0.01)
        expected = literal(x, w1, b1, act, w2, bank, 0.01)
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_the_estimate_equals_the_literal_difference(make, assert_near, shape, dtype, name):
    x, w1, b1, w2 = parts(make, *shape, dtype)
    bank = make(3, shape[1]).to(dtype)
    exact = literal(x.double(), w1.double(), b1.double(), gelu, w2.double(), bank.double(), 0.1)
    with backend(name):
        ours = monte_carlo(x, w1, b1, ACT2FN["gelu"], weight_root(w2), bank, 0.1)
    assert_near("sensitivity", ours, exact, dtype if name == "triton" else torch.float32)


def loop(x, w1, b1, w2, bank):
    """The mean over u of |J u|, token by token, the Jacobian by automatic differentiation."""

    def project(token):
        return linear(gelu(linear(token, w1, b1)), w2)

    means = []
    for token in x.flatten(0, -2):
        jacobian = torch.autograd.functional.jacobian(project, token)
        means.append(sum((jacobian @ u).norm() for u in bank) / len(bank))
    return torch.stack(means).view(x.shape[:-1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_the_derivative_along_directions_equals_a_loop(
    make, assert_near, shape, dtype, name, monkeypatch
):
    monkeypatch.setattr(reference, "ROWS", 6)  # tokens are taken in turn
    monkeypatch.setattr(triton_kernel, "PRODUCTS", 300)  # directions of the widest, too
    x, w1, b1, w2 = parts(make, *shape, dtype)
    bank = make(3, shape[1]).to(dtype)
    exact = loop(x.double(), w1.double(), b1.double(), w2.double(), bank.double())
    with backend(name):
        ours = directional(x, w1, b1, gelu, weight_root(w2), bank)
    assert_near("derivative", ours, exact, dtype if name == "triton" else torch.float32)


def test_the_difference_tends_to_the_derivative(make):
    x, w1, _, w2 = parts(make, (2, 7), 24, 150, 140, torch.float64)
    bank, root = make(5, 24).double(), weight_root(w2)
    limit = directional(x, w1, None, silu, root, bank)
    errors = [
        (monte_carlo(x, w1, None, silu, root, bank, step) / limit - 1).abs().max()
        for step in (0.1, 0.01)
    ]
    assert errors[1] < errors[0] / 50 < 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_the_closed_form_equals_the_jacobian_norm(make, assert_near, shape, dtype, name):
    x, w1, b1, w2 = parts(make, *shape, dtype)
    exact = jacobian_norm(x.double(), w1.double(), b1.double(), gelu, w2.double())
    with backend(name):
        ours = closed_form(x, w1, b1, gelu, weight_kernel(w1, w2))
    assert_near("closed form", ours, exact, dtype if name == "triton" else torch.float32)


def test_the_closed_form_is_the_root_mean_square_limit(make):
    x, w1, b1, w2 = parts(make, (6,), 24, 40, 32, torch.float64)
    bank = make(4000, 24).double()
    bank /= bank.norm(dim=1, keepdim=True)
    exact = closed_form(x, w1, b1, gelu, weight_kernel(w1, w2))
    sampled = monte_carlo(x, w1, b1, gelu, weight_root(w2), bank, 1e-5)
    # the mean of a norm is at most its root mean square, and close to it in many dimensions
    assert (sampled <= exact * 1.01).all()
    assert (sampled > exact * 0.9).all()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_strided_inputs_and_no_tokens(make, assert_near, name):
    x, w1, b1, w2 = parts(make, (9,), 8, 20, 12, torch.float32)
    bank = make(2, 8)
    with backend(name):
        root = weight_root(w2.T.contiguous().T)
        strided = monte_carlo(x[::2], w1.T.contiguous().T, b1, gelu, root, bank, 0.1)
        root = weight_root(w2)
        assert_near("strided", strided, monte_carlo(x, w1, b1, gelu, root, bank, 0.1)[::2].double())
        assert closed_form(x[:0], w1, b1, gelu, weight_kernel(w1, w2)).shape == (0,)
        assert monte_carlo(x[:0], w1, b1, gelu, root, bank, 0.1).shape == (0,)
        assert directional(x[:0], w1, b1, gelu, root, bank).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_activation_that_triton_lacks_runs_the_reference(make, dtype):
    x, w1, b1, w2 = parts(make, (4,), 8, 20, 12, dtype)
    with backend("triton"):
        root, kernel = weight_root(w2), weight_kernel(w1, w2)
    bank = make(2, 8)

    def both():
        estimate = monte_carlo(x, w1, b1, silu, root, bank, 0.1)
        limit = directional(x, w1, b1, silu, root, bank)
        return torch.stack([estimate, limit, closed_form(x, w1, b1, silu, kernel)])

    with backend("triton"):
        ours = both()
    with backend("reference"):
        assert torch.equal(ours, both())


def test_the_root_is_triangular_and_leaves_norms(make):
    for width, hidden in ((140, 150), (150, 140)):
        w2, rows = make(width, hidden).double(), make(7, hidden).double()
        root = weight_root(w2)
        assert root.shape == (140, hidden) and not root.tril(-1).any()
        torch.testing.assert_close((rows @ root.T).norm(dim=1), (rows @ w2.T).norm(dim=1))
