"""HTTP/1 as clients speak it: uvicorn's protocol, mended where it loses or garbles what clients send and expect.

- A request that offers to switch to another protocol, as Java's client offers HTTP/2 with every request, is answered as if it
  had not offered anything. uvicorn would take its body for the other protocol and lose it.
- A client that speaks HTTP/1.0 doesn't know chunks: it gets an answer of unknown length as it is, up to the end of the
  connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OFFER = (b"upgrade", b"http2-settings")
"""Headers that offer another protocol."""


class Http1(HttpToolsProtocol):
    """A connection over which requests come one after the other."""

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        self._read(data)

    def _read(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if not self._is_tunnel():
                self._begin_again(data[offer.args[0] :])
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)

    def on_headers_complete(self) -> None:
        """Begin with a request, unless it has to be read again without its offer."""
        if not self.is_offered():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End the body of the request."""
        if not self.is_offered():
            super().on_message_complete()

    def is_offered(self) -> bool:
        """Whether the request at hand offers another protocol, so that it is read again without its offer."""
        return self.parser.should_upgrade() and not self._is_tunnel()

    def _is_tunnel(self) -> bool:
        """Whether the method is CONNECT: what comes behind its head is no request."""
        return self.parser.get_method() == b"CONNECT"

    def _begin_again(self, rest: bytes) -> None:
        """Read the head that has just been read once more, without its offer, and then what comes behind it."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            kept = value
            if name == b"connection":
                options = (option.strip() for option in value.split(b","))
                kept = b", ".join(option for option in options if option.lower() not in _OFFER)
            if name not in _OFFER and (kept or not value):
                lines.append(b"%b: %b" % (name, kept))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._read(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _unchunked(cast("ASGIApp", app), cycle)
        super()._start_asgi_task(cycle, app)


def _unchunked(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """Return the application for a client that takes the end of the connection for the end of an answer without a length."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = False

        async def framed(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not has_length:
                    cycle.chunked_encoding = False
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, framed)

    return run
