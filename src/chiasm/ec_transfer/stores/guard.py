"""A circuit breaker: after a fault, a store isn't asked for a while, so that one that is down or slow costs nothing."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from chiasm.ec_transfer.stores.entry import StoreError

_log = logging.getLogger(__name__)
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0


class PausedError(StoreError):
    """The store isn't asked, because it has failed a short while ago."""


class Guard:
    """Lets one kind of use of a store through, unless it has failed lately. For any number of threads.

    After a fault nothing goes through for a second, and after each further one in a row for twice as long, up to 30 s. Then one
    use tries; others wait for how it ends, without waiting themselves. Faults are logged when they begin and when they end.
    """

    def __init__(self, use: str, clock: Callable[[], float] = time.monotonic) -> None:
        """``use`` is for the log, such as ``reading from redis://host:6379/0``."""
        self._use = use
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_seconds = 0.0
        self._closed_until = 0.0
        self._is_trying = False
        self.faults = 0
        """Uses that failed; those that weren't let through don't count."""

    @property
    def is_open(self) -> bool:
        """Whether the next use goes through."""
        with self._lock:
            return not self._pause_seconds or (self._clock() >= self._closed_until and not self._is_trying)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Around one use. Raises PausedError if it doesn't go through, and passes the StoreError of a fault on."""
        self._enter()
        try:
            yield
        except StoreError as error:
            self._fail(error)
            raise
        except BaseException:
            self._succeed()  # it has answered
            raise
        self._succeed()

    def _enter(self) -> None:
        with self._lock:
            if not self._pause_seconds:
                return
            if self._is_trying or self._clock() < self._closed_until:
                raise PausedError("The store has failed a short while ago, so it is not asked.")
            self._is_trying = True

    def _fail(self, error: StoreError) -> None:
        with self._lock:
            self.faults += 1
            is_first = not self._pause_seconds
            # Uses that began together fail together, and are one fault.
            if is_first or self._is_trying:
                self._pause_seconds = min(2 * self._pause_seconds or _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
                self._closed_until = self._clock() + self._pause_seconds
            self._is_trying = False
        if is_first:
            _log.warning("%s failed, and is tried again from time to time: %s", self._use, error)

    def _succeed(self) -> None:
        with self._lock:
            has_failed, self._pause_seconds, self._is_trying = bool(self._pause_seconds), 0.0, False
        if has_failed:
            _log.info("%s works again.", self._use)
