"""What every long-running command does with its standard streams."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

import typer

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def log_to_stderr(level: str) -> None:
    """Send the log to standard error; standard output carries the ready line and nothing else."""
    check_level(level)
    logging.basicConfig(
        stream=sys.stderr, level=_LEVELS[level.lower()], format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if level.lower() == "info":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # at info it tells of each of its own steps


def check_level(level: str) -> None:
    """Raise typer's usage error for what is no level of logging."""
    if level.lower() not in _LEVELS:
        raise typer.BadParameter(f"{level!r} is not one of {', '.join(_LEVELS)}", param_hint="--log-level")


def print_ready(url: str) -> None:
    """The one line on standard output."""
    print(f"ready {url}", flush=True)


def end_at_once() -> NoReturn:
    """End the process, all work being done: to take torch's modules apart one by one would take a second or more."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
