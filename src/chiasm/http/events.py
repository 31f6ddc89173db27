"""Server-sent events: writing them, and splitting a stream of bytes into whole ones."""

from __future__ import annotations

CONTENT_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
"""Ends a successful stream of the OpenAI API."""
MAX_EVENT_BYTES = 16 << 20
"""A longer event is passed on in pieces."""

_END = b"\n\n"
_END_CRLF = b"\r\n\r\n"


def event(data: bytes) -> bytes:
    """Return one event; ``data`` holds no newline, which JSON escapes."""
    return b"data: " + data + _END


def comment(name: str, text: str) -> bytes:
    """Return a comment, which clients ignore, in an event of its own."""
    return f": {name} {text}\n\n".encode()


def comment_line(name: str, text: str) -> bytes:
    """Return a comment that stands at the head of the event that follows."""
    return f": {name} {text}\n".encode()


class EventSplitter:
    """Holds back an event until all of it has arrived."""

    def __init__(self) -> None:
        self._held = b""

    def take(self, chunk: bytes) -> bytes:
        """Return the whole events that have arrived with ``chunk``; may be empty."""
        if not self._held and chunk.endswith(_END):  # as nearly always
            return chunk
        data = self._held + chunk
        cut = end_of_events(data)
        if not cut and len(data) > MAX_EVENT_BYTES:
            cut = len(data)
        self._held = data[cut:]
        return data[:cut]

    def rest(self) -> bytes:
        """Return what is held back, and forget it."""
        rest, self._held = self._held, b""
        return rest


def end_of_events(data: bytes) -> int:
    """Return the length of the part of ``data`` that is whole events."""
    plain = data.rfind(_END)
    with_returns = data.rfind(_END_CRLF)
    return max(plain + len(_END) if plain >= 0 else 0, with_returns + len(_END_CRLF) if with_returns >= 0 else 0)
