"""The lines that requests leave in the log: one for each that fails, for each that asks for an answer, or for each at all.

Nothing that a client sent gets into a line except the method, the path without its query, a checked id and what an error
message quotes, and these are escaped and cut. Lines about failures are limited (``flood``), unless all requests
have one.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import NamedTuple

from chiasm.http.config import ALL, REQUESTS
from chiasm.http.flood import FloodLimit
from chiasm.http.log_format import fields
from chiasm.http.visit import Visit

CLIENT_LEFT = 499
"""The status under which a request is counted if its client left."""
GATHERED_SECONDS = 0.05
"""A line of a request that hasn't failed is written at most so long after its end."""
GATHERED_LINES = 32
"""So many are written without waiting: they take about half a millisecond, in which nothing else happens."""
_REASON_CHARACTERS = 300
_PATH_BYTES = 200
_UNNAMED = frozenset({"id", "method", "path", "reason"})
"""Values that have places of their own in a line for people."""
_PROBED_PATHS = (b"/health", b"/readyz")
_INPUTS = re.compile(r"""(?:['"]?\binput(?:_value)?['"]?\s*[:=]|\bnear ['"]).*""", re.DOTALL)
"""Where messages quote the request: those of validators, such as vLLM's, and about JSON."""
_DATA_URL = re.compile(r"data:[^\s'\"]{20,}")
_QUERY = re.compile(r"(https?://[^\s'\"?#]*)[?#][^\s'\"]*")
_logger = logging.getLogger("chiasm.requests")
_access = logging.getLogger("chiasm.access")


class _Ended(NamedTuple):
    """A request that has ended, and when: its line may be made later."""

    visit: Visit
    status: int
    at: float
    """Unix time."""
    seconds: float
    """Since its head came."""


class RequestLog:
    """Writes the lines of one server; on its event loop.

    What has failed is written at once. Lines of other requests wait for each other, up to ``GATHERED_SECONDS``: several in a
    row take the processor less time than each by itself, since what makes them is then in its caches.
    """

    def __init__(self, which: str) -> None:
        """``which`` of ``ACCESS_LOGS`` get a line; all do so whatever the level of the log."""
        self._which = which
        if which == ALL:
            _access.setLevel(logging.INFO)
        self._limit = FloodLimit(_logger)
        self._gathered: list[_Ended] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def note(self, visit: Visit) -> None:
        """Write what is to be written about a request that has ended, now or soon."""
        status = visit.status if visit.is_complete or (visit.status or 0) >= 400 else CLIENT_LEFT
        assert status is not None
        has_failed = status >= 400 or visit.ended_with_error
        is_measured = self._which == ALL or (self._which == REQUESTS and visit.asks_for_answer)
        if not (has_failed or is_measured):
            return
        is_access = self._which == ALL or not has_failed
        level = _level(visit, status) if has_failed else logging.INFO
        if is_access:
            level = max(level, logging.INFO)
        if not (_access if is_access else _logger).isEnabledFor(level):
            return
        ended = _Ended(visit, status, time.time(), time.monotonic() - visit.arrival)
        if not has_failed:
            self._gather(ended)
            return
        self._write_gathered()
        values = _values(ended)
        if is_measured:
            values |= _measured(ended)
        code, reason = ("client_left", "The client left.") if status == CLIENT_LEFT else visit.error
        values["code"] = _escaped(code)[:40] or "none"
        values["reason"] = _reason(reason)
        if is_access:
            _write(_access, level, values, ended.at)
        elif self._limit.admits(f"status={status} code={values['code']}"):
            _write(_logger, level, values, ended.at)

    def close(self) -> None:
        """Write what isn't written yet, and how many lines were left out; from now on each line is written at once."""
        self._is_closed = True
        self._write_gathered()
        self._limit.flush()

    def _gather(self, ended: _Ended) -> None:
        self._gathered.append(ended)
        if self._is_closed or len(self._gathered) >= GATHERED_LINES:
            self._write_gathered()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHERED_SECONDS, self._write_gathered)

    def _write_gathered(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gathered, self._gathered = self._gathered, []
        for ended in gathered:
            _write(_access, logging.INFO, _values(ended) | _measured(ended), ended.at)


def _write(logger: logging.Logger, level: int, values: dict[str, object], at: float) -> None:
    """Write the line of a request that ended ``at`` this Unix time."""
    record = logger.makeRecord(logger.name, level, "", 0, "%s", (_Line(values),), None, extra=fields(values))
    record.created, record.msecs = at, at % 1 * 1000
    logger.handle(record)


class _Line:
    """The values of a request as a person reads them. It becomes a text only if a handler asks for it."""

    def __init__(self, values: dict[str, object]) -> None:
        self._values = values

    def __str__(self) -> str:
        values = self._values
        words = [f"id={values['id']} {values['method']} {values['path']}"]
        words += [f"{name}={_shown(value)}" for name, value in values.items() if name not in _UNNAMED]
        line = " ".join(words)
        return f"{line}: {values['reason']}" if "reason" in values else line


def _values(ended: _Ended) -> dict[str, object]:
    visit = ended.visit
    values: dict[str, object] = {
        "id": visit.request_id,
        "method": visit.method,
        "path": _escaped(visit.raw_path[:_PATH_BYTES].decode("latin-1")),
        "status": ended.status,
    }
    if visit.key is not None and visit.key.name:
        values["key"] = visit.key.name
    return values | visit.details


def _measured(ended: _Ended) -> dict[str, object]:
    """Return how much there was, and how long it took: in seconds all of it, in milliseconds the stages."""
    visit = ended.visit
    values: dict[str, object] = {f"{name}_tokens": count for name, count in visit.tokens.items()}
    values["seconds"] = round(ended.seconds, 3)
    if visit.first_at is not None:
        values["first_ms"] = _milliseconds(visit.first_at - visit.arrival)
    return values | {f"{name}_ms": _milliseconds(seconds) for name, seconds in visit.stages().items()}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _level(visit: Visit, status: int) -> int:
    if status == 503 and visit.raw_path in _PROBED_PATHS:
        return logging.DEBUG  # asked several times a second, until all is well
    return logging.WARNING if status >= 500 or visit.ended_with_error else logging.INFO


def _reason(text: str) -> str:
    """Return an error message without what it may quote of prompts, images and signed URLs."""
    text = _QUERY.sub(r"\1?…", _DATA_URL.sub("data:…", _INPUTS.sub("…", text[: 10 * _REASON_CHARACTERS])))
    return _escaped(text[:_REASON_CHARACTERS]) or "no reason was given"


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _escaped(text: str) -> str:
    """Return text that stays on its line and changes no terminal."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
