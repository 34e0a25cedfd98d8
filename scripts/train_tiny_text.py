"""Train a language model of the embedded LLaVA's shape on text alone, on a CPU, in about half an hour of
two cores: the base of the experiment `forgetting`.

The result is `<folder>/text.safetensors`; `--install` also puts it into the package.
"""

import logging
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoProcessor

from vlm_prune.benchmarks.cli.terminal import script
from vlm_prune.benchmarks.embedded_models.log import recorder
from vlm_prune.benchmarks.embedded_models.source import SceneSource
from vlm_prune.benchmarks.embedded_models.store import save_language_model
from vlm_prune.benchmarks.embedded_models.text import train_text
from vlm_prune.vlm.tiny import checkpoint_path
from vlm_prune.vlm.tiny.config import make_model


def main(
    folder: Path,
    steps: int = 1200,
    seed: int = 0,
    threads: int = 2,
    bf16: Annotated[bool, typer.Option(help="Fast if the CPU has bf16 instructions.")] = False,
    install: bool = False,
) -> None:
    """Tokenizer and shape are those of the packaged model; its weights are not used."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    log, weights = folder / "text_log.jsonl", folder / "text.safetensors"
    log.unlink(missing_ok=True)
    processor = AutoProcessor.from_pretrained(checkpoint_path())
    model = make_model(processor)
    train_text(model, processor, SceneSource(seed), steps, recorder(log, "text"), seed, bf16)
    save_language_model(model, weights)
    if install:
        for made in (log, weights):
            shutil.copy2(made, checkpoint_path())


if __name__ == "__main__":
    script(lambda: typer.run(main))
