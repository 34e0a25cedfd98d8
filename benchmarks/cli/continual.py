"""`vlm-prune continual`: teach a CLIP a stream of tasks, compare methods, time their steps."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import AllowOutside, Device, Seed, parse_arguments
from vlm_prune.vlm.common.errors import InputError

STREAMS = ("packaged", "redrawn", "mtil-1", "mtil-2", "mtil-5shot", "x-tail", "cifar100-10")
METHODS = (
    "zero-shot", "codyra", "codyra-plus", "random-rank", "lora", "o-lora", "dora", "randlora",
    "adalora", "keeplora", "moram", "full", "condu", "wise-ft", "lwf", "zscl", "rail",
    "lda-text",
)  # fmt: skip
RESULTS = Path("docs/results/continual")

app = typer.Typer(
    pretty_exceptions_enable=False, help="Continual learning of CLIP: train, compare, time."
)


@app.command("train")
def train_continual(
    output: Annotated[Path | None, typer.Option(help="Folder of the run; resumes there.")] = None,
    stream: Annotated[str, typer.Option(help=", ".join(STREAMS))] = "packaged",
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "codyra",
    data_root: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("."),
    allow_outside: AllowOutside = False,
    model: Annotated[str | None, typer.Option(help="'tiny', a name or a folder.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of the weights.")] = None,
    options: Annotated[str, typer.Option(help="The method's, as rank=8,gate_init=ones.")] = "",
    recipe: Annotated[str, typer.Option(help="The training's, as steps=100,lr=0.001.")] = "",
    shots: Annotated[int | None, typer.Option(help="Per class; the stream's if left out.")] = None,
    test_per_class: Annotated[
        int | None, typer.Option(help="Test images; all if left out.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Name and leave out.")] = False,
    retention: Annotated[
        str | None, typer.Option(help="Data sets outside of the stream, comma-separated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 0,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Activations again in the backward pass.")
    ] = False,
    seed: Seed = 8,
) -> None:
    """Train, or finish training, and print the accuracy matrix; the folder also has it as JSON."""
    from vlm_prune.benchmarks.experiments.continual.learn import (
        Learning,
        accuracy_matrix,
        learn,
        retention_line,
    )
    from vlm_prune.benchmarks.stats.table import show
    from vlm_prune.continual.parallel import rank_and_world
    from vlm_prune.continual.results import read_results

    folder = Path("runs") / f"{stream}-{method}-{seed}" if output is None else output
    given = parse_arguments(options), parse_arguments(recipe)
    settings = Learning(
        folder, stream, data_root, model, pretrained, method, *given, seed,
        test_per_class=test_per_class, shots=shots, skip_bad=skip_bad,
        retention=None if retention is None else tuple(retention.split(",")),
        allow_outside=allow_outside, workers=workers, recompute=recompute,
    )  # fmt: skip
    report = learn(settings)
    if rank_and_world()[0]:
        return
    show(accuracy_matrix(read_results(folder)).table())
    for name, left in report["retention"].items():
        show(retention_line(name, left))
    show(f"{folder}: report.json, matrix.png, and the final model in model/")


@app.command("compare")
def compare_continual(
    output: Annotated[Path, typer.Argument(help="Folder of the runs; resumes there.")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Per task.")] = 20,
    test_per_class: Annotated[int, typer.Option(min=1, help="Test images.")] = 12,
    arms: Annotated[
        str | None, typer.Option(help="Separated by semicolons; all unless given.")
    ] = None,
    stream: Annotated[str, typer.Option(help="packaged, redrawn")] = "packaged",
    search_from: Annotated[
        Path | None, typer.Option(help="Folder of a comparison whose search is taken over.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help=f"Of the results; {RESULTS} of the packaged stream.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    only_write: Annotated[
        bool, typer.Option("--only-write", help="Of the runs that are finished.")
    ] = False,
) -> None:
    """Search on validation images of the packaged stream, run every method with every seed, write what came out."""
    import torch

    from vlm_prune.benchmarks.experiments.continual.experiment import ARMS, Experiment, run_all
    from vlm_prune.benchmarks.experiments.continual.results import FILES, time_steps, write
    from vlm_prune.vlm.common.files import check_outputs
    from vlm_prune.vlm.common.terminal import console

    chosen = tuple(ARMS) if arms is None else tuple(arms.split(";"))
    for name in chosen:
        if name not in ARMS:
            raise InputError(f"there is no arm {name!r}; give some of: {'; '.join(ARMS)}")
    experiment = Experiment(
        output, seeds, steps, test_per_class=test_per_class, arms=chosen, stream=stream
    )
    if results is None:
        results = RESULTS if stream == "packaged" else RESULTS.with_name(f"continual-{stream}")
    check_outputs(results, FILES)
    torch.set_num_threads(threads)
    if not only_write:
        run_all(experiment, console(stderr=True).print, search_from)
        time_steps(experiment)
    write(experiment, results)
    typer.echo(f"{results}: {', '.join(FILES)}")


@app.command("bench")
def bench_continual(
    model: Annotated[str, typer.Option(help="open_clip model.")] = "ViT-B-32-quickgelu",
    batch: Annotated[int, typer.Option(min=1)] = 8,
    classes: Annotated[int, typer.Option(min=1)] = 8,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    device: Device = "cpu",
) -> None:
    """Time a training step of CoDyRA against plain LoRA, ours and peft's, on random weights, and
    count what an image and a class prompt add to it.
    """
    import torch

    from vlm_prune.benchmarks.experiments.continual.timing import (
        PeftLoRA,
        step_times,
        unit_costs,
    )
    from vlm_prune.continual.clip import Clip, load_clip
    from vlm_prune.continual.methods import Method, make_method

    def make_clip() -> Clip:
        torch.manual_seed(0)
        clip = load_clip(model, None)
        clip.model.to(device)
        return clip

    methods: dict[str, Method] = {"peft lora": PeftLoRA(rank)}
    methods |= {name: make_method(name, rank=rank) for name in ("lora", "codyra")}
    prompts = [f"a photo of a {n}." for n in range(classes)]
    pixels = torch.randn(batch, 3, *make_clip().model.visual.image_size, device=device)
    labels = torch.arange(batch, device=device) % classes
    medians = step_times(methods, make_clip, prompts, pixels, labels, rounds)
    for name, median in medians.items():
        typer.echo(f"{name}: {median:.1f} ms per step (rank {rank}, {model}, batch {batch})")
    for one, other in (("codyra", "lora"), ("codyra", "peft lora"), ("lora", "peft lora")):
        typer.echo(f"{one} / {other}: {medians[one] / medians[other]:.3f}")
    costs = unit_costs(lambda: make_method("codyra", rank=rank), make_clip, prompts[0], pixels[:1])
    for name, cost in costs.items():
        saved = f", {cost.saved_bytes / 1e6:.0f} MB" if cost.saved_bytes else ""
        typer.echo(f"each {name}: {cost.flops / 1e9:.1f} GFLOP{saved}")
