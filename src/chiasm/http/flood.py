"""A bound on log lines that clients cause: a flood of bad requests fills no disk, and none of them goes uncounted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator

WINDOW_SECONDS = 10.0
LINES_PER_WINDOW = 100
_KINDS_COUNTED = 20
_KIND_CHARACTERS = 80
_COUNT = "more"
"""Marks a record that says how many lines were left out."""


class FloodLimit:
    """Of each ten seconds, lets the first hundred lines of a logger pass, and counts the others in one line at the end.

    Call it on the event loop of the server.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        lines: int = LINES_PER_WINDOW,
        window_seconds: float = WINDOW_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._lines = lines
        self._window_seconds = window_seconds
        self._clock = clock
        self._window_began = -window_seconds
        self._passed = 0
        self._left_out: Counter[str] = Counter()
        self._flushing: asyncio.TimerHandle | None = None

    def admits(self, kind: str) -> bool:
        """Return whether a line may be written; otherwise count it as one of this kind."""
        now = self._clock()
        if now - self._window_began >= self._window_seconds:
            self.flush()
            self._window_began, self._passed = now, 0
        if self._passed < self._lines:
            self._passed += 1
            return True
        is_counted = kind in self._left_out or len(self._left_out) < _KINDS_COUNTED
        self._left_out[kind if is_counted else "others"] += 1
        if self._flushing is None:
            left = self._window_began + self._window_seconds - now
            self._flushing = asyncio.get_running_loop().call_later(left, self.flush)
        return False

    def flush(self) -> None:
        """Write how many lines were left out since the last call, if any were."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if self._left_out:
            kinds = ", ".join(f"{kind} ({count} times)" for kind, count in self._left_out.most_common())
            self._logger.warning("%d more like these: %s", self._left_out.total(), kinds, extra={_COUNT: True})
            self._left_out.clear()


@contextlib.contextmanager
def limited(name: str) -> Iterator[None]:
    """A block in which all lines of the logger of this name are limited."""
    logger = logging.getLogger(name)
    limit = FloodLimit(logger)

    def passes(record: logging.LogRecord) -> bool:
        return hasattr(record, _COUNT) or limit.admits(str(record.msg)[:_KIND_CHARACTERS])

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
        limit.flush()
