"""Methods that take tokens in one order: a smaller budget keeps the first that a larger one keeps."""

from dataclasses import replace

import pytest
import torch

from vlm_prune.pruning import METHODS, OrderPruner
from vlm_prune.vlm.orders import SharedOrders

IN_ONE_ORDER = [name for name, method in METHODS.items() if issubclass(method, OrderPruner)]


@pytest.fixture
def with_questions(vision):
    """The tokens of two images, with a question about each."""
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randn(count, vision.projected.shape[2], generator=draw) for count in (3, 5)]
    return replace(vision, question=lambda: tuple(texts))


def same(ours, theirs):
    parts = zip(ours.indices + ours.features, theirs.indices + theirs.features, strict=True)
    return all(torch.equal(one, other) for one, other in parts)


def test_which_methods_these_are():
    assert set(IN_ONE_ORDER) >= {"divprune", "zoo", "zoo-exact", "cdpruner", "scope", "mmtok"}
    assert set(IN_ONE_ORDER) >= {"coin", "random", "fopru"}


@pytest.mark.parametrize("name", IN_ONE_ORDER)
def test_one_order_serves_all_budgets(name, with_questions):
    orders = SharedOrders(torch.device("cpu"))
    shared = replace(with_questions, orders=orders)
    for budget in (150, 90, 40, 200, 7):
        method = METHODS[name](budget=budget)
        alone = method.reduce(with_questions)
        assert [len(indices) for indices in alone.indices] == [budget] * 2
        assert same(method.reduce(shared), alone)
    assert [order.tokens.shape[1] for order in orders.found] == [150, 200]
    found = [order.seconds for order in orders.found]
    assert orders.reused_s == pytest.approx(2 * found[0] + found[0]) and min(found) > 0


def test_other_hyperparameters_and_other_tokens_have_orders_of_their_own(with_questions):
    shared = replace(with_questions, orders=SharedOrders(torch.device("cpu")))
    for method in (METHODS["random"](seed=1), METHODS["random"](seed=2), METHODS["divprune"]()):
        assert same(method.reduce(shared), method.reduce(with_questions))
    assert len(shared.orders.found) == 3
    assert shared.of(0, torch.arange(576) < 100).orders is None


def test_zoo_does_not_share_orders_of_bounded_and_of_all_sensitivities(with_questions):
    shared = replace(with_questions, orders=SharedOrders(torch.device("cpu")))
    for budget in (400, 300, 200, 100):
        METHODS["zoo"](budget=budget).reduce(shared)
    assert [order.tokens.shape[1] for order in shared.orders.found] == [400, 200]
