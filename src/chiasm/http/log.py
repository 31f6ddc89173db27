"""The lines that requests leave in the log: one for each that fails, and one for each at all if there is an access log.

Nothing that a client sent gets into a line except the method, the path without its query, a checked id and what an error
message quotes, and these are escaped and cut. Lines about failures are limited (``flood``).
"""

from __future__ import annotations

import logging
import re
import time

from chiasm.http.flood import FloodLimit
from chiasm.http.visit import Visit

CLIENT_LEFT = 499
"""The status under which a request is counted if its client left."""
_REASON_CHARACTERS = 300
_PATH_BYTES = 200
_PROBED_PATHS = (b"/health", b"/readyz")
_INPUTS = re.compile(r"""(?:['"]?\binput(?:_value)?['"]?\s*[:=]|\bnear ['"]).*""", re.DOTALL)
"""Where messages quote the request: those of validators, such as vLLM's, and about JSON."""
_DATA_URL = re.compile(r"data:[^\s'\"]{20,}")
_QUERY = re.compile(r"(https?://[^\s'\"?#]*)[?#][^\s'\"]*")
_logger = logging.getLogger("chiasm.requests")
_access = logging.getLogger("chiasm.access")


class RequestLog:
    """Writes the lines of one server; on its event loop."""

    def __init__(self, *, access: bool) -> None:
        """``access``: whether each request gets a line, whatever the level of the log."""
        self._access = access
        if access:
            _access.setLevel(logging.INFO)
        self._limit = FloodLimit(_logger)

    @property
    def is_access_log(self) -> bool:
        """Whether each request gets a line."""
        return self._access

    def note(self, visit: Visit) -> None:
        """Write what is to be written about a request that has ended."""
        status = visit.status if visit.is_complete or (visit.status or 0) >= 400 else CLIENT_LEFT
        assert status is not None
        named = f"id={visit.request_id} {visit.method} {_shown(visit.raw_path)} status={status}"
        if self._access:
            tokens = "".join(f" {name}_tokens={count}" for name, count in visit.tokens.items())
            _access.info("%s seconds=%.3f%s", named, time.monotonic() - visit.arrival, tokens)
        if status < 400 and not visit.ended_with_error:
            return
        level = _level(visit, status)
        if not _logger.isEnabledFor(level):
            return
        code, reason = ("client_left", "The client left.") if status == CLIENT_LEFT else visit.error
        code = _escaped(code)[:40] or "none"
        if self._limit.admits(f"status={status} code={code}"):
            _logger.log(level, "%s code=%s: %s", named, code, _reason(reason))

    def flush(self) -> None:
        """Write how many lines were left out, if any were."""
        self._limit.flush()


def _level(visit: Visit, status: int) -> int:
    if status == 503 and visit.raw_path in _PROBED_PATHS:
        return logging.DEBUG  # asked several times a second, until all is well
    return logging.WARNING if status >= 500 or visit.ended_with_error else logging.INFO


def _reason(text: str) -> str:
    """Return an error message without what it may quote of prompts, images and signed URLs."""
    text = _QUERY.sub(r"\1?…", _DATA_URL.sub("data:…", _INPUTS.sub("…", text[: 10 * _REASON_CHARACTERS])))
    return _escaped(text[:_REASON_CHARACTERS]) or "no reason was given"


def _shown(path: bytes) -> str:
    return _escaped(path[:_PATH_BYTES].decode("latin-1"))


def _escaped(text: str) -> str:
    """Return text that stays on its line and changes no terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
