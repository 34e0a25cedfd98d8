"""`vlm-prune serve`."""

import os
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import (
    Method,
    MethodArgs,
    OneBudget,
    Seed,
    parse_arguments,
    parse_budget,
)

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="'tiny' (embedded), a checkpoint folder, or a hub name.")
    ],
    method: Method = "zoo",
    budget: OneBudget = "64",
    method_args: MethodArgs = "",
    seed: Seed = 0,
) -> None:
    """Start vLLM's OpenAI-compatible server with pruned images; its own options are passed on."""
    from vlm_prune.vlm.serving.server import server_command
    from vlm_prune.vlm.serving.settings import Settings

    settings = Settings.read(
        {
            "method": method,
            "budget": parse_budget(budget),
            "seed": seed,
            "arguments": parse_arguments(method_args),
        }
    )
    start = server_command(model, settings, context.args)
    os.execv(start[0], start)
