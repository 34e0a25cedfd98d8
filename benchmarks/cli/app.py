"""How every command and script begins and ends: one line for whatever a user or a machine stops.

Imports nothing heavy, so that an interruption of the imports is met here, too.
"""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, NoReturn

from vlm_prune.vlm.common.errors import InputError, one_line

WRONG_INPUT, INTERRUPTED = 2, 130
RESUMABLE = ("eval", "compare", "search", "map", "train-wings", "continual", "train-tiny")
# What packages that come with an extra are for.
EXTRAS = {
    "accelerate": "train",
    "datasets": "eval",
    "gradio": "demo",
    "matplotlib": "plot",
    "open_clip": "clip",
    "peft": "train",
    "pyarrow": "iit",
    "ray": "ray",
    "ruptures": "schedule",
    "timm": "clip",
    "torchvision": "clip",
    "triton": "kernels",
}


def main() -> None:
    """Runs `vlm-prune`; it is the package's entry point."""
    run_script()


def run_script(*command: str) -> NoReturn:
    """Runs `vlm-prune`, or one of its commands with the arguments of a script."""
    arguments = [*command, *sys.argv[1:]] or ["--help"]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torchao, which transformers imports where it is installed, calls what newer torch deprecates
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

    def call() -> object:
        from vlm_prune.benchmarks.cli.commands import app

        return app(args=arguments, prog_name="vlm-prune", standalone_mode=False)

    run_command(call, arguments[0])


def run_command(call: Callable[[], object], name: str = "") -> NoReturn:
    """Runs `call` and exits: 2 and one line for wrong input, 130 and one for Ctrl-C and SIGTERM.

    Args:
        call: what to run; the process exits with the number that it returns, if any.
        name: of the command, for what the line advises.
    """
    try:
        # what a launcher sends when another process of the run ended, and a scheduler at its limit
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if isinstance(sys.stdout, TextIOWrapper):  # data may hold what the terminal cannot show
            sys.stdout.reconfigure(errors="backslashreplace")
        found = call()
        _flush()
        code = found if isinstance(found, int) else 0
        if code == INTERRUPTED:  # what typer makes of Ctrl-C inside a command
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        code = _say(_interrupted(name), INTERRUPTED)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        code = 1
        _discard_output()
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        code = _say(message, WRONG_INPUT)
    raise SystemExit(code)


def explained(error: Exception) -> str | None:
    """Returns one line on an error that the input or the machine
    causes; None for one that is ours.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, _class("typer", "TyperException")):
        return _usage(error)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space and run it again" if full else ""
        return f"{error.filename or 'output'}: {error.strerror or error}{hint}"
    if isinstance(error, (MemoryError, _class("torch", "OutOfMemoryError"))):
        return "out of memory; give smaller batches, images or models"
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"this needs {error.name}: pip install 'vlm-prune[{EXTRAS[error.name]}]'"
    return None


def _usage(error: Any) -> str:
    """Returns what typer says, with the commands of a group where none was given."""
    message = str(error.format_message())
    commands = getattr(getattr(getattr(error, "ctx", None), "command", None), "commands", None)
    if message == "Missing command." and commands:
        return f"give a command of {error.ctx.command_path}: {', '.join(commands)}"
    return message


def _class(module: str, name: str) -> type[Exception]:
    """Returns an exception of a module, which cannot have been
    raised where that is not imported.
    """
    found: type[Exception] = getattr(sys.modules.get(module), name, _NeverRaised)
    return found


class _NeverRaised(Exception):
    """Is not raised."""


def _interrupted(name: str) -> str:
    return "interrupted" + (
        "; the same command with the same --output resumes" if name in RESUMABLE else ""
    )


def _say(message: str, code: int) -> int:
    with suppress(OSError):  # a full disk behind standard error
        print(f"Error: {one_line(message)}", file=sys.stderr, flush=True)
    try:
        _flush()
    except OSError:
        _discard_output()
    return code


def _flush() -> None:
    if sys.stdout is not None:  # it may be closed
        sys.stdout.flush()


def _discard_output() -> None:
    """Lets the interpreter end without another error about standard output."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
