"""ConDU against a slow loop over single weights."""

import torch

from vlm_prune.continual.config import Recipe
from vlm_prune.continual.methods import Context, make_method


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
