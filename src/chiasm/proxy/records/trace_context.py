"""W3C Trace Context: the headers by which a request says to which trace it belongs, and by which instances are told.

What a client sends is checked. A ``traceparent`` that isn't well-formed is left out together with its ``tracestate``; a
``tracestate`` that isn't is left out alone. Neither makes a request fail (https://www.w3.org/TR/trace-context/).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from starlette.datastructures import Headers

MAX_STATE_CHARACTERS = 4096
MAX_STATE_MEMBERS = 32
SAMPLED = 1
_KNOWN_FLAGS = 3
"""Sampled, and that the trace's id is random."""
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.{0,200})?")
_MEMBER = re.compile(
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


class TraceContext(NamedTuple):
    """A span of a trace, as others are told of it. Neither id is 0."""

    trace_id: int
    """128 bits."""
    span_id: int
    """64 bits."""
    flags: int
    state: str = ""
    """``tracestate``: what tracing systems tell each other."""

    @property
    def is_sampled(self) -> bool:
        """Whether the span is recorded, so that those below it should be too."""
        return bool(self.flags & SAMPLED)

    @property
    def trace_id_text(self) -> str:
        """32 hex digits."""
        return f"{self.trace_id:032x}"

    def headers(self) -> dict[str, str]:
        """Return the headers for those whose spans are below this one."""
        parent = {"traceparent": f"00-{self.trace_id_text}-{self.span_id:016x}-{self.flags:02x}"}
        return parent | ({"tracestate": self.state} if self.state else {})


def read_trace_context(headers: Headers) -> TraceContext | None:
    """Return the span that a client names as the parent of its request; None if it names none, or not in the right form."""
    given = headers.get("traceparent")
    if given is None or len(headers.getlist("traceparent")) > 1:
        return None
    parent = _PARENT.fullmatch(given.strip(" \t"))
    if parent is None:
        return None
    version, trace_id, span_id, flags = parent[1], int(parent[2], 16), int(parent[3], 16), int(parent[4], 16)
    if version == "ff" or (version == "00" and parent[5]) or not trace_id or not span_id:
        return None
    return TraceContext(trace_id, span_id, flags & _KNOWN_FLAGS, _read_state(headers.getlist("tracestate")))


def _read_state(fields: list[str]) -> str:
    """Return the header, which may come in several fields; empty if it isn't well-formed or too long."""
    if not fields or sum(map(len, fields)) > MAX_STATE_CHARACTERS:
        return ""
    members = [member for field in fields for one in field.split(",") if (member := one.strip(" \t"))]
    if len(members) > MAX_STATE_MEMBERS or not all(map(_MEMBER.fullmatch, members)):
        return ""
    keys = {member.partition("=")[0] for member in members}
    return ",".join(members) if len(keys) == len(members) else ""
