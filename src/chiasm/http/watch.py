"""Notices that files were replaced while a server runs: keys and certificates."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 1.0


class FileWatch:
    """Looks once a second whether one of some files is another one than before, however it was replaced."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen = self._look()

    async def changes(self) -> AsyncIterator[None]:
        """Yield after each change; never ends. What is at a path may be missing or incomplete then."""
        while self._paths:
            await asyncio.sleep(INTERVAL_SECONDS)
            found = await asyncio.to_thread(self._look)  # a network's file system may take its time
            if found != self._seen:
                self._seen = found
                yield

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._paths]


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """A block beside which some work runs, until the block ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what differs between a file and the one that replaces it; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
