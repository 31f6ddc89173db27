"""Servers that no deployment has: commands that answer GET /health, run for as long as they are measured."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from chiasm.bench.measurement import Bench
from chiasm.errors import ChiasmError
from chiasm.launch import DeploymentNotReadyError, ProcessState
from chiasm.launch.child import Child

_POLL_SECONDS = 0.05
_STOP_SECONDS = 5.0
_KILL_SECONDS = 2.0
_LINES_SHOWN = 5


@dataclass(frozen=True)
class Command:
    """One server, as a person would start it."""

    name: str
    arguments: Sequence[str]
    """It says ``ready`` on its standard output, and ends with its standard input; see ``supervised``."""
    environment: Mapping[str, str]
    configuration: str = ""
    """A line for its standard input, if it takes one."""


def supervised(url: str, arguments: Sequence[str]) -> list[str]:
    """A command that does neither, under a supervisor that does both; it is ready when it answers at ``url``."""
    return [sys.executable, "-m", "chiasm.launch.supervisor", "--url", url, "--", *arguments]


@asynccontextmanager
async def served(bench: Bench, *commands: Command, ready_seconds: float) -> AsyncIterator[None]:
    """Run them from when all are ready, and end them in any case.

    Raises ConfigurationError, DeploymentNotReadyError; ChiasmError at the end if one had to be started again meanwhile, since
    then what was measured is not what was to be measured.
    """
    children = [
        Child(
            one.name,
            one.arguments,
            dict(one.environment),
            configuration=one.configuration,
            on_change=_ignore,
            on_line=_ignore,
        )
        for one in commands
    ]
    try:
        for child in children:
            child.start()
        await _ready(bench, children, ready_seconds)
        yield
        if died := [child.name for child in children if child.restarts or child.state is not ProcessState.READY]:
            raise ChiasmError(f"{', '.join(died)} died while it was measured: {_last_lines(children)}")
    finally:
        await asyncio.shield(asyncio.to_thread(_end, children))


async def _ready(bench: Bench, children: Sequence[Child], seconds: float) -> None:
    until = time.monotonic() + seconds
    while waiting := [child.name for child in children if child.state is not ProcessState.READY]:
        for child in children:
            if child.failure is not None:
                raise child.failure
        if time.monotonic() > until:
            raise DeploymentNotReadyError(
                f"{', '.join(waiting)} not ready after {seconds:g} s; last lines: {_last_lines(children)}"
            )
        bench.step(f"starting {waiting[0]}")
        await asyncio.sleep(_POLL_SECONDS)


def _end(children: Sequence[Child]) -> None:
    for child in children:
        child.end()
    until = time.monotonic() + _STOP_SECONDS
    for child in children:
        if not child.join(max(0.0, until - time.monotonic())):
            child.kill()
            child.join(_KILL_SECONDS)


def _last_lines(children: Sequence[Child]) -> str:
    return " | ".join(line for child in children for line in list(child.lines)[-_LINES_SHOWN:])


def _ignore(*_: object) -> None:
    pass
