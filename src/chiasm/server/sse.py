"""Server-sent events: framing."""

from __future__ import annotations

CONTENT_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
"""Ends a stream that went well, as OpenAI has it."""


def event(data: bytes) -> bytes:
    """One event; ``data`` holds no newline, which JSON escapes."""
    return b"data: " + data + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients pass over."""
    return b": " + text.encode() + b"\n\n"


def comment_line(text: str) -> bytes:
    """The same at the head of an event."""
    return b": " + text.encode() + b"\n"
