"""Pre-train the embedded CLIP on two CPU cores; `--install` puts the result into the package."""

import logging
import shutil
from pathlib import Path

import torch
import typer

from vlm_prune.benchmarks.cli.terminal import script
from vlm_prune.benchmarks.embedded_models.clip import STATE, Pretraining, Recipe
from vlm_prune.benchmarks.embedded_models.clip_card import write_card
from vlm_prune.continual.tiny import checkpoint_path


def main(folder: Path, seed: int = 0, threads: int = 2, install: bool = False) -> None:
    """Train in `folder`; a run that was killed goes on from its last checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    Pretraining(folder, Recipe(seed=seed)).run()
    write_card(folder)
    if install:
        keep = shutil.ignore_patterns(f"{STATE}*")
        shutil.copytree(folder, checkpoint_path(), ignore=keep, dirs_exist_ok=True)


if __name__ == "__main__":
    script(lambda: typer.run(main))
