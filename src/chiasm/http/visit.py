"""One request as the front door sees it: what it is called, what it asks of any answer, and what became of it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
from starlette.datastructures import Headers
from starlette.types import Message, Scope

from chiasm.http.fields import Fields
from chiasm.wire import UNREADABLE, ErrorBody

if TYPE_CHECKING:
    from chiasm.http.key_ring import KeyHolder

_KEY = "chiasm.visit"
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_ERROR_EVENT = re.compile(rb'(?:^|\n)data: ?(\{\s*(?:"type": ?"error", ?)?"error"[^\n]*)')
"""In a stream of messages, vLLM writes the type first."""
_TOKENS = re.compile(rb'"(prompt|completion)_tokens": ?(\d{1,12})')
_TOLD_TOKENS = re.compile(rb'\b(prompt|completion)_tokens;desc="(\d{1,12})"')
"""As instances tell them with their timing; JSON's strings have no such quotes."""
_KEPT_BYTES = 4096
_FIRST_ERROR = 400
_error = msgspec.json.Decoder(ErrorBody)


class Visit:
    """One request, from its head to the last byte of its answer."""

    def __init__(self, scope: Scope, *, timing_comments: bool = True) -> None:
        """``timing_comments`` is what holds unless the request says something else."""
        headers: Headers = Fields(scope)
        self.headers = headers
        given = headers.get("x-request-id", "")
        self.arrival = time.monotonic()
        self.method: str = scope["method"]
        self.raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
        """Without a query; percent-encoded as the client wrote it."""
        self.request_id = given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        """The client's, if it is harmless."""
        wanted = headers.get("x-timing-comments", "").lower()
        self.timing_comments = wanted == "on" if wanted in ("on", "off") else timing_comments
        """Whether a stream may contain comments with timing."""
        self.key: KeyHolder | None = None
        """Whose API key it has; None if the server needs none for it."""
        self.status: int | None = None
        """Status of the answer, once it has begun."""
        self.is_complete = False
        """Whether the last byte of the answer was sent."""
        self.ended_with_error = False
        """Whether a stream ended with an error event."""
        self.first_at: float | None = None
        """When the first bytes of an answer without an error went out, on the clock of ``time.monotonic``."""
        self.details: dict[str, object] = {}
        """What whoever answers tells about it: the model, the number of images, the instances. Nothing that a client wrote."""
        self.stages: Callable[[], Mapping[str, float]] = dict
        """Returns the seconds that stages of the answer took, as far as whoever answers tells them. Called only if somebody
        wants to know."""
        self.asks_for_answer = False
        """Whether it is for an endpoint that works for it, and not for a page."""
        self.tokens: dict[str, int] = {}
        """Tokens of ``prompt`` and ``completion``, as far as they are known."""
        self.is_stream = False
        """Whether the answer is a stream of events."""
        self._error = b""

    def note(self, message: Message) -> None:
        """Take what is sent to the client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            for name, value in message["headers"]:
                if name == b"content-type":
                    self.is_stream = value.startswith(b"text/event-stream")
                elif name == b"server-timing":
                    self._count(_TOLD_TOKENS.findall(value))
            return
        body: bytes = message.get("body", b"")
        if self.status is not None and self.status >= _FIRST_ERROR:
            self._error += body[: _KEPT_BYTES - len(self._error)]
            return
        if body and self.first_at is None:
            self.first_at = time.monotonic()
        if self.is_stream and b'"error"' in body and (found := _ERROR_EVENT.search(body)):
            self.ended_with_error = True
            self._error = found[1][:_KEPT_BYTES]
        if (at := body.rfind(b'"usage"')) >= 0:
            self._count(_TOKENS.findall(body, at))
        elif self.is_stream and b"_tokens;desc=" in body:
            self._count(_TOLD_TOKENS.findall(body))

    def _count(self, found: Iterable[tuple[bytes, bytes]]) -> None:
        for name, count in found:
            self.tokens[name.decode()] = int(count)

    @property
    def has_failed(self) -> bool:
        """Whether the client got an error."""
        return self.ended_with_error or (self.status is not None and self.status >= _FIRST_ERROR)

    @property
    def error(self) -> tuple[str, str]:
        """Code and message of the error that was sent; of one that isn't JSON of OpenAI's shape, the text itself."""
        try:
            detail = _error.decode(self._error).error
        except UNREADABLE:
            return "", self._error.decode("utf-8", "replace")
        return str(detail.code or detail.type or ""), detail.message


def visit_of(scope: Scope) -> Visit:
    """Return the visit that the front door noted in the scope, or a new one if there was no front door."""
    visit: Visit = scope.get(_KEY) or scope.setdefault(_KEY, Visit(scope))
    return visit


def with_visit(scope: Scope, visit: Visit, path: str) -> Scope:
    """Return the scope of a request with its visit, and with another path."""
    return {**scope, _KEY: visit, "path": path}
