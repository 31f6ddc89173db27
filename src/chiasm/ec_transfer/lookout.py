"""A thread that looks for what is awaited where nobody says when it comes, such as a file on a shared file system."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIN_SECONDS, MAX_SECONDS = 0.0005, 0.1
SHARE = 0.01
"""A name is looked for again after this share of the time for which it has been awaited, so looking delays it by no more."""
MAX_BUSY_SHARE = 0.1
"""Share of its time for which the thread looks in vain, however many names are awaited: it takes others' time to compute."""


@dataclass
class _Awaited:
    since: float
    due: float


class Lookout:
    """Calls ``look`` in a thread of its own, again and again, with the awaited names whose turn it is.

    A name is looked for at once, then after ``min_seconds`` and less often the longer it is awaited, until it is removed.
    The methods may be called from any thread, and from ``look``.
    """

    def __init__(self, look: Callable[[Sequence[str]], bool], *, name: str, min_seconds: float = MIN_SECONDS) -> None:
        """``look`` returns whether it found anything, and raises nothing. ``name`` is the thread's."""
        self._look = look
        self._min_seconds = min_seconds
        self._changed = threading.Condition()
        self._awaited: dict[str, _Awaited] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the look that it is at. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def add(self, name: str) -> None:
        """Await this name from now on, unless it is awaited already."""
        with self._changed:
            if name not in self._awaited:
                now = time.monotonic()
                self._awaited[name] = _Awaited(now, now)
                self._changed.notify()

    def remove(self, name: str) -> None:
        """Await this name no longer."""
        with self._changed:
            self._awaited.pop(name, None)

    def _run(self) -> None:
        while due := self._next():
            started = time.monotonic()
            found = self._look(due)
            ended = time.monotonic()
            with self._changed:
                for name in due:
                    awaited = self._awaited.get(name)
                    if awaited is not None:
                        awaited.due = ended + min(max(SHARE * (ended - awaited.since), self._min_seconds), MAX_SECONDS)
                if not found:
                    self._changed.wait_for(lambda: self._stopping, (ended - started) * (1 / MAX_BUSY_SHARE - 1))

    def _next(self) -> list[str]:
        """Wait until the turn of a name comes; return all names whose turn it is, none if the thread has to end."""
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                if due := [name for name, awaited in self._awaited.items() if awaited.due <= now]:
                    return due
                next_due = min((awaited.due for awaited in self._awaited.values()), default=None)
                self._changed.wait(None if next_due is None else next_due - now)
            return []
