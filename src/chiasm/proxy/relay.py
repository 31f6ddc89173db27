"""A stream of server-sent events, from an instance to the client, as raw bytes.

Only whole events go out, so that when the instance breaks off, the error event stands by itself and what came before
stays readable. Nothing is parsed; the one event that is looked for is the last.
"""

from __future__ import annotations

import msgspec

from chiasm.errors import ChiasmError
from chiasm.proxy.timing import Timing

_END = b"\n\n"
_END_CRLF = b"\r\n\r\n"
_DONE = (b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n")
_MAX_HELD_BYTES = 16 << 20


class EventRelay:
    """What of the received bytes may be sent now."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._held = b""
        self._announced = False

    def pass_on(self, chunk: bytes) -> bytes:
        """The whole events that are there with ``chunk``; before the last one comes a comment with the proxy's figures."""
        data = self._held + chunk if self._held else chunk
        cut = _end_of_events(data)
        if not cut and len(data) > _MAX_HELD_BYTES:
            cut = len(data)  # whatever this is, it isn't held any longer
        self._held = data[cut:]
        events = data[:cut]
        for done in _DONE:
            if events.endswith(done) and not self._announced:
                self._announced = True
                return events[: -len(done)] + self._timing.comment() + done
        return events

    def finish(self) -> bytes:
        """What is left when the instance has ended the stream as it should."""
        rest, self._held = self._held, b""
        if self._announced:
            return rest
        self._announced = True
        return rest + (_END if rest else b"") + self._timing.comment()

    def fail(self, error: ChiasmError) -> bytes:
        """The error event that ends a stream; an event that was cut off before it is dropped."""
        self._held = b""
        return b"data: " + error_body(error) + _END


def _end_of_events(data: bytes) -> int:
    """The length of the part of ``data`` that is whole events."""
    plain = data.rfind(_END)
    with_returns = data.rfind(_END_CRLF)
    return max(plain + len(_END) if plain >= 0 else 0, with_returns + len(_END_CRLF) if with_returns >= 0 else 0)


def error_body(error: ChiasmError) -> bytes:
    """An error as the OpenAI API shows it."""
    shown = {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": shown})
