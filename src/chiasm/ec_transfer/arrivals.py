"""Brings in what requests want from where nobody tells when it comes: a thread of its own looks for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from chiasm.ec_transfer.intake import Intake, Stage, Wanted
from chiasm.ec_transfer.lookout import Lookout
from chiasm.ec_transfer.wake import Wake

_logger = logging.getLogger(__name__)
_Found = TypeVar("_Found")
_Ready = TypeVar("_Ready")


class Arrivals(Generic[_Found, _Ready]):
    """Brings what is wanted into memory, at most ``max_bytes`` and ``max_count`` entries, and calls ``wake`` for each.

    What comes first, and what makes way for it, is said in ``intake``. The methods belong to the thread that schedules.
    """

    def __init__(
        self,
        find: Callable[[str], tuple[_Found, int] | None],
        bring: Callable[[str, _Found], _Ready | None],
        wake: Wake,
        *,
        max_bytes: int,
        max_count: int,
    ) -> None:
        """All three are called in the thread.

        ``find`` takes microseconds, and returns an entry, unread, with its size in bytes; None if it isn't there. ``bring``
        returns it in memory, verified and ready for use; None if it turns out to be unusable.
        """
        self._find = find
        self._ready_of = bring
        self._wake = wake
        self._lock = threading.Lock()
        self._intake: Intake[Wanted[_Ready], _Ready] = Intake(
            Wanted, lambda wanted: self._lookout.add(wanted.identifier), max_bytes=max_bytes, max_count=max_count
        )
        self._lookout = Lookout(self._look, name="chiasm-arrivals")

    def stop(self) -> None:
        """End the thread and let go of what is here. Idempotent."""
        self._lookout.stop()
        self._intake.clear()

    def want(self, request_id: str, identifier: str, max_rows: int, *, is_needed: bool) -> None:
        """Bring an entry for a request: at once if ``is_needed``, or when the scheduler asks for it."""
        with self._lock:
            self._intake.want(request_id, identifier, max_rows, is_needed=is_needed)

    def is_wanted(self, identifier: str) -> bool:
        """Whether a request wants the entry."""
        return self._intake.get(identifier) is not None

    def ask(self, identifier: str) -> bool:
        """Return whether a wanted entry is here; it then stays until ``end_round``. What is asked for first is needed first."""
        with self._lock:
            is_ready = self._intake.ask(identifier)
            if not is_ready:
                self._lookout.add(identifier)  # it could not be loaded, and is looked for once more
            return is_ready

    def ready(self, identifier: str) -> _Ready | None:
        """Return an entry that is here. May be called from any thread."""
        return self._intake.ready(identifier)

    def take(self, identifier: str) -> _Ready | None:
        """Return an entry that is here, and keep it no longer."""
        with self._lock:
            return self._intake.take(identifier)

    def discard(self, identifier: str) -> None:
        """What has come is of no use; look for another one."""
        with self._lock:
            wanted = self._intake.get(identifier)
            if wanted is not None and wanted.stage in (Stage.READY, Stage.IDLE):
                self._intake.wait(wanted)

    def end_round(self) -> None:
        """End the order in which the scheduler has asked, and the promises that it got."""
        with self._lock:
            self._intake.end_round()

    def finish(self, request_id: str, identifiers: Iterable[str]) -> None:
        """Keep and look for nothing that only this request wanted."""
        with self._lock:
            for wanted in self._intake.finish(request_id, identifiers):
                self._lookout.remove(wanted.identifier)

    # ---- the thread -----------------------------------------------------------------------------------------------------

    def _look(self, identifiers: Sequence[str]) -> bool:
        with self._lock:
            due = set(identifiers)
            waiting = [wanted for wanted in self._intake.in_order(Stage.WAITING) if wanted.identifier in due]
        return sum(map(self._bring, waiting)) > 0

    def _bring(self, wanted: Wanted[_Ready]) -> bool:
        """Bring an entry if it is there and there is room. Return whether it is here."""
        identifier, ready, failed = wanted.identifier, None, False
        found = self._find(identifier)
        with self._lock:
            if found is None or not wanted.requests or not self._intake.reserve(wanted, found[1]):
                return False
            self._intake.come(wanted, found[1])
        try:
            ready = self._ready_of(identifier, found[0])
        except Exception:  # it costs the requests that want this entry, and nobody else
            _logger.exception("The embedding of item %s cannot be loaded.", identifier)
            failed = True
        with self._lock:
            is_wanted = self._intake.fail(wanted) if ready is None else self._intake.arrive(wanted, ready)
            if ready is not None or failed or not is_wanted:
                self._lookout.remove(identifier)
        if ready is not None and is_wanted:
            self._wake(identifier)
        return ready is not None
