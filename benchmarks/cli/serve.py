"""`vlm-prune serve`."""

import os
from typing import Annotated

import typer

from vlm_prune.benchmarks.cli.options import (
    Method,
    MethodArgs,
    OneBudget,
    Positions,
    Seed,
    parse_method_args,
)
from vlm_prune.vlm.budget import parse_budget

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve_command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="'tiny', 'smol' or 'tiny-video' (embedded), a checkpoint folder, or a hub name."
        ),
    ],
    method: Method = "zoo",
    budget: OneBudget = "64",
    positions: Positions = "auto",
    method_args: MethodArgs = "",
    seed: Seed = 0,
) -> None:
    """Start vLLM's OpenAI-compatible server with pruned images; its own options are passed on."""
    from vlm_prune.benchmarks.evaluation.records import Variant
    from vlm_prune.vlm.serving.server import server_command
    from vlm_prune.vlm.serving.settings import Settings

    variant = Variant(method, parse_budget(budget), positions, parse_method_args(method_args))
    settings = Settings.read(
        {
            "method": method,
            "budget": variant.budget,
            "seed": seed,
            "arguments": variant.with_positions,
        }
    )
    start = server_command(model, settings, context.args)
    os.execv(start[0], start)
