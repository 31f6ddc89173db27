"""Memory of requests that have ended, given back to the machine."""

from __future__ import annotations

import asyncio

from chiasm.heap import give_back
from chiasm.tasks import Tasks

_WORTH_BYTES = 32 << 20
_PAUSE_SECONDS = 20.0
"""Before each time, so that it happens seldom, and what requests held has been freed when it does."""


class Memory:
    """Has the C library give back what it keeps, once requests that held much have ended. Used on one event loop.

    Bodies arrive in many pieces, and what is allocated between two pieces may live longer. So after large bodies the heap can
    keep all of their memory.
    """

    def __init__(self) -> None:
        self._seen_bytes = 0
        self._tasks = Tasks()

    def note_released(self, total_bytes: int) -> None:
        """Note how many bytes all requests since the start have held and released."""
        if total_bytes - self._seen_bytes >= _WORTH_BYTES and not self._tasks:
            self._seen_bytes = total_bytes
            self._tasks.start(self._give_back())

    async def close(self) -> None:
        await self._tasks.close()

    async def _give_back(self) -> None:
        await asyncio.sleep(_PAUSE_SECONDS)
        await asyncio.to_thread(give_back)
