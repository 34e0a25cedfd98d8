"""Time a training step of CoDyRA against plain LoRA of the same rank, on a CLIP of random weights.

python scripts/bench_continual.py --model ViT-B-16-quickgelu --batch 64 --classes 100
"""

from typing import Annotated

import torch
import typer

from vlm_prune.benchmarks.cli.terminal import script
from vlm_prune.benchmarks.experiments.continual.timing import step_times
from vlm_prune.continual.clip import Clip, load_clip
from vlm_prune.continual.methods import make_method


def main(
    model: Annotated[str, typer.Option(help="open_clip model")] = "ViT-B-32-quickgelu",
    batch: Annotated[int, typer.Option(min=1)] = 8,
    classes: Annotated[int, typer.Option(min=1)] = 8,
    rank: int = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    device: str = "cpu",
) -> None:
    """Alternate single steps of both methods; print the median times and the ratio of medians."""

    def make_clip() -> Clip:
        torch.manual_seed(0)
        clip = load_clip(model, None)
        clip.model.to(device)
        return clip

    methods = {name: make_method(name, rank=rank) for name in ("lora", "codyra")}
    prompts = [f"a photo of a {n}." for n in range(classes)]
    pixels = torch.randn(batch, 3, *make_clip().model.visual.image_size, device=device)
    labels = torch.arange(batch, device=device) % classes
    medians = step_times(methods, make_clip, prompts, pixels, labels, rounds)
    for name, median in medians.items():
        typer.echo(f"{name}: {median:.1f} ms per step (rank {rank}, {model}, batch {batch})")
    typer.echo(f"codyra / lora: {medians['codyra'] / medians['lora']:.3f}")


if __name__ == "__main__":
    script(lambda: typer.run(main))
