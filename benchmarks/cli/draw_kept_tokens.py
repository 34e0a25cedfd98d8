"""`vlm-prune draw-kept-tokens`: the picture of the documentation."""

from pathlib import Path
from typing import Annotated

import typer

SHOWN = ("random", "fopru", "adaptinfer", "zoo", "zoo-exact")
LABEL = 24


def draw_kept_tokens(
    out: Annotated[Path, typer.Argument(help="PNG file to write.")],
    budget: Annotated[int, typer.Argument(min=1, help="Tokens per image.")] = 64,
) -> None:
    """Draw which tokens each of a few methods keeps of two scenes, with its answers."""
    import torch
    from PIL import Image, ImageDraw, ImageFont

    from vlm_prune.benchmarks.report.overlay import kept_overlay
    from vlm_prune.benchmarks.tasks import TASKS
    from vlm_prune.benchmarks.tasks.scenes import GRID, SIDE
    from vlm_prune.pruning import METHODS
    from vlm_prune.vlm.chat import encode_prompts, render
    from vlm_prune.vlm.common.files import atomic_path, check_output
    from vlm_prune.vlm.load import load

    check_output(out)
    model, processor = load()
    pruners = {name: METHODS[name](budget=budget) for name in SHOWN}
    for pruner in pruners.values():
        pruner.admit(model)
    samples = [TASKS["attribute"].sample(index) for index in (1, 4)]
    sheet = Image.new("RGB", (SIDE * (1 + len(SHOWN)), (SIDE + LABEL) * len(samples)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, sample in enumerate(samples):
        top = row * (SIDE + LABEL)
        prompt = render(processor, sample.messages(), add_generation_prompt=True)
        inputs = encode_prompts(model, processor, [prompt], [sample.images])
        sheet.paste(sample.images[0], (0, top + LABEL))
        draw.text((4, top + 2), sample.turns[-1].text, "black", font)
        for column, (name, pruner) in enumerate(pruners.items(), 1):
            with pruner(model) as trace, torch.inference_mode():
                output = model.generate(**inputs)
            # methods that cut several times: what the first cut keeps
            kept = trace.cuts[0][0] if trace.cuts else trace.kept[0]
            overlay = kept_overlay(sample.images[0], kept, (GRID, GRID))
            sheet.paste(overlay, (column * SIDE, top + LABEL))
            reply = processor.decode(
                output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            draw.text((column * SIDE + 4, top + 2), f"{name}: {reply.strip()}", "black", font)
    with atomic_path(out) as partial:
        sheet.resize((sheet.width // 2, sheet.height // 2)).quantize(96).save(partial, "PNG")
