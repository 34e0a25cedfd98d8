"""One arm's training: frozen tower features, packed rows, the library's own learners and groups."""

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from vlm_prune.benchmarks.embedded_models.language import IGNORE, Row, pack, projected
from vlm_prune.benchmarks.evaluation.saved_activations import SavedActivations
from vlm_prune.benchmarks.experiments.forgetting.arms import Arm, Plan
from vlm_prune.benchmarks.experiments.forgetting.data import Shown, training_rows
from vlm_prune.learners.model_dowser import close
from vlm_prune.learners.recipe import GroupName, make_optimizer
from vlm_prune.learners.store import adapter_state, load_adapter_state
from vlm_prune.learners.train import WingsRun, prepare
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import atomic_path
from vlm_prune.vlm.families import family_of

Parameters = dict[GroupName, list[torch.nn.Parameter]]


@dataclass
class Cost:
    """Trainable parameters, median seconds of a step, and bytes that training holds at once."""

    trainable: int = 0
    step_s: float = 0.0
    memory_bytes: int = 0


def answer_logits(
    model: Any, rows: list[Row], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Returns logits (A, vocabulary) and labels (A,) of all answer tokens of packed rows, in order.

    Args:
        model: with projector, and learners if it has some.
        rows: of a batch.
        tokenizer: the model's.
    """
    batch = pack(rows, tokenizer, model.config.image_token_id)
    images = [row.image for row in rows if row.image is not None]
    shown = {}
    if images:
        tokens = projected(model)(images).split([len(image) for image in images])
        shown["mm_encoder_outputs"] = family_of(model).output(tokens)
    hidden_states = model.model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions,
        use_cache=False, **shown,
    ).last_hidden_state  # fmt: skip
    is_answer = batch.labels != IGNORE
    return model.lm_head(hidden_states[is_answer]), batch.labels[is_answer]


def prepared(
    folder: Path, arm: Arm, plan: Plan, stage: Literal[1, 2], seed: int
) -> tuple[Any, Any, Parameters]:
    """Loads the aligned model and adds what the arm trains.

    Args:
        folder: of the aligned model.
        arm: one that trains.
        plan: sizes and rates.
        stage: 1 or 2.
        seed: of new weights.

    Returns:
        The model, its processor, and the parameters that train, by group.
    """
    assert arm.method is not None
    recipe = plan.recipe(arm, stage, seed, _matched_rank(plan, folder))
    wings = replace(plan.wings, stride=arm.stride)
    run = WingsRun(str(folder), folder, arm.method, recipe, wings)
    model, processor, groups, _ = prepare(run)
    return model, processor, groups


def _matched_rank(plan: Plan, folder: Path) -> int:
    """Returns the LoRA rank with about as many parameters as both learners and the router."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(folder).text_config
    width, inner, depth = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    key = width // text.num_attention_heads * text.num_key_value_heads
    wings: int = depth * (16 * width * plan.rank + 2 * plan.wings.max_positions)
    per_rank: int = depth * (2 * (width + width) + 2 * (width + key) + 3 * (width + inner))
    return max(1, round(wings / per_rank))


def fit(
    model: Any, processor: Any, groups: Parameters, shown: Shown, plan: Plan, arm: Arm,
    stage: Literal[1, 2], seed: int,
) -> Cost:  # fmt: skip
    """Trains for the plan's steps of this stage.

    Args:
        model: trained in place.
        processor: the model's.
        groups: parameters that train.
        shown: training scenes.
        plan: sizes and rates.
        arm: decides rates and replay.
        stage: 1 or 2.
        seed: of the rows.

    Raises:
        InputError: when the loss is no number.
    """
    steps = plan.stage1_steps if stage == 1 else plan.stage2_steps
    optimizer, schedule = make_optimizer(groups, plan.recipe(arm, stage, seed), steps)
    parameters = [p for group in groups.values() for p in group]
    rng, times, optimizer_bytes = np.random.default_rng([seed, stage]), [], 0
    model.train()
    for step in range(steps):
        rows = training_rows(shown, plan, arm.replay and stage == 2, rng)
        begin = time.perf_counter()
        saved = SavedActivations()
        with saved if step < 5 else nullcontext():  # counting takes time, too
            logits, labels = answer_logits(model, rows, processor.tokenizer)
            loss = cross_entropy(logits, labels)
        optimizer_bytes = max(optimizer_bytes, saved.bytes)
        if not torch.isfinite(loss):
            raise InputError(
                f"{arm.title}, step {step + 1}: the loss is {loss.item()}; lower rates"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        times.append(time.perf_counter() - begin)
    model.eval()
    trainable = sum(p.numel() for p in parameters)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    # beside all weights: gradients and two Adam moments of what trains, and saved activations
    memory = weights + 3 * 4 * trainable + optimizer_bytes
    return Cost(trainable, statistics.median(times) if times else 0.0, memory)


def first_stage(folder: Path, arm: Arm, plan: Plan, shown: Shown, seed: int) -> Path:
    """Trains projector, and visual learner if the arm has one, on a frozen language model.

    Args:
        folder: of the aligned model.
        arm: one that trains.
        plan: sizes and rates.
        shown: training scenes.
        seed: of the training.

    Returns:
        The file with the result, which arms that do the same here share.
    """
    kind = "visual" if arm.trains_on_images_in_stage_1 else "plain"
    stride = f"-stride-{arm.stride}" if arm.stride > 1 else ""
    path = folder / f"stage1-{kind}{stride}.safetensors"
    if not path.is_file():
        model, processor, groups = prepared(folder, arm, plan, 1, seed)
        fit(model, processor, groups, shown, plan, arm, 1, seed)
        learned = adapter_state(model) if arm.trains_on_images_in_stage_1 else {}
        state = model.model.multi_modal_projector.state_dict()
        with atomic_path(path) as partial:
            save_file({f"projector.{n}": t for n, t in state.items()} | learned, partial)
    return path


def trained(folder: Path, arm: Arm, plan: Plan, shown: Shown, seed: int) -> tuple[Any, Any, Cost]:
    """Trains an arm through both stages.

    Args:
        folder: of the aligned model.
        arm: one that trains.
        plan: sizes and rates.
        shown: training scenes.
        seed: of the training.

    Returns:
        The model, its processor, and the cost of the second stage.
    """
    first = load_file(first_stage(folder, arm, plan, shown, seed))
    model, processor, groups = prepared(folder, arm, plan, 2, seed)
    projector = {n.split(".", 1)[1]: t for n, t in first.items() if n.startswith("projector.")}
    model.model.multi_modal_projector.load_state_dict(projector)
    if learned := {n: t for n, t in first.items() if n.startswith("layers.")}:
        load_adapter_state(model, learned, strict=False)
    cost = fit(model, processor, groups, shown, plan, arm, 2, seed)
    close(model)
    return model, processor, cost
