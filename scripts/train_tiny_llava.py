"""Train the embedded LLaVA on the embedded tasks' training scenes, on a CPU, in about
two and a half hours of two cores.

The result is written to `<folder>/checkpoint`; `--install` also puts it into the package.
"""

import json
import logging
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_prune.benchmarks.embedded_models.initial import look_back
from vlm_prune.benchmarks.embedded_models.llava import STAGES, Recipe, Trainer
from vlm_prune.benchmarks.embedded_models.source import SceneSource, corpus
from vlm_prune.benchmarks.embedded_models.store import save_checkpoint
from vlm_prune.vlm.common.files import write_text
from vlm_prune.vlm.tiny import checkpoint_path
from vlm_prune.vlm.tiny.config import make_model, make_processor

Keep = Literal["tower", "all"]


def main(
    folder: Path,
    stage: Annotated[list[str] | None, typer.Option(help=f"of {STAGES}; all by default")] = None,
    seed: int = 0,
    threads: int = 2,
    keep: Annotated[Keep | None, typer.Option(help="Start from the packaged weights.")] = None,
    bf16: Annotated[bool, typer.Option(help="Fast if the CPU has bf16 instructions.")] = False,
    install: bool = False,
) -> None:
    """Stages that `folder` already holds are loaded, not repeated."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    packaged = checkpoint_path()
    processor = AutoProcessor.from_pretrained(packaged) if keep else make_processor(corpus(), 768)
    model = make_model(processor)
    look_back(model.model.language_model)
    if keep:
        trained = LlavaForConditionalGeneration.from_pretrained(packaged).state_dict()
        tower = {name: weight for name, weight in trained.items() if "vision_tower" in name}
        model.load_state_dict(trained if keep == "all" else tower, strict=keep == "all")
    trainer = Trainer(processor, SceneSource(seed), folder, Recipe(seed=seed, bf16=bf16), model)
    begin = {None: "tower", "tower": "symbols", "all": "language"}[keep]
    stages = STAGES[STAGES.index(begin) :]
    trainer.run(tuple(stage) if stage else stages)
    if install:
        save_checkpoint(trainer.model, processor, packaged)
        log = packaged / "training_log.jsonl"
        before = log.read_text().splitlines(keepends=True) if keep else []
        if keep == "tower":  # what came after the tower did not make these weights
            before = list(takewhile(lambda line: json.loads(line)["stage"] not in stages, before))
        write_text(log, "".join(before) + (folder / "log.jsonl").read_text())


if __name__ == "__main__":
    typer.run(main)
