"""Time of a training step of several methods, taken in turn so that all meet the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.methods import Context, Method


def step_times(
    methods: Mapping[str, Method], make_clip: Callable[[], Clip], prompts: list[str],
    pixels: Tensor, labels: Tensor, rounds: int = 20,
) -> dict[str, float]:  # fmt: skip
    """Returns the median milliseconds of a step in the second half of a
    task, where ranks are pruned.

    Args:
        methods: by any name; those that take no steps are left out of the answer.
        make_clip: a fresh CLIP for each method.
        prompts: of the classes.
        pixels: (B, 3, H, W) of every step, on the CLIP's device.
        labels: (B,).
        rounds: steps that are timed, after as many that are not.
    """
    recipe, started = Recipe(steps=2 * rounds), {}
    for name, method in methods.items():
        clip = make_clip()
        ids = clip.tokenize(prompts)
        groups = method.begin_task(Context(clip, recipe, 0, ids, ids[:0]))
        if groups:
            started[name] = method, torch.optim.AdamW(groups)
    times: dict[str, list[float]] = {name: [] for name in started}
    for step in range(2 * rounds):
        for name, (method, optimizer) in started.items():
            begin = time.perf_counter()
            method.loss(pixels, labels, step).backward()
            optimizer.step()
            method.after_step(step)
            optimizer.zero_grad()
            if pixels.is_cuda:
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - begin] if step >= rounds else []
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
