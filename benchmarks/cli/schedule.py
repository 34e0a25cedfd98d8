"""`vlm-prune schedule`."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import (
    Adapter,
    AllowOutside,
    Attn,
    BatchSize,
    Device,
    DeviceMap,
    Dtype,
    Limit,
    Model,
    OneBudget,
    Quantization,
    Seed,
    parse_tasks,
)
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.terminal import progress, quiet


def schedule_command(
    model: Model = "tiny",
    data: Annotated[
        str, typer.Option(help="Tasks (their validation split), or a LLaVA-format JSON file.")
    ] = "visual",
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images of a JSON file; the working one.")
    ] = None,
    allow_outside: AllowOutside = False,
    budget: OneBudget = "64",
    cuts: Annotated[int, typer.Option(min=1, max=3, help="Cuts to propose, at most.")] = 3,
    limit: Limit = 200,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="Folder for schedule.json and schedule.png.")] = Path(
        "runs/schedule"
    ),
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn: Attn = None,
    adapter: Adapter = None,
) -> None:
    """Propose cuts inside the LLM from where a model's attention to the image shifts."""
    from statistics import median_low

    from vlm_prune.benchmarks.evaluation.tables import THREE_WAYS, three_ways
    from vlm_prune.benchmarks.experiments import schedule as analysis
    from vlm_prune.vlm.budget import check_fits, tokens_for
    from vlm_prune.vlm.common.files import check_outputs
    from vlm_prune.vlm.common.paths import DataRoot
    from vlm_prune.vlm.families import family_of
    from vlm_prune.vlm.load import load

    quiet()
    check_outputs(output, analysis.FILES)
    share = parse_budget(budget)
    if data.endswith(".json"):
        root = DataRoot(images or Path("."), allow_outside)
        prompts = analysis.prompts_of_file(Path(data), root, limit)
    elif images is not None:
        raise InputError(f"--images {images} is for conversations; give --data FILE.json")
    else:
        prompts = analysis.prompts_of_tasks(parse_tasks(data), limit, seed)
    if not prompts:
        raise InputError(f"{data} holds no question about an image")
    loaded, processor = load(
        model, device, dtype, device_map=device_map, quantization=quantization, attn=attn,
        adapter=adapter,
    )  # fmt: skip
    family = family_of(loaded)
    if family.fixed_size:
        check_fits(share, family.tokens_per_image)
    with progress(len(prompts)) as advance:
        points, sizes = analysis.change_points_of(loaded, processor, prompts, batch_size, advance)
    whole = median_low(sizes)
    wanted = tokens_for(share, whole)
    content = analysis.proposal(loaded, points, wanted, cuts, whole)
    analysis.save_schedule(content, output)
    print(f"change points after 0, 1, ... layers: {content['histogram']}")
    print(f"proposed: cut after {list(content['places'])} of {content['layers']} layers")
    kept = ", ".join(f"{cut['keep']} after layer {cut['layer']}" for cut in content["cuts"])
    print(f"at budget {wanted} of {whole} tokens: keep {kept}")
    print(f"which is {three_ways(content['counts'])} tokens per image ({THREE_WAYS})")
    print(f"{output / 'schedule.json'}: for --schedule of eval, compare and bench")
