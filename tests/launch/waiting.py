"""Bounded waiting for other threads and processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil


def eventually(holds: Callable[[], object], timeout_seconds: float = 60.0) -> bool:
    """Return whether ``holds`` became true in time."""
    until = time.monotonic() + timeout_seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that still run; a zombie does not."""
    return [process for process in processes if process.is_running() and not _is_zombie(process)]


def command_line(process: psutil.Process) -> list[str]:
    """Return the arguments of a process; those of one that has ended are gone, and the list is empty."""
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
