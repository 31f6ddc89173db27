"""What the engine's thread is told between two steps: by the event loop, by connectors, and by its own encoder."""

from __future__ import annotations

import asyncio
import enum
import queue
from collections.abc import Iterator
from typing import NamedTuple

from chiasm.engine.request_state import RequestState

MAX_TAKEN = 16
"""Messages between two steps: running streams wait while they are handled."""


class Abort(NamedTuple):
    """Nobody waits for the request any more."""

    request_id: str


class Question(NamedTuple):
    """Asks which embeddings are wanted and not in memory."""

    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[list[str]]


class GiveBack(NamedTuple):
    """No decode instance will come for what is held under these leases."""

    leases: frozenset[str]


class Arrival(NamedTuple):
    """An embedding has arrived."""

    identifier: str


class Signal(enum.Enum):
    """What needs no further words."""

    STOP = enum.auto()
    WAKE = enum.auto()
    """A KV transfer has ended."""
    ITEM = enum.auto()
    """Any embedding has arrived, was lost, or was made here."""


Message = RequestState | Abort | Question | GiveBack | Arrival | Signal


class Inbox:
    """Messages in order. Any thread puts them in; the engine's thread takes them out, a few at a time."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def put(self, message: Message) -> None:
        """Add a message, and wake the engine if it sleeps."""
        self._messages.put(message)

    def take(self, seconds: float | None) -> Iterator[Message]:
        """Yield what is there, at most ``MAX_TAKEN``; wait so long for the first, or without end if ``seconds`` is None."""
        for number in range(MAX_TAKEN):
            try:
                yield self._messages.get(timeout=seconds) if number == 0 else self._messages.get_nowait()
            except queue.Empty:
                return
