"""Training Wings and its baselines, on accelerate: one device or data parallel.

A run lives in one folder and goes on where it was killed, with the same result as without the
kill. When it is done the folder holds `model`, a plain Hugging Face checkpoint, and `wings`, the
adapter, if the method has learners. The next stage starts from that folder.
"""

import hashlib
import importlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlm_prune.learners.config import WingsConfig
from vlm_prune.learners.data import (
    IGNORED,
    Conversations,
    Example,
    collate,
    leave_out_too_long,
    order,
)
from vlm_prune.learners.model import attach, detach
from vlm_prune.learners.model_dowser import (
    ModelDowser,
    chosen_indices,
    close,
    open_least_important,
)
from vlm_prune.learners.recipe import (
    METHODS,
    GroupName,
    StageRecipe,
    make_optimizer,
    open_parameters,
)
from vlm_prune.learners.store import load_adapter_state, read_adapter, save_pretrained
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import write_folder, write_json, write_text
from vlm_prune.vlm.common.folder import OutputFolder, check_settings
from vlm_prune.vlm.common.state import (
    newest,
    optimizer_tensors,
    refuse_pickles,
    restore,
    restore_optimizer,
    save_tensors,
    seed_step,
)
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import load, save

TRAINED, OPTIMIZER = "trained.safetensors", "optimizer.safetensors"
ENDS = 4096  # bytes at each end of an image that tell it from others
TRACKERS = ("tensorboard", "trackio")
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class WingsRun:
    """One stage of one method.

    Args:
        model: `tiny`, a checkpoint folder, a hub name, or the folder of a finished run.
        output: folder of this run.
        method: a name in `METHODS`.
        recipe: hyperparameters, for instance from `PRESETS`.
        wings: the learners' options; which learners there are is the method's choice.
        text_ratio: share of text-only samples; None is the method's own.
        micro_batch: samples per forward and process; the result does not depend on it.
        save_every: optimizer steps between checkpoints.
        workers: processes that load images.
        skip_bad: leave out samples that are too long for the recipe or the model's window, and say
            how many, where otherwise the first of them is refused.
        bf16: compute in bfloat16; weights and optimizer stay in float32.
        cpu: stay off the GPU.
        dowser: options of `model-dowser`.
    """

    model: str
    output: Path
    method: str
    recipe: StageRecipe
    wings: WingsConfig = field(default_factory=WingsConfig)
    text_ratio: float | None = None
    micro_batch: int = 1
    save_every: int = 200
    workers: int = 0
    skip_bad: bool = False
    bf16: bool = True
    cpu: bool = False
    dowser: ModelDowser = field(default_factory=ModelDowser)


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"this needs {name}: pip install 'vlm-prune[train]'") from None


def checkpoint_activations(model: Any) -> None:
    """Makes the model recompute activations in the backward pass, by whichever
    name transformers has for it.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()


def prepare(
    run: WingsRun, device: Any = "cpu"
) -> tuple[Any, Any, dict[GroupName, list[torch.nn.Parameter]], Any]:
    """Returns model, processor, trainable parameters by group, and peft's wrapper for `lora`.

    Weights are chosen on `device` where a method chooses some, and the model stays there.
    """
    method, stage = METHODS[run.method], run.recipe.stage
    before = Path(run.model)
    finished = (before / "model").is_dir()
    model, processor = load(str(before / "model") if finished else run.model, "cpu", "float32")
    lora = None
    if stage == 2 and method.language == "lora":
        peft, rank = _extra("peft"), run.recipe.lora_rank
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS)
        lora = peft.get_peft_model(model, config)
    if stage == 2 and method.language == "model-dowser":
        open_least_important(model.to(device), processor.tokenizer, run.dowser, run.recipe.seed)
    learners = method.config(run.wings, stage)
    if learners is not None:
        attach(model, learners, seed=run.recipe.seed)
        if finished and (before / "wings").is_dir():
            earlier, weights = read_adapter(model, before / "wings")
            depth = len(family_of(model).decoder.layers)
            found, wanted = ((c.rank, c.layers_of(depth)) for c in (earlier, learners))
            if found != wanted:
                raise InputError(
                    f"{before} has learners of rank {found[0]} in layers "
                    f"{', '.join(map(str, found[1]))}; give the same"
                )
            load_adapter_state(model, weights, strict=False)
    return model, processor, open_parameters(model, method, stage), lora


def train_wings(run: WingsRun, examples: list[Example]) -> None:
    """Trains, or finishes training.

    Raises:
        InputError: if the data cannot be used, `run.output` holds another run or is being written
            to, memory runs out or the loss is no number; the last checkpoint is whole, and the same
            call goes on from it.
    """
    accelerate = _extra("accelerate")
    installed = accelerate.tracking.get_available_trackers()
    accelerator = accelerate.Accelerator(
        mixed_precision="bf16" if run.bf16 else "no",
        cpu=run.cpu,
        log_with=[tracker for tracker in installed if str(tracker) in TRACKERS] or None,
        project_dir=run.output,
        # a batch of text alone leaves the projector without gradients
        kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    kinds = accelerate.DistributedType
    if accelerator.distributed_type in (kinds.FSDP, kinds.DEEPSPEED, kinds.MEGATRON_LM):
        raise InputError(
            f"training is data parallel; {accelerator.distributed_type.value} is not supported"
        )
    with OutputFolder(run.output) if accelerator.is_main_process else nullcontext():
        _train(run, examples, accelerate, accelerator)
    accelerator.end_training()  # closes the process group, too


def _train(run: WingsRun, examples: list[Example], accelerate: Any, accelerator: Any) -> None:
    """Trains in one process of the run, from its last checkpoint on.

    Args:
        run: options.
        examples: conversations.
        accelerate: the library.
        accelerator: accelerate's, of this process.
    """
    output, recipe, main = run.output, run.recipe, accelerator.is_main_process
    settings = _settings(run, examples) if main else {}
    begun = (output / "log.jsonl").is_file()
    if begun and main:
        check_settings(output / "run.json", settings)
    if (output / "model").is_dir():
        if main:
            _remove_checkpoints(output)
        return
    accelerate.utils.set_seed(recipe.seed)
    model, processor, groups, lora = prepare(run, accelerator.device)
    checkpoint_activations(model)
    family, method = family_of(model), METHODS[run.method]
    if not family.fixed_size:
        kind = model.config.model_type
        raise InputError(f"training needs images of one size, which {kind} models do not have")
    window = getattr(family.decoder.config, "max_position_embeddings", recipe.max_length)
    layout = family.image_token, family.tokens_per_image, min(recipe.max_length, window)
    left_out: list[str] | None = [] if run.skip_bad else None
    examples = leave_out_too_long(examples, processor, *layout, left_out)
    if left_out and accelerator.is_main_process:
        print(f"{len(left_out)} sample(s) left out; the first: {left_out[0]}", file=sys.stderr)
    ratio = method.text_ratio if run.text_ratio is None else run.text_ratio
    drawn = order([bool(e.images) for e in examples], ratio, recipe.epochs, recipe.seed)
    steps = -(-len(drawn) // recipe.batch)
    done, saved = newest(output, "checkpoint-N")
    optimizer, schedule = make_optimizer(groups, recipe, steps, done)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named |= chosen_indices(model)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    if saved is not None:
        refuse_pickles(saved)
        restore(saved / TRAINED, named)
        restore_optimizer(saved / OPTIMIZER, optimizer.optimizer)
    if main:
        log = output / "log.jsonl"
        if begun:  # steps after the checkpoint will be taken again
            write_text(log, "".join(log.read_text().splitlines(keepends=True)[:done]))
        else:  # what is there is of a start that was refused, or killed before its first step
            write_json(output / "run.json", settings)
    accelerator.init_trackers(output.name, {"method": run.method} | asdict(recipe))
    data = Conversations(examples, processor, *layout, family.check_size)
    share = drawn[done * recipe.batch :]
    for step, (names, batches) in enumerate(_steps(data, share, run, accelerator), done + 1):
        seed_step(recipe.seed, step, accelerator.process_index)
        try:
            loss = _step(accelerator, wrapped, optimizer, batches, recipe.clip)
        except (_NotFinite, MemoryError, RuntimeError) as error:
            raise _stopped(error, step, names, output) from error
        entry = {"step": step, "loss": loss, "rates": schedule.get_last_lr()}
        accelerator.log({"loss": loss, "rate": max(entry["rates"])}, step)
        schedule.step()
        if main:
            with (output / "log.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        if step % run.save_every == 0 and step < steps:
            if main:
                _checkpoint(output, step, named, optimizer.optimizer)
            accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
    if main:
        _finish(model, processor, lora, output)
        last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
        print(f"{output}: {run.method}, {recipe.rates(method)}; loss {last['loss']:.4f}")


class _NotFinite(Exception):
    """Loss or gradient is no number, in the process's micro-batch of that index, if in one."""


def _stopped(error: Exception, step: int, names: list[list[str]], output: Path) -> Exception:
    """Returns the error that tells a user what to do about a failed step; an
    error of another kind as it is.

    Args:
        error: what the step raised.
        step: its number.
        names: of the samples of each micro-batch.
        output: folder of the run.
    """
    _, kept = newest(output, "checkpoint-N")
    rest = f"{kept.name} is kept" if kept else "there is no checkpoint yet"
    if isinstance(error, _NotFinite):
        (bad,) = error.args
        where = ", ".join(n for micro in (names if bad is None else [names[bad]]) for n in micro)
        return InputError(
            f"step {step}: the loss or its gradient is not finite at {where}; "
            f"lower the learning rate or mend the sample ({rest})"
        )
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in text:
        return InputError(
            f"step {step}: out of memory at {names[0][0]}; lower micro_batch or max_length ({rest})"
        )
    return error


def _step(
    accelerator: Any, model: Any, optimizer: Any, batches: list[dict[str, Tensor]], clip: float
) -> float:
    """Takes one step of the optimizer; the loss is the mean over the
    answer tokens of the whole batch.

    Args:
        accelerator: accelerate's.
        model: that is trained.
        optimizer: of its parameters.
        batches: micro-batches of this process.
        clip: largest norm of the gradient.

    Raises:
        _NotFinite: before the weights change, in all processes.
    """
    batches = [{name: t.to(accelerator.device) for name, t in b.items()} for b in batches]
    counted = torch.stack([(b["labels"][:, 1:] != IGNORED).sum() for b in batches]).sum()
    tokens = accelerator.reduce(counted, "sum").clamp(min=1)
    losses = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss = model(**batch, num_items_in_batch=tokens, use_cache=False).loss
            # data parallel training averages gradients, and this sum must not be
            accelerator.backward(loss * accelerator.num_processes)
        losses.append(loss.detach())
    local = torch.stack(losses)
    total = float(accelerator.reduce(local.sum(), "sum"))
    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    # averaged gradients have the same norm in every process, and so all of them stop together
    if not (math.isfinite(total) and math.isfinite(float(norm or 0))):
        wrong = (~local.isfinite()).nonzero()
        raise _NotFinite(int(wrong[0]) if len(wrong) else None)
    optimizer.step()
    optimizer.zero_grad()
    return total


def _steps(
    data: Conversations, share: list[int], run: WingsRun, accelerator: Any
) -> Iterator[tuple[list[list[str]], list[dict[str, Tensor]]]]:
    """Yields this process's micro-batches of each optimizer step, and the names of their samples.

    Args:
        data: the samples.
        share: indices of those that are left, in order.
        run: its sizes.
        accelerator: that numbers the processes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    plan: list[list[list[int]]] = []
    for start in range(0, len(share), run.recipe.batch):
        batch = share[start : start + run.recipe.batch]
        # processes must take equally many samples, so a last batch may repeat some
        of_this_process = (batch * world)[: -(-len(batch) // world) * world][rank::world]
        plan.append(
            [
                of_this_process[k : k + run.micro_batch]
                for k in range(0, len(of_this_process), run.micro_batch)
            ]
        )
    flat = [micro for step in plan for micro in step]
    loader = iter(DataLoader(data, batch_sampler=flat, collate_fn=collate, num_workers=run.workers))
    for step in plan:
        names = [[data.examples[index].name for index in micro] for micro in step]
        try:
            batches = [next(loader) for _ in step]
        except InputError as error:
            # a worker's error arrives with its traceback
            line = str(error).strip().splitlines()[-1].split("InputError: ")[-1]
            raise InputError(line) from error
        yield names, batches


def _settings(run: WingsRun, examples: list[Example]) -> dict[str, Any]:
    """Returns what decides the result of a run: its options, and what its samples are."""
    free = ("output", "micro_batch", "save_every", "workers", "cpu")
    ours = {name: value for name, value in asdict(run).items() if name not in free}
    return ours | {"data": data_digest(examples)}


def data_digest(examples: list[Example]) -> str:
    """Returns 16 hexadecimal digits that change with the samples' texts,
    their order and their images.

    Of an image count its size and its first and last 4 KiB, so that a large set is not read twice;
    neither names nor folders count, and a set that moved is the same.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.turns).encode())
        for path in example.images:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(size.to_bytes(8, "little"))
                for offset in (0, max(0, size - ENDS)):
                    file.seek(offset)
                    digest.update(file.read(ENDS))
    return digest.hexdigest()[:16]


def _checkpoint(output: Path, step: int, named: dict[str, Tensor], optimizer: Any) -> None:
    """Writes a checkpoint beside the last one and renames it, so that one of them is always whole.

    The weights that are trained and the optimizer's moments are all that a run needs: rates and
    random draws follow from the step.

    Args:
        output: folder of the run.
        step: number of steps taken.
        named: weights that are trained, by name.
        optimizer: of these weights.
    """

    def fill(folder: Path) -> None:
        save_tensors(folder / TRAINED, named)
        save_tensors(folder / OPTIMIZER, optimizer_tensors(optimizer))

    write_folder(output / f"checkpoint-{step}", fill)
    for old in output.glob("checkpoint-*"):
        if old.name != f"checkpoint-{step}":
            shutil.rmtree(old)


def _finish(model: Any, processor: Any, lora: Any, output: Path) -> None:
    if getattr(model, "wings", None) is not None:
        save_pretrained(model, output / "wings")
        detach(model)
    if lora is not None:
        model = lora.merge_and_unload()
    close(model)
    save(model, processor, output / "model")
    _remove_checkpoints(output)


def _remove_checkpoints(output: Path) -> None:
    for old in output.glob("checkpoint-*"):
        shutil.rmtree(old)
