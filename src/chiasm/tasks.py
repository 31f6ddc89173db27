"""Tasks of asyncio that nobody awaits while they run: started, and ended again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any


async def end_tasks(*tasks: asyncio.Future[Any]) -> None:
    """Cancel these tasks and wait until they have ended. What they return or raise is dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """A block beside which some work runs, until the block ends. Raises what the work has raised."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Tasks:
    """Keeps tasks until they end, or until ``close`` ends them. Used on one event loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def __bool__(self) -> bool:
        """Whether any task runs."""
        return bool(self._running)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` as a task, and return it."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def close(self, *, patience_seconds: float = 0.0) -> None:
        """Cancel the tasks that still run after this time, and wait until all have ended."""
        if self._running and patience_seconds:
            await asyncio.wait(self._running, timeout=patience_seconds)
        await end_tasks(*self._running)
