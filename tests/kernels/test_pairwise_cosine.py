"""Cosines against the definition in float64."""

import pytest
import torch

from vlm_prune.kernels.dispatch import backend
from vlm_prune.kernels.pairwise_cosine import pairwise_cosine

SHAPES = [(1, 1, 1, 3), (2, 5, 70, 40), (3, 67, 9, 300)]


def defined(one, other):
    products = one.double() @ other.double().transpose(1, 2)
    return products / (one.double().norm(dim=2)[:, :, None] * other.double().norm(dim=2)[:, None])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_equals_the_definition(make, assert_near, shape, dtype, name):
    images, rows, columns, width = shape
    one, other = make(images, rows, width, dtype=dtype), make(images, columns, width, dtype=dtype)
    with backend(name):
        assert_near("cosine", pairwise_cosine(one, other), defined(one, other))


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_strided_inputs_zeros_and_nothing(make, assert_near, name):
    one, other = make(2, 24, 30).transpose(1, 2), make(2, 14, 24)[:, ::2]
    with backend(name):
        assert_near("strided", pairwise_cosine(one, other), defined(one, other))
        assert pairwise_cosine(one * 0, other).tolist() == torch.zeros(2, 30, 7).tolist()
        assert pairwise_cosine(one[:, :0], other).shape == (2, 0, 7)
        assert pairwise_cosine(one[:0], other[:0]).shape == (0, 30, 7)


def test_a_token_and_itself_are_the_same_pair_both_ways(make):
    features = make(1, 70, 200, dtype=torch.bfloat16)
    with backend("triton"):
        cosine = pairwise_cosine(features, features)
    torch.testing.assert_close(cosine, cosine.transpose(1, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(cosine.diagonal(dim1=1, dim2=2), torch.ones(1, 70).to(cosine))
