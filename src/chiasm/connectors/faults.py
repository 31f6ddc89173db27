"""What engines do with an error of a connector that it shouldn't raise: they log it, and go on."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from chiasm.connectors.factory import ConnectorConfig

_logger = logging.getLogger(__name__)


LOG_SECONDS = 60.0
"""An error of a connector that comes from the same line again is logged once in this time."""
_MAX_LINES = 64
"""Lines of one connector for which is known when they were logged."""


class Faults:
    """What one half of a connector has raised that it shouldn't. Any thread."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        self._unlogged: dict[tuple[str, int], int] = {}
        """Errors that were not logged, by the line that raised them."""
        self._logged_at: dict[tuple[str, int], float] = {}

    def note(self, error: BaseException, now: float) -> int | None:
        """Count an error. Return how many of the same line were not logged before it; None if this one isn't to be either."""
        line = _line(error)
        with self._lock:
            self.count += 1
            logged_at = self._logged_at.get(line)
            if logged_at is not None and now - logged_at < LOG_SECONDS:
                self._unlogged[line] = self._unlogged.get(line, 0) + 1
                return None
            if len(self._logged_at) >= _MAX_LINES:
                self._logged_at.clear()
                self._unlogged.clear()
            self._logged_at[line] = now
            return self._unlogged.pop(line, 0)


class Connector(Protocol):
    """The part of a connector, on either plane, that names it and counts its errors."""

    @property
    def plane(self) -> str:
        """``EC`` or ``KV``."""

    @property
    def config(self) -> ConnectorConfig: ...

    @property
    def faults(self) -> Faults: ...


def log_failure(connector: Connector, doing: str) -> None:
    """Count the error that is being handled: the connector has failed to do what ``doing`` says.

    It is logged, unless one from the same line was within ``LOG_SECONDS``.
    """
    error = sys.exception()
    assert error is not None, "an error is being handled"
    unlogged = connector.faults.note(error, time.monotonic())
    if unlogged is not None:
        again = f" So it has {unlogged} times since this was logged last." if unlogged else ""
        name = connector.config.connector
        _logger.exception("The %s connector %s failed to %s.%s", connector.plane, name, doing, again)


@contextmanager
def logged(connector: Connector, doing: str) -> Iterator[None]:
    """A block that calls a connector. If that raises an error, log that it failed to do what ``doing`` says, and go on."""
    try:
        yield
    except Exception:
        log_failure(connector, doing)


def _line(error: BaseException) -> tuple[str, int]:
    """Return the file and the line that raised the error."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno
