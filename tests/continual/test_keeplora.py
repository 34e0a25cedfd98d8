"""KeepLoRA against a slow loop from its equations: subspaces, first gradient, steps and merging."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call

from vlm_prune.continual.attention import split
from vlm_prune.continual.config import Placement, Recipe
from vlm_prune.continual.methods import Context, make_method
from vlm_prune.continual.methods.keeplora import residual_factors, with_features

RANK, STEPS, SCALE = 2, 4, 0.5
RECIPE = Recipe(steps=STEPS, batch=4, lr=1e-2, betas=(0.9, 0.99))
CLASSES = ["a photo of a red.", "a photo of a green."]
ENERGY = {"vision": 0.6, "text": 0.3, "feature": 0.7}


def top(energies, share):
    """The least number of falling energies that hold a share of their sum."""
    held, count = 0.0, 0
    while held < share * energies.sum():
        held, count = held + energies[count], count + 1
    return count


def projector(basis):
    return np.asarray(basis) @ np.asarray(basis).T


def principal(weight, share):
    _, values, rows = np.linalg.svd(weight.double().numpy())
    return rows[: top(values**2, share)].T


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        pixels = torch.randn(4, 3, 32, 32, generator=generator)
        yield pixels, torch.randint(2, (4,), generator=generator)


@pytest.fixture
def start(clip):
    """A method at the start of a task, and the CLIP before it, split."""

    def begin(method, number=0):
        plain = copy.deepcopy(clip).model
        split(plain)
        plain.requires_grad_(False)
        ids = clip.tokenize(CLASSES)
        context = Context(clip, RECIPE, number, ids, ids[:0], lambda: batches(5))
        return method.begin_task(context), plain, ids

    return begin


def make(modules=("q", "out")):
    return make_method(
        "keeplora", rank=RANK, scale=SCALE, placement=Placement("all", modules),
        vision_energy=ENERGY["vision"], text_energy=ENERGY["text"],
        feature_energy=ENERGY["feature"],
    )  # fmt: skip


def test_a_task_equals_the_papers_loop(start, clip):
    method = make()
    groups, model, ids = start(method)
    names = list(method.layers)
    weights = {name: model.get_submodule(name).weight.clone() for name in names}
    scale = float(model.logit_scale.exp())

    def loss_of(changed, pixels, labels):
        full = {f"{name}.weight": weight for name, weight in changed.items()}
        images, texts = (
            torch.nn.functional.normalize(functional_call(model, full, (), {kind: x})[at], dim=-1)
            for at, (kind, x) in enumerate((("image", pixels), ("text", ids)))
        )
        logits, total = scale * images @ texts.T, 0.0
        for row, label in zip(logits, labels, strict=True):
            total = total - row.log_softmax(0)[label] / len(labels)
        for image, label in enumerate(labels):
            total = total - logits[:, label].log_softmax(0)[image] / len(texts)
        return total

    # the first gradient, outside of the weights' principal input directions
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    first = next(batches(0))
    gradients = torch.autograd.grad(loss_of(leaves, *first), list(leaves.values()))
    bases, factors = {}, {}
    for name, gradient in zip(names, gradients, strict=True):
        share = ENERGY["vision" if name.startswith("visual") else "text"]
        bases[name] = principal(weights[name], share)
        rest = gradient.double().numpy() @ (np.eye(gradient.shape[1]) - projector(bases[name]))
        u, s, v = np.linalg.svd(rest, full_matrices=False)
        a, b = (torch.tensor(x[:RANK].copy()).float() for x in (v, (u * s).T))
        factors[name] = a, b, b.clone().requires_grad_()
    reference = torch.optim.AdamW([b for _, _, b in factors.values()], RECIPE.lr, RECIPE.betas)
    ours = torch.optim.AdamW(groups, betas=RECIPE.betas)
    reference.param_groups[0]["weight_decay"] = ours.param_groups[0]["weight_decay"] = 0.1
    for step, (pixels, labels) in enumerate(batches(0)):
        loss = method.loss(pixels, labels, step)
        # W' = W - scale B0 A stands below, B A is added to it
        changed = {
            name: weights[name] - SCALE * b0.T @ a + SCALE * b.T @ a
            for name, (a, b0, b) in factors.items()
        }
        theirs = loss_of(changed, pixels, labels)
        torch.testing.assert_close(loss, theirs, atol=1e-4, rtol=1e-4)
        for optimizer, value in ((ours, loss), (reference, theirs)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    # features of the trained model that are outside, their top directions
    for name, basis in bases.items():
        rows = []
        hook = method.layers[name].register_forward_hook(
            lambda _, inputs, output, rows=rows: rows.append(inputs[0].detach().flatten(0, -2))
        )
        with torch.no_grad():
            for pixels, _ in batches(5):
                clip.encode_image(pixels)
            clip.encode_text(ids)
        hook.remove()
        x = torch.cat(rows).double().numpy()
        outside = x - x @ projector(basis)
        _, values, v = np.linalg.svd(outside, full_matrices=False)
        held, count = (x**2).sum() - (outside**2).sum(), 0
        while held < ENERGY["feature"] * (x**2).sum():
            held, count = held + values[count] ** 2, count + 1
        bases[name] = np.concatenate([basis, v[:count].T], 1)
    method.end_task()
    split(clip.model)
    for name, (a, b0, b) in factors.items():
        merged = weights[name] + SCALE * (b - b0).T @ a
        found = clip.model.get_submodule(name).weight
        torch.testing.assert_close(found, merged, atol=2e-3, rtol=1e-2)
        np.testing.assert_allclose(
            projector(method._protected[name]), projector(bases[name]), atol=1e-6
        )


def test_the_next_task_changes_nothing_on_protected_inputs(start, clip):
    method, sizes = make(), []
    for number in range(2):
        groups, *_ = start(method, number)
        protected = {name: basis.clone() for name, basis in method._protected.items()}
        optimizer = torch.optim.AdamW(groups)
        for step, (pixels, labels) in enumerate(batches(number)):
            method.loss(pixels, labels, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        delta = method.end_task()
        sizes.append({name: basis.shape[1] for name, basis in protected.items()})
    assert any(sizes[1][name] > size for name, size in sizes[0].items())
    for name, basis in protected.items():
        change = delta.factors[name].matrix().double()
        assert change.norm() > 1e-3
        assert (change @ basis).norm() < 1e-5 * change.norm()


def test_no_direction_left_leaves_the_weight_alone():
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    a, b = residual_factors(torch.randn(4, 6), basis, 3)
    assert not a.any() and not b.any()
    a, b = residual_factors(torch.randn(4, 6), basis[:, :5], 3)
    assert a[0].norm() == pytest.approx(1) and not a[1:].any()
    assert abs(float(a[0] @ basis[:, 5])) == pytest.approx(1)


def test_features_that_are_protected_already_add_nothing():
    x = torch.randn(50, 8, dtype=torch.float64) * torch.tensor([9, 3, 1, 1, 1, 1, 1, 0.1])
    basis = with_features(x.new_zeros(8, 0), x.T @ x, 0.9)
    assert 0 < basis.shape[1] < 8
    assert with_features(basis, x.T @ x, 0.9).shape == basis.shape
    assert with_features(basis, x.T @ x, 1.0).shape[1] == 8
