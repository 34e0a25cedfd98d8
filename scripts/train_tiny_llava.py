"""Train the embedded LLaVA: `python scripts/train_tiny_llava.py OUT [--tower STATE]`."""

import argparse
import logging
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlm_prune.benchmarks.tasks import curriculum
from vlm_prune.benchmarks.tasks.scenes import COLORS, NAMES
from vlm_prune.vlm.tiny.config import make_model, make_processor
from vlm_prune.vlm.tiny.language import clip
from vlm_prune.vlm.tiny.train import cache_features, export, teach_language, teach_tower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tower", type=Path, help="start from a trained tower (safetensors)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all numbers of steps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(0)
    processor = make_processor(curriculum.corpus())
    model = make_model(processor)
    tower, scale = clip(model), arguments.scale
    if arguments.tower:
        tower.load_state_dict(load_file(arguments.tower))
    else:
        steps = (round(1000 * scale), round(30 * scale))
        windows = curriculum.windows(22, batch=80, side=6)
        sizes = (len(NAMES) + 1, len(COLORS))
        teach_tower(model, windows, curriculum.whole(23), sizes, steps)
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_file(tower.state_dict(), arguments.out.with_name("tower.safetensors"))
    features = partial(cache_features, tower, curriculum.pixels_of)
    few = features(curriculum.scenes(31, things=2), 160)
    many = features(curriculum.scenes(32), 900)
    teach_language(
        model,
        processor,
        partial(curriculum.text_row, number=16),
        partial(curriculum.visual_row, number=16),
        [
            (few, round(150 * scale), 2e-3, partial(curriculum.subset, extra=24)),
            (many, round(1000 * scale), 2e-3, partial(curriculum.subset, extra=40)),
            (many, round(60 * scale), 5e-4, None),
        ],
        lambda step: export(model, processor, arguments.out),
    )


if __name__ == "__main__":
    main()
