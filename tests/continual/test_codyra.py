"""CoDyRA against a slow loop from its equations: effective weights, both losses, AdamW, shrinkage."""

import copy
import math

import pytest
import torch
from torch.func import functional_call

from vlm_prune.continual.attention import split
from vlm_prune.continual.config import Placement, Recipe
from vlm_prune.continual.methods import Context, make_method

STEPS, RANK = 8, 3
RECIPE = Recipe(steps=STEPS, batch=4, lr=2e-2, betas=(0.9, 0.99))
CLASSES = ["a photo of a red.", "a photo of a green.", "a photo of a blue."]
EARLIER = ["a photo of a disc.", "a photo of a bar."]


def soft_threshold(w, kappa, operator):
    """1{|x| > k} (x - sign(x) k), or the three statements of the authors' code one after another."""
    if operator == "textbook":
        return math.copysign(abs(w) - kappa, w) if abs(w) > kappa else 0.0
    w = w - kappa if w > kappa else w
    w = w + kappa if w < -kappa else w
    return 0.0 if abs(w) < kappa else w


def ramp(step, kind, kappa):
    """Half the steps are dense; then the level rises at each step, or never in the authors' code."""
    if step <= STEPS // 2 or kind == "coded":
        return 0.0
    return kappa * (step - STEPS // 2 + 1) / 49


def loss_of(images, texts, scale, labels, earlier):
    """-log p(class | image), a mean, and -log p(image | class), a sum over all classes' number."""
    logits = [[scale * float_dot(image, text) for text in texts] for image in images]
    count, total = len(images), 0.0
    for row, label in zip(logits, labels, strict=True):
        total = total - (row[label] - torch.logsumexp(torch.stack(row), 0)) / count
    for column, label in enumerate(labels):
        of_class = torch.stack([row[label] for row in logits])
        gain = of_class[column] - torch.logsumexp(of_class, 0)
        total = total - gain / (len(texts) + earlier)
    return total


def float_dot(a, b):
    return (a / a.norm() * (b / b.norm())).sum()


@pytest.mark.parametrize("operator", ["textbook", "coded"])
@pytest.mark.parametrize("kind", ["textbook", "coded"])
def test_a_task_equals_the_papers_loop(operator, kind, clip):
    kappa = 3.0
    plain = copy.deepcopy(clip)
    ids, earlier = clip.tokenize(CLASSES), clip.tokenize(EARLIER)
    options = {"rank": RANK, "kappa": kappa, "operator": operator, "ramp": kind}
    method = make_method("codyra", placement=Placement("all", ("q", "o", "in")), **options)
    groups = method.begin_task(Context(clip, RECIPE, 1, ids, earlier))
    # the reference starts from the same factors; W + B diag(w) A replaces W
    model = plain.model
    split(model)
    model.requires_grad_(False)
    factors = {
        site: [p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.gate)]
        for site, layer in method.layers.items()
    }
    assert all(not b.any() for _, b, _ in factors.values())
    scale = float(model.logit_scale.detach().exp())

    def encode(kind, inputs):
        weights = {}
        for site, (a, b, w) in factors.items():
            change = sum(w[i] * torch.outer(b[:, i], a[i]) for i in range(RANK))
            weights[f"{site}.weight"] = model.get_submodule(site).weight + change
        names = {"image": inputs} if kind == "image" else {"text": inputs}
        found = functional_call(model, weights, (), names)
        return found[0] if kind == "image" else found[1]

    reference = torch.optim.AdamW(
        [p for own in factors.values() for p in own], lr=RECIPE.lr, betas=RECIPE.betas,
        weight_decay=0.0,
    )  # fmt: skip
    ours = torch.optim.AdamW(groups, betas=RECIPE.betas, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        pixels = torch.randn(4, 3, 32, 32, generator=generator)
        labels = torch.randint(3, (4,), generator=generator)
        loss = method.loss(pixels, labels, step)
        theirs = loss_of(encode("image", pixels), encode("text", ids), scale, labels.tolist(), 2)
        torch.testing.assert_close(loss, theirs, atol=1e-4, rtol=1e-4)
        for optimizer, value in ((ours, loss), (reference, theirs)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        method.after_step(step)
        shrink = ramp(step, kind, kappa)
        with torch.no_grad():
            for _, _, w in factors.values():
                values = [soft_threshold(float(x), shrink, operator) for x in w]
                w.copy_(torch.tensor(values))
        for site, (_, _, w) in factors.items():
            gate = method.layers[site].gate
            assert torch.equal(gate == 0, w == 0), (step, site)
            torch.testing.assert_close(gate, w, atol=2e-3, rtol=1e-2)
    kept = torch.cat([w != 0 for _, _, w in factors.values()])
    assert kept.all() if kind == "coded" else 0 < int(kept.sum()) < len(kept)
    method.end_task()
    split(clip.model)
    for site, (a, b, w) in factors.items():
        merged = model.get_submodule(site).weight + (b * w) @ a
        torch.testing.assert_close(
            clip.model.get_submodule(site).weight, merged, atol=5e-3, rtol=1e-2
        )
