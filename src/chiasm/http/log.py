"""The lines that requests leave in the log: one for each that fails, for each that asks for an answer, or for each at all.

Nothing that a client sent gets into a line except the method, the path without its query, a checked id and what an error
message quotes, and these are escaped and cut. Lines about failures are limited (``flood``), unless all requests
have one.
"""

from __future__ import annotations

import logging
import re
import time

from chiasm.http.config import ALL, REQUESTS
from chiasm.http.flood import FloodLimit
from chiasm.http.log_format import fields
from chiasm.http.visit import Visit

CLIENT_LEFT = 499
"""The status under which a request is counted if its client left."""
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


class RequestLog:
    """Writes the lines of one server; on its event loop."""

    def __init__(self, which: str) -> None:
        """``which`` of ``ACCESS_LOGS`` get a line; all do so whatever the level of the log."""
        self._which = which
        if which == ALL:
            _access.setLevel(logging.INFO)
        self._limit = FloodLimit(_logger)

    def note(self, visit: Visit) -> None:
        """Write what is to be written about a request that has ended."""
        status = visit.status if visit.is_complete or (visit.status or 0) >= 400 else CLIENT_LEFT
        assert status is not None
        has_failed = status >= 400 or visit.ended_with_error
        level = _level(visit, status) if has_failed else logging.INFO
        is_measured = self._which == ALL or (self._which == REQUESTS and visit.asks_for_answer)
        is_access = self._which == ALL or (is_measured and not has_failed)
        if is_access:
            level = max(level, logging.INFO)
        if not (is_access or has_failed) or not (_access if is_access else _logger).isEnabledFor(level):
            return
        values = _values(visit, status)
        if is_measured:
            values |= _measured(visit)
        if has_failed:
            code, reason = ("client_left", "The client left.") if status == CLIENT_LEFT else visit.error
            values["code"] = _escaped(code)[:40] or "none"
            values["reason"] = _reason(reason)
        if is_access:
            _access.log(level, "%s", _Line(values), extra=fields(values))
        elif self._limit.admits(f"status={status} code={values['code']}"):
            _logger.log(level, "%s", _Line(values), extra=fields(values))

    def flush(self) -> None:
        """Write how many lines were left out, if any were."""
        self._limit.flush()


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


def _values(visit: Visit, status: int) -> dict[str, object]:
    values: dict[str, object] = {
        "id": visit.request_id,
        "method": visit.method,
        "path": _escaped(visit.raw_path[:_PATH_BYTES].decode("latin-1")),
        "status": status,
    }
    if visit.key is not None and visit.key.name:
        values["key"] = visit.key.name
    return values | visit.details


def _measured(visit: Visit) -> dict[str, object]:
    """Return how much there was, and how long it took: in seconds all of it, in milliseconds the stages."""
    values: dict[str, object] = {f"{name}_tokens": count for name, count in visit.tokens.items()}
    values["seconds"] = round(time.monotonic() - visit.arrival, 3)
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
