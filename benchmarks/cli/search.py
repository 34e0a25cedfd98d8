"""`vlm-prune search`."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_prune.benchmarks.cli.options import (
    Adapter,
    Attn,
    BatchSize,
    Budgets,
    Device,
    DeviceMap,
    Dtype,
    Model,
    Quantization,
    Seed,
    Tasks,
    parse_tasks,
)
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.terminal import progress, quiet


def search_command(
    model: Model = "tiny",
    budget: Budgets = "32,64,128",
    tasks: Tasks = "auto",
    limit: Annotated[
        int, typer.Option(min=1, help="Questions of the last round, and of the comparison.")
    ] = 360,
    parts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Combine the so many methods before the language model, and inside it, that answer best "
            "alone; all unless given.",
        ),
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    output: Annotated[
        Path, typer.Option(help="Folder of the runs; a killed search resumes.")
    ] = Path("runs/search"),
    definitions: Annotated[
        Path | None,
        typer.Option(
            help="File to define 'best' in; unless given the package's own for tiny or smol."
        ),
    ] = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    attn: Attn = None,
    adapter: Adapter = None,
) -> None:
    """Search on validation questions for the combination of methods that 'best' stands for."""
    from vlm_prune.benchmarks.evaluation.records import RunConfig, Variant
    from vlm_prune.benchmarks.evaluation.store import check_kind
    from vlm_prune.benchmarks.experiments.search import (
        FILES,
        Search,
        definition_table,
        save_search,
        search_verdict,
    )
    from vlm_prune.benchmarks.stats.table import as_table, show
    from vlm_prune.pruning.best import PACKAGED
    from vlm_prune.pruning.best import definitions as read_definitions
    from vlm_prune.vlm.budget import check_fits, tokens_for
    from vlm_prune.vlm.common.files import check_output, check_outputs
    from vlm_prune.vlm.families import family_of
    from vlm_prune.vlm.load import family_type, load

    quiet()
    target = definitions or (None if adapter else PACKAGED.get(model))
    if target is None:
        raise InputError(
            f"the package has files for {' and '.join(PACKAGED)} alone; give --definitions with a file "
            "for another model"
        )
    check_kind(output, "search")
    check_outputs(output, FILES)
    check_output(target)
    if target.exists():
        read_definitions(str(target))  # another file would be lost
    names = parse_tasks(tasks, model)
    if limit < len(names):
        raise InputError(f"limit {limit} is below one question for {len(names)} tasks")
    given = [parse_budget(text) for text in budget.split(",")]
    wanted: list[int | float] = [each for each in given if isinstance(each, float)]
    several_sizes = "a fixed image size" in family_type(model).lacks
    if several_sizes and len(wanted) < len(given):
        raise InputError(
            f"a number of tokens means something else for each image of {model}, which takes images "
            "of many sizes; give shares, such as --budget 0.05,0.11,0.22"
        )
    loaded, processor = load(
        model, device, dtype, device_map=device_map, quantization=quantization, attn=attn,
        adapter=adapter,
    )  # fmt: skip
    whole: int | float = 1.0
    if not several_sizes:
        whole = family_of(loaded).tokens_per_image
        for each in given:
            check_fits(each, whole)
        wanted = [tokens_for(each, whole) for each in given]
    common = RunConfig(
        model, Variant("none", whole), names, limit, batch_size, device, dtype, seed, "val",
        device_map=device_map, quantization=quantization, attn=attn, peft=adapter,
    )  # fmt: skip

    def watch(what: str, questions: int) -> AbstractContextManager[Any]:
        return progress(questions, what)

    search = Search(loaded, processor, common, limit, output, watch, most_parts=parts)
    found = search.run(list(dict.fromkeys(wanted)))
    save_search(found, output, target)
    for tokens, entry in found.budgets.items():
        show(as_table(definition_table(entry)))
        print(search_verdict(tokens, entry))
