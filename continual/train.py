"""Training a CLIP on a stream of tasks: one loop for all methods, on accelerate.

A run lives in one folder and goes on where it was killed, to the same matrix. When it is done the
folder holds `results.json`, `deltas`, `correct` (which test image was right after which task) and
`model`, a plain checkpoint of the model's own library with exactly the keys that it began with.
"""

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vlm_prune.continual import checkpoint
from vlm_prune.continual.clip import Clip, extra
from vlm_prune.continual.config import Recipe, above
from vlm_prune.continual.data import (
    KeptBatches,
    check_stream_tasks,
    eval_batches,
    plan,
    prompts,
    task_facts,
    train_batches,
)
from vlm_prune.continual.evaluate import class_features, evaluate_tasks
from vlm_prune.continual.methods import Context, Method
from vlm_prune.continual.methods.base import ParameterGroup
from vlm_prune.continual.metrics import drift
from vlm_prune.continual.parallel import average_gradients, gather, rank_and_world
from vlm_prune.continual.results import ADVICE, StoredResults, StreamResults, read_results
from vlm_prune.continual.streams.base import StreamTask
from vlm_prune.vlm.common.errors import InputError, naming
from vlm_prune.vlm.common.files import write_folder, write_json
from vlm_prune.vlm.common.folder import OutputFolder, check_settings, record_settings
from vlm_prune.vlm.common.records import read_record
from vlm_prune.vlm.common.state import save_tensors


@dataclass(frozen=True)
class ContinualRun:
    """One method on one stream.

    Args:
        output: folder of this run.
        method: what learns; the run works on a fresh copy of it.
        recipe: how it is trained.
        save_every: steps between checkpoints within a task; 0 for none but those between tasks.
        workers: processes that load images.
        bf16: compute in bfloat16; weights, gates and optimizer stay in float32.
        cpu: stay off the GPU.
        progress: show a bar for each task on the error stream.
        recompute: save memory by computing activations again in the backward pass, a third more work
            with the same result.

    Raises:
        InputError: for a value out of range.
    """

    output: Path
    method: Method
    recipe: Recipe = field(default_factory=Recipe)
    save_every: int = 0
    workers: int = 0
    bf16: bool = False
    cpu: bool = False
    progress: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        above("save_every", self.save_every, 0)
        above("workers", self.workers, 0)


def train_tasks(run: ContinualRun, clip: Clip, tasks: Sequence[StreamTask]) -> StreamResults:
    """Trains, or finishes training; returns the results, and the CLIP is changed in place.

    Args:
        run: the method, the recipe and the folder.
        clip: the one that the run began with; of a finished run only the results are read.
        tasks: in their order.

    Raises:
        InputError: if the tasks cannot be used, `run.output` holds another run or is being written
            to, or training fails.
    """
    check_stream_tasks(tasks)
    accelerator = accelerator_of(run)
    with OutputFolder(run.output) if accelerator.is_main_process else nullcontext():
        _Trainer(run, clip, tasks, accelerator).run_all()
    return read_results(run.output)


def accelerator_of(run: ContinualRun) -> Any:
    """Returns accelerate's view of the devices and processes."""
    precision = "bf16" if run.bf16 else "no"
    # without being told, accelerate runs several processes without a GPU as if each were alone
    cpu = run.cpu or not torch.accelerator.is_available()
    return extra("accelerate").Accelerator(mixed_precision=precision, cpu=cpu)


class _Trainer:
    def __init__(
        self, run: ContinualRun, clip: Clip, tasks: Sequence[StreamTask], accelerator: Any
    ) -> None:
        self.run, self.clip, self.tasks = run, clip, tasks
        self.output, self.recipe = run.output, run.recipe
        self.method: Method = replace(run.method)
        self.accelerator = accelerator
        self.rank, self.world = rank_and_world()
        self.main: bool = self.accelerator.is_main_process
        ours = {
            "method": self.method.name,
            "options": self.method.options(),
            "recipe": self.recipe,
            "bf16": run.bf16,
            "weights": clip.fingerprint(),
            "tasks": [task_facts(task) for task in tasks],
        }
        (record_settings if self.main else check_settings)(self.output / "run.json", ours)
        path = self.output / "results.json"
        self.record = StoredResults(method=self.method.name, tasks=[task.name for task in tasks])
        if path.exists():
            self.record = read_record(path, StoredResults, ADVICE)
        state = clip.model.state_dict()
        self.initial = {name: t.detach().cpu().clone() for name, t in state.items()}
        self.kept = KeptBatches()
        self.texts: list[Tensor] | None = None  # class features, until the text tower changes
        # torch multiplies by weights that take gradients in another order, with other rounding: a
        # run that goes on must not begin with weights that do where a whole run has none
        clip.model.to(self.accelerator.device).eval().requires_grad_(False)
        self.accelerator.wait_for_everyone()

    def run_all(self) -> None:
        if (self.output / "model").is_dir():
            self._remove_states()  # a kill may have left some
            return
        if self.record.zero_shot is None:
            self.record.zero_shot = self._row("zero-shot", None, 0)
            self._write()
        done, state = checkpoint.load_state(self.output, self.clip.model.state_dict())
        if done:
            self._take_back(state)
        for number in range(done, len(self.tasks)):
            if len(self.record.matrix) < number:
                self._finish_row(number - 1)
            self._learn(number)
            if self.main:
                state = self.method.state()
                model = self.clip.model.state_dict()
                checkpoint.save_state(self.output, number + 1, model, state)
            self.accelerator.wait_for_everyone()
            self._finish_row(number)
        if len(self.record.matrix) < len(self.tasks):
            self._finish_row(len(self.tasks) - 1)
        if self.main:
            write_folder(self.output / "model", self.clip.save)
        self._remove_states()
        self.accelerator.wait_for_everyone()

    def _remove_states(self) -> None:
        if self.main:
            for old in [*self.output.glob("state-*"), *self.output.glob("step-*")]:
                shutil.rmtree(old)

    def _learn(self, number: int) -> None:
        """Trains one task and leaves the model plain."""
        groups = self.method.begin_task(self._context(number))
        named = self.clip.model.named_parameters()
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        if self.clip.trains("text"):
            self.texts = None
        if groups:
            self.clip.model.train()
            self.clip.recompute_activations(self.run.recompute)
            self._fit(number, groups, trained)
            self.clip.recompute_activations(False)
            self.clip.model.eval()
        delta = self.method.end_task()
        self.record.trainable[number:] = [sum(p.numel() for p in trained.values())]
        self.record.added[number:] = [self.method.added_parameters()]
        self.record.added_bytes[number:] = [self.method.added_bytes()]
        self.record.norms[number:] = [None if delta is None else delta.norm()]
        state = {name: t.cpu() for name, t in self.clip.model.state_dict().items()}
        self.record.drift[number:] = [drift(self.initial, state)]
        if self.main:
            if delta is not None:
                delta.facts["name"] = self.tasks[number].name
                delta.save(self.output / "deltas" / f"task-{number}.safetensors")
            self._write()

    def _fit(
        self, number: int, groups: list[ParameterGroup], trained: dict[str, torch.nn.Parameter]
    ) -> None:
        """Takes the steps of one task, from its last checkpoint on if there is one.

        Args:
            number: of the task.
            groups: the optimizer's.
            trained: parameters by name.
        """
        recipe, method, parameters = self.recipe, self.method, list(trained.values())
        optimizer = torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=recipe.weight_decay)
        rates = [group["lr"] for group in groups]
        data = {name: parameter.detach() for name, parameter in trained.items()}
        first, state = checkpoint.load_step(self.output, number, data, optimizer)
        if first:
            self._take_back(state)
        if self.main:
            log = self.output / "log.jsonl"
            checkpoint.cut_log(log, lambda line: (line["task"], line["step"]) < (number, first))
        key = [recipe.seed, number]
        batches = plan(len(self.tasks[number].train), recipe.batch, recipe.steps, key)
        shares = train_batches(
            self.tasks[number], self.clip, batches, first, key,
            self.rank, self.world, self.run.workers,
        )  # fmt: skip
        shown = track(
            shares, self.tasks[number].name, recipe.steps, first,
            console=Console(stderr=True), disable=not (self.run.progress and self.main),
        )  # fmt: skip
        for step, (pixels, labels) in enumerate(shown, first):
            factor = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            torch.manual_seed(method.context.generator(4, step, self.rank).initial_seed())
            with self.accelerator.autocast():
                loss = method.loss(pixels, labels, step)
            self._note(number, step, loss.item())
            loss.backward()
            if step == first:
                method.check_gradients()
            average_gradients(parameters)
            if recipe.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
            optimizer.step()
            method.after_step(step)
            optimizer.zero_grad()
            taken = step + 1
            if self.run.save_every and taken % self.run.save_every == 0 < recipe.steps - taken:
                self._save_step(number, taken, data, optimizer)

    def _take_back(self, state: checkpoint.Tensors) -> None:
        with naming(f"the state of {self.method.name} in {self.output} cannot be used"):
            self.method.load_state(state)

    def _context(self, number: int) -> Context:
        task, earlier = self.tasks[number], self.tasks[:number]
        ids = self.clip.tokenize(prompts(task))
        before = [self.clip.tokenize(prompts(other)) for other in earlier]
        return Context(
            self.clip,
            self.recipe,
            number,
            ids,
            torch.cat(before) if before else ids[:0],
            lambda: eval_batches(task.train, self.clip, self.recipe.eval_batch),
            gather,
        )

    def _save_step(self, number: int, step: int, trained: dict[str, Tensor], opt: Any) -> None:
        if self.main:
            checkpoint.save_step(self.output, number, step, trained, opt, self.method.state())
        self.accelerator.wait_for_everyone()

    def _finish_row(self, number: int) -> None:
        row = self._row(f"task-{number}", self.method, number + 1)
        self.record.matrix[number:] = [row]
        self._write()

    def _row(self, name: str, method: Method | None, learned: int) -> list[float]:
        """Returns the accuracy on every task, and writes which images were right.

        Args:
            name: of the row.
            method: what learned; none for the model alone.
            learned: number of tasks learned.
        """
        clip, recipe = self.clip, self.recipe
        if self.texts is None:
            self.texts = [class_features(clip, task, recipe.ensemble) for task in self.tasks]
        right = evaluate_tasks(
            clip, self.tasks, recipe, method, self.texts, self.run.workers, learned, self.kept
        )
        if self.main:
            folder = self.output / "correct"
            folder.mkdir(exist_ok=True)
            named = {task.name: hits for task, hits in zip(self.tasks, right, strict=True)}
            save_tensors(folder / f"{name}.safetensors", named)
        return [float(hits.double().mean()) for hits in right]

    def _write(self) -> None:
        if self.main:
            write_json(self.output / "results.json", self.record)

    def _note(self, number: int, step: int, loss: float) -> None:
        """Writes the loss of a step to the log, and refuses one that is no number.

        Args:
            number: of the task.
            step: of the task.
            loss: of its batch.
        """
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {step} of task {number}; lower the lr")
        if self.main:
            with (self.output / "log.jsonl").open("a") as file:
                file.write(json.dumps({"task": number, "step": step, "loss": loss}) + "\n")
