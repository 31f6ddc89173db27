"""How a server ends: it takes no new work, lets what runs end by itself, and interrupts what hasn't ended in time."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Annotated

from chiasm.options import Option

ShutdownTimeout = Annotated[
    float,
    Option(
        "After SIGTERM or SIGINT, time for running requests to end; then they end with an error. A second signal ends them "
        "at once.",
        min=0,
    ),
]
SHUTDOWN_TIMEOUT_SECONDS = 30.0
"""As long as Kubernetes waits by default before it kills."""
_LOOK_SECONDS = 0.02


class Shutdown:
    """The end of one server. All methods belong to its event loop.

    It begins with a drain, which waits for what runs as long as that takes, or with a signal, which limits the time.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """``timeout_seconds``: time for what runs to end by itself."""
        self.timeout_seconds = timeout_seconds
        self._asked = asyncio.Event()
        self._hurried = asyncio.Event()
        self._until: float | None = None

    def drain(self) -> None:
        """Begin the end, and give what runs all the time that it needs."""
        self._asked.set()

    def ask(self) -> None:
        """Begin the end, and limit the time for what runs; the second call ends that time."""
        self._asked.set()
        if self._until is not None:
            self._hurried.set()
        else:
            self._until = asyncio.get_running_loop().time() + self.timeout_seconds

    @property
    def is_asked(self) -> bool:
        """Whether it has begun."""
        return self._asked.is_set()

    async def asked(self, timeout_seconds: float) -> bool:
        """Wait until it begins, at most for ``timeout_seconds``; return whether it has."""
        return await _within(self._asked, timeout_seconds)

    async def drained(self, is_idle: Callable[[], bool], at_most_seconds: float = math.inf) -> None:
        """Return when ``is_idle`` says that nothing runs anymore, after the time for it, or when ``ask`` is called again.

        Return after ``at_most_seconds`` in any case.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + at_most_seconds
        while not is_idle() and not await _within(self._hurried, _LOOK_SECONDS):
            if loop.time() >= min(until, math.inf if self._until is None else self._until):
                return


async def _within(event: asyncio.Event, timeout_seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_seconds)
    return event.is_set()
