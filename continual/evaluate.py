"""Accuracy of a CLIP on every task of a stream."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.data import KeptBatches, eval_batches, prompts
from vlm_prune.continual.methods import Method, Space
from vlm_prune.continual.parallel import rank_and_world, total
from vlm_prune.continual.streams.base import StreamTask


@torch.no_grad()
def class_features(clip: Clip, task: StreamTask, ensemble: bool) -> Tensor:
    """Returns unit features of a task's classes, (C, d).

    Args:
        clip: whose text tower encodes the prompts.
        task: its classes and templates.
        ensemble: whether to take the mean over all templates, instead of the first.
    """
    used = range(len(task.templates) if ensemble else 1)
    features = [clip.encode_texts(prompts(task, number)) for number in used]
    return F.normalize(torch.stack(features).mean(0), dim=-1)


def _encoded(clip: Clip, tasks: Sequence[StreamTask], ensemble: bool) -> Tensor:
    return torch.cat([class_features(clip, task, ensemble) for task in tasks])


@torch.no_grad()
def evaluate_tasks(
    clip: Clip, tasks: Sequence[StreamTask], recipe: Recipe, method: Method | None = None,
    texts: Sequence[Tensor] | None = None, workers: int = 0, learned: int = 0,
    kept: KeptBatches | None = None,
) -> list[Tensor]:  # fmt: skip
    """Returns for each task which of its test images are classified right, (n,) of 0 and 1.

    The images are shared out among all processes; every process gets the whole answer.

    With `recipe.joint` an image is scored against the classes of all tasks, seen or not, and
    otherwise against its own task's; with `recipe.seen_only`, too, against those of the tasks
    learned and of all up to its own. A method that adds something to zero-shot scores does so.

    Args:
        clip: the model.
        tasks: whose test images are classified.
        recipe: says whether tasks are told apart, and how prompts are made.
        method: that may change zero-shot scores; none for the model alone.
        texts: `class_features` of each task, if they are known.
        workers: processes that read images.
        learned: number of tasks learned so far.
        kept: test images of the same tasks, transformed before, which gets these.
    """
    texts = texts or [class_features(clip, task, recipe.ensemble) for task in tasks]
    rank, world = rank_and_world()
    # of each class the task that it is of, and its label there
    owner = [torch.full((len(t),), n, device=clip.device) for n, t in enumerate(texts)]
    label = [torch.arange(len(t), device=clip.device) for t in texts]
    right = []
    for number, task in enumerate(tasks):
        scored = max(learned, number + 1) if recipe.seen_only else len(tasks)
        columns = range(scored) if recipe.joint else [number]
        bank = torch.cat([texts[n] for n in columns])
        of_task, of_class = (torch.cat([part[n] for n in columns]) for part in (owner, label))
        space = Space(of_task, of_class, told=not recipe.joint)
        encode = partial(_encoded, clip, [tasks[n] for n in columns], recipe.ensemble)
        hits = []
        batches = eval_batches(task.test, clip, recipe.eval_batch, rank, world, workers)
        if kept is not None:
            batches = kept.of(number, len(range(rank, len(task.test), world)), batches)
        for pixels, labels in batches:
            if method is None:
                scores = clip.encode_image(pixels) @ bank.T
            else:
                scores = method.answer(clip, pixels, bank, space, encode)
            best = scores.argmax(1)
            hits.append((space.task[best] == number) & (space.label[best] == labels))
        whole = torch.zeros(len(task.test), dtype=torch.uint8, device=clip.device)
        if hits:
            # every world-th image is this process's; the sum over processes puts them together
            whole[rank::world] = torch.cat(hits).to(torch.uint8)
        right.append(total(whole).cpu())
    return right
