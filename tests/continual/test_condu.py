"""ConDU against a slow loop over single weights, images and experts."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlm_prune.continual.config import Recipe
from vlm_prune.continual.evaluate import class_features, evaluate_tasks
from vlm_prune.continual.methods import Context, make_method
from vlm_prune.continual.methods.condu import pack_bits, unpack_bits
from vlm_prune.continual.train import ContinualRun, train_tasks
from vlm_prune.vlm.common.errors import InputError


def merged_weight(changes):
    return max(changes) if sum(changes) > 0 else min(changes)


def test_three_tasks_equal_a_loop_over_weights(clip):
    method, generator = make_method("condu", encoder="text"), torch.Generator().manual_seed(0)
    ids = clip.tokenize(["a red.", "a green."])
    used = ("ln_final.weight", "ln_final.bias")
    named = dict(clip.model.named_parameters())
    start = {name: named[name].detach().clone() for name in used}
    experts: list[list[float]] = []
    for number in range(3):
        method.begin_task(Context(clip, Recipe(), number, ids, ids[:0]))
        for name, weight in method.weights().items():
            if name in used:
                # each task is trained from the initial model
                assert torch.equal(weight, start[name])
                weight.data += torch.randn(weight.shape, generator=generator)
        task = [float(x) for n in used for x in (named[n].detach() - start[n]).flatten()]
        experts.append(task)
        method.end_task()
        unified = [merged_weight(changes) for changes in zip(*experts, strict=True)]
        found = torch.cat([(named[n].detach() - start[n]).flatten() for n in used])
        torch.testing.assert_close(found, torch.tensor(unified), atol=1e-5, rtol=1e-5)
        for index, expert in enumerate(experts):
            mask = [x * u > 0 for x, u in zip(expert, unified, strict=True)]
            kept = sum(abs(u) for u, same in zip(unified, mask, strict=True) if same)
            scale = sum(map(abs, expert)) / kept
            assert abs(method._scales[index] - scale) < 1e-4
            experts[index] = [
                scale * u if same else 0.0 for u, same in zip(unified, mask, strict=True)
            ]
    assert not all(scale == 1 for scale in method._scales)
    assert method.added_parameters() == 0


def test_one_task_alone_is_its_own_tuning(clip):
    method = make_method("condu")
    ids = clip.tokenize(["a red.", "a green."])
    method.begin_task(Context(clip, Recipe(), 0, ids, ids[:0]))
    weight = clip.model.visual.conv1.weight
    want = weight.detach() + 0.5
    weight.data += 0.5
    method.end_task()
    torch.testing.assert_close(weight.detach(), want)


@pytest.mark.parametrize("shape", [(3, 5), (8,), (1,), (2, 4, 2)])
def test_masks_are_kept_as_bits(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


@pytest.fixture
def three(tasks):
    """The last one has classes of its own, so that no two columns tie."""
    return [*tasks, replace(tasks[0], name="to come", classes=("photo", "sharp", "a"))]


@pytest.fixture
def learned(clip, three):
    """A method after two of three tasks, and copies of the CLIP with each expert's weights."""

    def learn(inference, encoder="all", joint=True):
        initial = copy.deepcopy(clip)
        method = make_method("condu", inference=inference, encoder=encoder, experts=1)
        generator, changes = torch.Generator().manual_seed(0), []
        for number, task in enumerate(three[:2]):
            ids = clip.tokenize([task.templates[0].format(name) for name in task.classes])
            rows = [
                (clip.eval_transform(image)[None], torch.tensor([k])) for image, k in task.train
            ]
            method.begin_task(
                Context(
                    clip, Recipe(joint=joint), number, ids, ids[:0], lambda rows=rows: iter(rows)
                )
            )
            before = {n: w.detach().clone() for n, w in method.weights().items()}
            for weight in method.weights().values():
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
            changes.append({n: w.detach() - before[n] for n, w in method.weights().items()})
            method.end_task()
        merged = {
            name: torch.stack([c[name] for c in changes])
            .amax(0)
            .where(
                sum(c[name] for c in changes) > 0, torch.stack([c[name] for c in changes]).amin(0)
            )
            for name in changes[0]
        }
        experts = []
        for change in changes:
            kept = {n: merged[n] * (change[n] * merged[n] > 0) for n in merged}
            size, left = (sum(float(t.abs().sum()) for t in c.values()) for c in (change, kept))
            expert = copy.deepcopy(initial)
            for name, weight in expert.model.named_parameters():
                weight.data += (size / left) * kept[name] if name in kept else 0
            experts.append(expert)
        return method, initial, experts

    return learn


@torch.no_grad()
def prototypes(initial, task):
    found = []
    for label, text in enumerate(class_features(initial, task, ensemble=False)):
        of_class = [initial.eval_transform(image) for image, k in task.train if k == label]
        images = [initial.encode_image(pixels[None])[0] for pixels in of_class]
        found.append(text + sum(images) / len(images))
    return found


@pytest.mark.parametrize(("encoder", "joint"), [("all", True), ("vision", False)])
@torch.no_grad()
def test_the_nearest_experts_answer_as_a_loop_over_images_says(
    encoder, joint, learned, clip, three
):
    method, initial, experts = learned("prototypes", encoder, joint)
    banks = [[class_features(expert, task, False) for task in three] for expert in experts]
    near = [prototypes(initial, task) for task in three[:2]]
    state = {n: t.clone() for n, t in clip.model.state_dict().items()}
    for number in (1, 2):
        method.experts = number
        found = evaluate_tasks(clip, three, Recipe(joint=joint), method)
        for index, task in enumerate(three):
            columns = range(3) if joint else [index]
            own = [(n, k) for n in columns for k in range(len(three[n].classes))]
            for (image, label), hit in zip(task.test, found[index], strict=True):
                pixels = clip.eval_transform(image)[None]
                feature = initial.encode_image(pixels)[0]
                weights = [
                    max(float(F.cosine_similarity(feature, p, dim=0)) for p in one) for one in near
                ]
                if not joint and index < 2:
                    weights = [float(n == index) for n in range(2)]
                else:
                    floor = sorted(weights)[-number]
                    weights = [w if w >= floor else 0.0 for w in weights]
                scores = sum(
                    w * expert.encode_image(pixels)[0] @ torch.cat([bank[n] for n in columns]).T
                    for w, expert, bank in zip(weights, experts, banks, strict=True)
                )
                assert bool(hit) == (own[int(scores.argmax())] == (index, label))
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(tensor, state[name])


@torch.no_grad()
def test_with_masks_alone_the_merged_model_answers_about_tasks_to_come(learned, clip, three):
    method, _, experts = learned("masks", joint=False)
    recipe = Recipe(joint=False)
    found = evaluate_tasks(clip, three, recipe, method)
    own = [evaluate_tasks(experts[n], three, recipe)[n] for n in range(2)]
    want = [*own, evaluate_tasks(clip, three, recipe)[2]]
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(InputError, match="give the recipe joint=false, or inference=prototypes"):
        learned("masks", joint=True)


def test_what_each_inference_adds(learned, clip):
    sizes, count = {}, sum(p.numel() for p in clip.parameters().values())
    for inference in ("merged", "masks", "prototypes"):
        method, *_ = learned(inference, joint=False)
        sizes[inference] = method.added_bytes()
    assert sizes["merged"] == 0
    bits = 2 * sum(-(-p.numel() // 8) for p in clip.parameters().values())
    assert sizes["masks"] == 4 * count + bits + 2 * 8
    width = clip.encode_texts(["a"]).shape[1]
    assert sizes["prototypes"] - sizes["masks"] == 4 * width * (3 + 3)


def test_a_run_with_prototypes_goes_on_and_reports_its_bytes(make_clip, tasks, tmp_path):
    method = make_method("condu", inference="prototypes", experts=2)
    recipe = Recipe(steps=2, batch=3, lr=1e-2)
    whole = train_tasks(
        ContinualRun(tmp_path / "whole", method, recipe, cpu=True), make_clip(), tasks
    )
    run = ContinualRun(tmp_path / "killed", method, recipe, save_every=1, cpu=True)

    class Killed(type(method)):
        def after_step(self, step):
            if self.context.number == 1 and step == 1:
                raise KeyboardInterrupt

    options = {"inference": "prototypes", "experts": 2}
    with pytest.raises(KeyboardInterrupt):
        train_tasks(replace(run, method=Killed(**options)), make_clip(), tasks)
    resumed = train_tasks(run, make_clip(), tasks)
    assert (resumed.matrix == whole.matrix).all() and resumed.added_bytes == whole.added_bytes
    assert 0 < whole.added_bytes[0] < whole.added_bytes[1]
