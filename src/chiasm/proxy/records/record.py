"""What is kept of a request that has ended. It has no prompt, no answer and no URL of an image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from chiasm.http import Exchange
from chiasm.http.log import CLIENT_LEFT
from chiasm.proxy.records.trail import Trail

_CODE_CHARACTERS = 40


@dataclass(slots=True)
class Record:
    """One request. Its values are those of its line in the log, from the same source, and its trail."""

    id: str
    path: str
    """Of the route."""
    key: str
    """The name of its API key; empty if it has none."""
    status: int
    """499: the client left."""
    details: Mapping[str, object]
    """The model, the number of images and the instances, as far as they are known."""
    stages: Callable[[], Mapping[str, float]]
    """Returns seconds: those of the proxy, as in ``Server-Timing``, and those of language instances."""
    tokens: Mapping[str, int]
    arrived: float
    """Unix time."""
    arrival: float
    """The same on the clock of ``time.monotonic``, as all of the trail."""
    first_at: float | None
    """When the first bytes of an answer without an error went out."""
    ended_at: float
    trail: Trail
    error: str = ""
    """Code of the error that the client got, also at the end of a stream; empty without one."""
    is_stream: bool = False
    """Whether the answer was a stream."""

    @property
    def seconds(self) -> float:
        """From the request's head to the end of its answer."""
        return self.ended_at - self.arrival


def record_of(exchange: Exchange, path: str, trail: Trail) -> Record:
    """Return the record of a request that ends now."""
    visit, now = exchange.visit, time.monotonic()
    return Record(
        id=visit.request_id,
        path=path,
        key=visit.key.name if visit.key is not None else "",
        status=exchange.status or 0,
        details=visit.details,
        stages=visit.stages,
        tokens=visit.tokens,
        arrived=time.time() - (now - visit.arrival),
        arrival=visit.arrival,
        first_at=visit.first_at,
        ended_at=now,
        trail=trail,
        error=_error_of(exchange),
        is_stream=visit.is_stream,
    )


def _error_of(exchange: Exchange) -> str:
    if exchange.status == CLIENT_LEFT:
        return "client_left"
    return exchange.visit.error[0][:_CODE_CHARACTERS] if exchange.visit.has_failed else ""
