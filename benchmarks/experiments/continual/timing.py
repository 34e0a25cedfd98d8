"""What a training step takes: milliseconds of several methods in turn, so that all meet the same
machine, and operations and memory by image and prompt.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm_prune.benchmarks.evaluation.saved_activations import SavedActivations
from vlm_prune.continual.clip import Clip
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.methods import Context, Method
from vlm_prune.continual.methods.peft_adapter import PeftAdapter


class PeftLoRA(PeftAdapter):
    """peft's plain LoRA at the sites of a placement, with scale 1; to compare with."""

    name = "peft-lora"

    def config(self, peft: Any, targets: str, names: list[str]) -> Any:
        return peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets)


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


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of matrix products, forward and backward, and bytes of activations."""

    flops: float
    saved_bytes: float


def step_cost(
    make_method: Callable[[], Method], make_clip: Callable[[], Clip], prompts: list[str],
    pixels: Tensor,
) -> StepCost:  # fmt: skip
    """Returns what the first step of a task costs.

    Args:
        make_method: a fresh method.
        make_clip: a fresh CLIP.
        prompts: of the classes.
        pixels: (B, 3, H, W), on the CLIP's device.
    """
    found = []
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    for backends in ([SDPBackend.MATH], fused):
        clip, method = make_clip(), make_method()
        ids = clip.tokenize(prompts)
        method.begin_task(Context(clip, Recipe(), 0, ids, ids[:0]))
        labels = torch.arange(len(pixels), device=pixels.device) % len(prompts)
        saved = SavedActivations()
        # products inside fused attention are not counted, and attention in steps keeps more
        with FlopCounterMode(display=False) as flops, sdpa_kernel(backends):
            with saved:
                loss = method.loss(pixels, labels, 0)
            loss.backward()
        found.append(StepCost(flops.get_total_flops(), saved.bytes))
    return StepCost(found[0].flops, found[1].saved_bytes)


def unit_costs(
    make_method: Callable[[], Method], make_clip: Callable[[], Clip], prompt: str, pixels: Tensor
) -> dict[str, StepCost]:
    """Returns what each `image` and each class `prompt` adds to a step, and what a `test image` takes.

    Differences of small steps give them: a step's cost is linear in both numbers, but for their
    product in the last matrix of scores.

    Args:
        make_method: a fresh method for each step.
        make_clip: a fresh CLIP for each step.
        prompt: any; all are padded to one length.
        pixels: of an image, (1, 3, H, W), on the CLIP's device.
    """
    base, *more = (
        step_cost(make_method, make_clip, [prompt] * prompts, pixels.repeat(images, 1, 1, 1))
        for images, prompts in ((2, 2), (4, 2), (2, 4))
    )
    units = {
        name: StepCost((m.flops - base.flops) / 2, (m.saved_bytes - base.saved_bytes) / 2)
        for name, m in zip(("image", "prompt"), more, strict=True)
    }
    clip = make_clip()
    # torch's attention takes a path of its own without gradients, whose products are not counted
    clip.model.requires_grad_(True)
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        clip.encode_image(pixels)
    return units | {"test image": StepCost(flops.get_total_flops(), 0)}
