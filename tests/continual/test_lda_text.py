"""LDA-text against its equations: discriminants, what prompts' features become, and what stays."""

import copy

import numpy as np
import pytest
import torch

from vlm_prune.continual.config import Recipe
from vlm_prune.continual.methods import make_method
from vlm_prune.continual.methods.lda_text import discriminants, random_texts, vocabulary
from vlm_prune.continual.train import ContinualRun, train_tasks

# the images of both tasks look alike
RECIPE = Recipe(steps=2, batch=4, joint=False)
SMALL = {"references": 32, "protect": 1.0}  # random towers tell texts hardly apart


@pytest.fixture
def learn(tasks, tmp_path):
    """Train a CLIP on tasks, both unless told; returns the results and the method's CLIP."""

    def run(clip, order=(0, 1), folder="run", **options):
        method = make_method("lda-text", **SMALL | options)
        chosen = [tasks[number] for number in order]
        return train_tasks(ContinualRun(tmp_path / folder, method, RECIPE, cpu=True), clip, chosen)

    return run


def stacked(clip, tasks):
    """Features (n, d) and joint labels (n,) of all training images, as numpy."""
    features, labels, first = [], [], 0
    for task in tasks:
        for image, label in task.train:
            with torch.no_grad():
                features.append(clip.encode_image(clip.eval_transform(image)[None])[0])
            labels.append(first + label)
        first += len(task.classes)
    return torch.stack(features).double().numpy(), np.array(labels)


def loop_targets(clip, tasks, shrinkage):
    """Where the class prompts' features shall lie, one class at a time."""
    features, labels = stacked(clip, tasks)
    prompts = [task.templates[0].format(name) for task in tasks for name in task.classes]
    means = [features[labels == label].mean(0) for label in range(len(prompts))]
    center = sum(means) / len(means)
    scatter = np.zeros((len(center), len(center)))
    for feature, label in zip(features, labels, strict=True):
        scatter += np.outer(feature - means[label], feature - means[label])
    mean_eigenvalue = np.linalg.eigvalsh(scatter).mean()
    covariance = (1 - shrinkage) * scatter + shrinkage * mean_eigenvalue * np.eye(len(center))
    shared = center / np.linalg.norm(center)
    texts = clip.encode_texts(prompts).double().numpy()
    common = np.mean([text @ shared for text in texts])
    targets = []
    for mean in means:
        way = np.linalg.inv(covariance) @ (mean - center)
        way -= (way @ shared) * shared
        way /= np.linalg.norm(way)
        targets.append(common * shared + np.sqrt(1 - common**2) * way)
    return prompts, np.array(targets)


@pytest.mark.parametrize("shrinkage", [0.3, 0.9])
def test_prompts_features_become_the_discriminants(shrinkage, clip, tasks, learn):
    prompts, targets = loop_targets(clip, tasks[:1], shrinkage)
    learn(clip, (0,), shrinkage=shrinkage, protect=0, iterations=200)
    found = clip.encode_texts(prompts).double().numpy()
    # a layer norm of width 32 takes a direction and the length from what the map can turn them to
    cosines = found @ targets.T
    assert (cosines.diagonal() > 0.88).all()
    assert (cosines.argmax(1) == np.arange(len(prompts))).all()


def test_only_one_weight_changes_and_images_are_learned(clip, tasks, learn):
    before = copy.deepcopy(clip.model.state_dict())
    results = learn(clip)
    changed = {n for n, t in clip.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"transformer.resblocks.1.mlp.c_proj.weight"}
    assert results.matrix[1].mean() > results.zero_shot.mean() + 0.3
    assert results.added == [0, 0]
    assert results.trainable == [before[changed.pop()].numel()] * 2


def test_the_order_of_tasks_does_not_matter(make_clip, learn):
    one, other = make_clip(), make_clip()
    learn(one, (0, 1), "one")
    learn(other, (1, 0), "other")
    names = ["a photo of a red.", "a photo of a ring.", "something else"]
    torch.testing.assert_close(
        one.encode_texts(names), other.encode_texts(names), rtol=0, atol=1e-3
    )


def test_protected_texts_move_less(make_clip, learn):
    pieces = vocabulary(make_clip())
    others = random_texts(pieces, 64, torch.Generator().manual_seed(9))
    moved = []
    for number, protect in enumerate((0.0, 1e5)):
        clip = make_clip()
        before = clip.encode_texts(others)
        learn(clip, folder=str(number), protect=protect, references=512)
        moved.append(float((clip.encode_texts(others) - before).norm(dim=1).mean()))
    assert moved[1] < 0.5 * moved[0]


def test_every_make_of_clip_learns(any_clip, tasks, learn):
    images = torch.stack([any_clip.eval_transform(image) for image, _ in tasks[0].test])
    with torch.no_grad():
        before = any_clip.encode_image(images)
        results = learn(any_clip, iterations=10)
        assert torch.equal(any_clip.encode_image(images), before)
    assert results.matrix[1].mean() > 0.8


def test_discriminants_are_unit_and_blind_to_what_all_images_share():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 8, generator=generator, dtype=torch.float64) + 2
    ways = discriminants(means, torch.eye(8, dtype=torch.float64), 0.5)
    torch.testing.assert_close(ways.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert (ways @ means.mean(0)).abs().max() < 1e-12
