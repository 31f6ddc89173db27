"""Server-sent events: writing them, and splitting a stream of bytes into whole ones."""

from __future__ import annotations

from chiasm.wire import NAMED_EVENT_PATHS

CONTENT_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
"""Ends a successful stream of the OpenAI API."""
ENDS = (DONE, b"data: [DONE]\r\n\r\n")
"""The same as servers write it."""
MAX_EVENT_BYTES = 16 << 20
"""A longer event is passed on in pieces."""

_END = b"\n\n"
_END_CRLF = b"\r\n\r\n"


def event(data: bytes) -> bytes:
    """Return one event; ``data`` holds no newline, which JSON escapes."""
    return b"data: " + data + _END


def error_event(body: bytes, path: str) -> bytes:
    """Return the event with which a stream of ``path`` ends if it fails; ``body`` is that of an answer with the error."""
    return (b"event: error\n" if path in NAMED_EVENT_PATHS else b"") + event(body)


def comment(name: str, text: str) -> bytes:
    """Return a comment, which clients ignore, in an event of its own."""
    return f": {name} {text}\n\n".encode()


def comment_line(name: str, text: str) -> bytes:
    """Return a comment that stands at the head of the event that follows."""
    return f": {name} {text}\n".encode()


class EventSplitter:
    """Holds back an event until all of it has arrived."""

    def __init__(self) -> None:
        self._held = bytearray()

    def take(self, chunk: bytes) -> bytes:
        """Return the whole events that have arrived with ``chunk``; may be empty."""
        held = self._held
        if not held and chunk.endswith(_END):  # as nearly always
            return chunk
        searched = max(0, len(held) - len(_END_CRLF) + 1)
        held += chunk
        cut = _end_of_events(held, searched)
        if not cut and len(held) > MAX_EVENT_BYTES:
            cut = len(held)
        whole = bytes(held[:cut])
        del held[:cut]
        return whole

    def rest(self) -> bytes:
        """Return what is held back, and forget it."""
        rest = bytes(self._held)
        self._held.clear()
        return rest


def _end_of_events(data: bytearray, start: int) -> int:
    """Return the length of the part of ``data`` that is whole events; none ends before ``start``."""
    return max(at + len(end) if (at := data.rfind(end, start)) >= 0 else 0 for end in (_END, _END_CRLF))
