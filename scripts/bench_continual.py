"""Time a training step of CoDyRA against plain LoRA of the same rank, on a CLIP of random weights.

python scripts/bench_continual.py --model ViT-B-16-quickgelu --batch 64 --classes 100
"""

import statistics
import time
from typing import Annotated

import torch
import typer

from vlm_prune.continual.clip import load_clip
from vlm_prune.continual.config import Recipe
from vlm_prune.continual.methods import Context, make_method

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="open_clip model")] = "ViT-B-32-quickgelu",
    batch: int = 8,
    classes: int = 8,
    rank: int = 16,
    rounds: int = 20,
    device: str = "cpu",
) -> None:
    """Alternate single steps of both methods; print the median times and the ratio of medians."""
    recipe, steps = Recipe(steps=rounds), {}
    for name in ("lora", "codyra"):
        torch.manual_seed(0)
        clip = load_clip(model, None)
        clip.model.to(device)
        ids = clip.tokenize([f"a photo of a {n}." for n in range(classes)])
        method = make_method(name, rank=rank)
        groups = method.begin_task(Context(clip, recipe, 0, ids, ids[:0]))
        pixels = torch.randn(batch, 3, *clip.model.visual.image_size, device=device)
        labels = torch.arange(batch, device=device) % classes
        steps[name] = method, torch.optim.AdamW(groups), pixels, labels
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):
        for name, (method, optimizer, pixels, labels) in steps.items():
            start = time.perf_counter()
            method.loss(pixels, labels, number + 2).backward()
            optimizer.step()
            method.after_step(rounds - 1)  # the last step's threshold, so that pruning is timed
            optimizer.zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] if number >= 0 else []
    medians = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
    for name, median in medians.items():
        typer.echo(f"{name}: {median:.1f} ms per step (rank {rank}, {model}, batch {batch})")
    typer.echo(f"codyra / lora: {medians['codyra'] / medians['lora']:.3f}")


if __name__ == "__main__":
    app()
