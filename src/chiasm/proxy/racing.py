"""Work that is given up when something that it depends on fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")
_C = TypeVar("_C")


async def unless_fails(condition: asyncio.Future[_C] | None, work: Awaitable[_T]) -> _T:
    """``await work``, but raise what ``condition`` raises as soon as it does; ``work`` is cancelled then."""
    if condition is None or (condition.done() and condition.exception() is None):
        return await work
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if condition.done():
                condition.result()
                return await task
            await asyncio.wait((task, condition), return_when=asyncio.FIRST_COMPLETED)
        return task.result()
    finally:
        await end(task)


async def end(task: asyncio.Future[_T]) -> _T | None:
    """Cancel what is still running; its result if it came to one, and never an exception."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    return None if task.cancelled() or task.exception() else task.result()
