"""How the weights in the package were made: whole trainings, and putting their results there."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlm_prune.benchmarks.embedded_models.clip import STATE, ClipRecipe, Pretraining
from vlm_prune.benchmarks.embedded_models.clip_card import write_card
from vlm_prune.benchmarks.embedded_models.initial import look_back
from vlm_prune.benchmarks.embedded_models.llava import STAGES, LlavaRecipe, Trainer
from vlm_prune.benchmarks.embedded_models.log import recorder
from vlm_prune.benchmarks.embedded_models.source import SceneSource, tokenizer_texts
from vlm_prune.benchmarks.embedded_models.store import save_checkpoint, save_language_model
from vlm_prune.benchmarks.embedded_models.text import train_text
from vlm_prune.benchmarks.embedded_models.video import VideoRecipe, VideoTrainer
from vlm_prune.continual.tiny import clip_checkpoint_path as clip_path
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.files import write_folder, write_text
from vlm_prune.vlm.common.folder import OutputFolder
from vlm_prune.vlm.common.registry import unknown
from vlm_prune.vlm.common.state import load_tensors, save_tensors
from vlm_prune.vlm.load import load
from vlm_prune.vlm.smol import PROJECTOR, adapter_path
from vlm_prune.vlm.tiny import checkpoint_path, text_language_model
from vlm_prune.vlm.tiny.config import make_model, make_processor
from vlm_prune.vlm.tiny.video import WEIGHTS, video_weights


def train_llava(
    folder: Path,
    chosen: tuple[str, ...] = (),
    seed: int = 0,
    keep: Literal["tower", "all"] | None = None,
    bf16: bool = False,
    install: bool = False,
) -> None:
    """Trains the embedded LLaVA; stages that `folder` already holds are loaded, not repeated.

    Args:
        folder: where stages, a log and the result, `checkpoint`, go.
        chosen: stages to do; all, or those after what is kept, unless given.
        seed: of weights and data.
        keep: which of the packaged weights to start from.
        bf16: whether to compute in bfloat16.
        install: whether the result replaces the packaged weights.

    Raises:
        InputError: for an unknown stage.
    """
    for name in chosen:
        if name not in STAGES:
            raise InputError(unknown("stage", name, STAGES))
    torch.manual_seed(seed)
    packaged = checkpoint_path()
    kept, processor = (
        load("tiny", "cpu") if keep else (None, make_processor(tokenizer_texts(), 768))
    )
    model = make_model(processor)
    look_back(model.model.language_model)
    if kept is not None:
        trained = kept.state_dict()
        tower = {name: weight for name, weight in trained.items() if "vision_tower" in name}
        model.load_state_dict(trained if keep == "all" else tower, strict=keep == "all")
    trainer = Trainer(
        processor, SceneSource(seed), folder, LlavaRecipe(seed=seed, bf16=bf16), model
    )
    begin = {None: "tower", "tower": "symbols", "all": "language"}[keep]
    stages = STAGES[STAGES.index(begin) :]
    trainer.run(chosen or stages)
    if not install:
        return
    save_checkpoint(trainer.model, processor, packaged)
    log = packaged / "training_log.jsonl"
    before = log.read_text().splitlines(keepends=True) if keep else []
    if keep == "tower":  # what came after the tower did not make these weights
        before = list(takewhile(lambda line: json.loads(line)["stage"] not in stages, before))
    write_text(log, "".join(before) + (folder / "log.jsonl").read_text())


def train_base(
    folder: Path, steps: int = 1200, seed: int = 0, bf16: bool = False, install: bool = False
) -> None:
    """Trains a language model of the LLaVA's shape on text alone, the base of `forgetting`.

    Args:
        folder: where `text.safetensors` and `text_log.jsonl` go.
        steps: of the optimizer.
        seed: of weights and data.
        bf16: whether to compute in bfloat16.
        install: whether the result replaces the packaged one.

    Raises:
        InputError: if `folder` is none for results, or another training writes to it.
    """
    torch.manual_seed(seed)
    log, weights = folder / "text_log.jsonl", folder / "text.safetensors"
    with OutputFolder(folder):
        log.unlink(missing_ok=True)
        _, processor = load("tiny", "cpu")
        model = make_model(processor)
        train_text(model, processor, SceneSource(seed), steps, recorder(log, "text"), seed, bf16)
        save_language_model(model, weights)
    if install:
        shutil.copy2(log, checkpoint_path())
        shutil.copy2(weights, text_language_model())


def train_clip(folder: Path, seed: int = 0, install: bool = False) -> None:
    """Pre-trains the embedded CLIP from its last checkpoint, and writes its model card.

    Args:
        folder: where the training is.
        seed: of weights and data.
        install: whether the result replaces the packaged weights.
    """
    Pretraining(folder, ClipRecipe(seed=seed)).run()
    write_card(folder)
    if install:
        state = shutil.ignore_patterns(f"{STATE}*")
        shutil.copytree(folder, clip_path(), ignore=state, dirs_exist_ok=True)


def train_smol(
    folder: Path,
    steps: int,
    minutes: float | None = None,
    seed: int = 0,
    keep: bool = False,
    practice: bool = False,
    install: bool = False,
) -> None:
    """Trains projector and LoRA of the LLaVA over SmolLM2, from the folder's last state on.

    Args:
        folder: where state, log and the result, `checkpoint`, go.
        steps: of the optimizer in all; curriculum and learning rate follow the share that is done.
        minutes: that training takes; where given, it ends then, whatever `steps` says.
        seed: of the data.
        keep: whether a new training starts from the packaged weights.
        practice: whether such a training has its last level alone, at lower rates.
        install: whether the result replaces the packaged weights.

    Raises:
        InputError: if SmolLM2's weights are not installed, another training writes to the
            folder, or `practice` comes without `keep`.
    """
    from vlm_prune.benchmarks.embedded_models.smol import FURTHER, SmolRecipe, SmolTrainer

    if practice and not keep:
        raise InputError("--practice trains weights that see already; add --keep")
    with OutputFolder(folder):
        recipe = SmolRecipe(steps=steps, minutes=minutes, seed=seed)
        if keep:
            recipe = replace(recipe, levels=FURTHER, rate=8e-4, projector_rate=1e-3, decay=0.6)
        if practice:
            recipe = replace(recipe, levels=FURTHER[-1:], rate=5e-4, projector_rate=1.5e-4)
        trainer = SmolTrainer(folder, recipe, adapter_path() if keep else None)
        trainer.run()
        write_folder(folder / "checkpoint", trainer.write_adapter)
    if install:
        _install_adapter(folder)


def average_smol(folder: Path, trainings: Sequence[Path], install: bool = False) -> None:
    """Averages the weights of several trainings of the LLaVA over SmolLM2.

    LoRA's two factors are averaged each by itself, so the product is only close to the mean of the
    products, as long as the trainings started from the same weights.

    Args:
        folder: where the result, `checkpoint`, and a log of all trainings go.
        trainings: folders of finished trainings, or of their means.
        install: whether the result replaces the packaged weights.

    Raises:
        InputError: if a folder holds no finished training, or the shapes of their weights differ.
    """
    weights = ("adapter_model.safetensors", PROJECTOR)
    checkpoints = [training / "checkpoint" for training in trainings]

    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in tensors.items()}

    def fill(partial: Path) -> None:
        for name in weights:
            parts = [load_tensors(checkpoint / name) for checkpoint in checkpoints]
            if any(shapes(part) != shapes(parts[0]) for part in parts):
                raise InputError(
                    f"the weights in {name} differ in name or shape; average trainings of one recipe"
                )
            mean = {
                key: torch.stack([part[key].float() for part in parts]).mean(0).half()
                for key in parts[0]
            }
            save_tensors(partial / name, mean)
        shutil.copyfile(checkpoints[0] / "adapter_config.json", partial / "adapter_config.json")

    with OutputFolder(folder):
        write_folder(folder / "checkpoint", fill)
        logs = [(training / "log.jsonl").read_text() for training in trainings]
        lines = dict.fromkeys("".join(logs).splitlines(keepends=True))
        write_text(folder / "log.jsonl", "".join(lines))
    if install:
        _install_adapter(folder)


def _install_adapter(training: Path) -> None:
    for file in (training / "checkpoint").iterdir():
        shutil.copyfile(file, adapter_path() / file.name)
    shutil.copyfile(training / "log.jsonl", adapter_path() / "training_log.jsonl")


def train_video(
    folder: Path,
    minutes: float,
    seed: int = 0,
    keep: bool = False,
    install: bool = False,
) -> None:
    """Trains projector and language model of the embedded video model, from the folder's last state on.

    Args:
        folder: where state, log and the result, `weights`, go.
        minutes: that training takes.
        seed: of the data.
        keep: whether a new training starts from the packaged weights, not from those of `tiny`.
        install: whether the result replaces the packaged weights.

    Raises:
        InputError: if another training writes to the folder, or it holds one of another recipe.
    """
    with OutputFolder(folder):
        start = video_weights() / WEIGHTS if keep else None
        trainer = VideoTrainer(folder, VideoRecipe(minutes=minutes, seed=seed), start)
        trainer.run()
        write_folder(folder / "weights", trainer.write_weights)
    if install:
        shutil.copyfile(folder / "weights" / WEIGHTS, video_weights() / WEIGHTS)
        shutil.copyfile(folder / "log.jsonl", video_weights() / "training_log.jsonl")
