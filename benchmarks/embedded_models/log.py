"""What training says while it runs."""

import json
import logging
import time
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)


class Say(Protocol):
    """Takes down how training goes at a step."""

    def __call__(self, step: int, **figures: float) -> None: ...


def recorder(log: Path, stage: str) -> Say:
    """Writes a stage's figures: a line to the program's log, and one of JSON to the file `log`."""
    begin = time.monotonic()

    def write(step: int, **figures: float) -> None:
        seconds = round(time.monotonic() - begin, 1)
        append_figures(log, stage=stage, step=step, seconds=seconds, **figures)

    return write


def append_figures(log: Path, **figures: float | str) -> None:
    """Writes figures, of four digits: a line to the program's log, and one of JSON to the file `log`."""
    line = {
        key: value if isinstance(value, str) else round(value, 4) for key, value in figures.items()
    }
    logger.info(" ".join(f"{key} {value}" for key, value in line.items()))
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
