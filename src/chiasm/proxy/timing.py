"""Where a request's time went, as ``Server-Timing`` has it (milliseconds)."""

from __future__ import annotations

import re

_ENTRY = re.compile(r"^\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)((?:\s*;[^,\r\n]*)?)\s*$")
_DURATION = re.compile(r";\s*dur=\"?([0-9.]+)")
_MAX_UPSTREAM_CHARACTERS = 4096


class Timing:
    """The proxy's own figures of one request, in seconds; None while unknown.

    ``fetch`` is the wall time in which media came over the network, ``encode`` what the slowest encoder says of its own
    work, ``encode_call`` the wall time until the last encoder answered, ``prefill_call`` the wall time until P answered,
    ``handover`` from P's last byte to D's head, which in a stream comes with D's first token, ``proxy`` what the proxy itself
    took.
    """

    def __init__(self) -> None:
        self.fetch: float | None = None
        self.encode: float | None = None
        self.encode_call: float | None = None
        self.prefill_call: float | None = None
        self.handover: float | None = None
        self.proxy: float | None = None

    def entries(self) -> str:
        named = (
            ("fetch", self.fetch),
            ("encode", self.encode),
            ("encode_call", self.encode_call),
            ("prefill_call", self.prefill_call),
            ("handover", self.handover),
            ("proxy", self.proxy),
        )
        return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in named if seconds is not None)

    def header(self, upstream: str | None) -> str:
        """The header's value: the proxy's entries, then those of the instance that answered."""
        return ", ".join(part for part in (self.entries(), _clean(upstream)) if part)

    def comment(self) -> bytes:
        """The same as a comment line for a stream."""
        return f": server-timing {self.entries()}\n\n".encode()


def duration_seconds(header: str | None, name: str) -> float | None:
    """The ``dur`` of one entry of a Server-Timing header."""
    for entry in (header or "").split(","):
        if entry.strip().partition(";")[0].strip() == name and (match := _DURATION.search(entry)):
            try:
                return float(match[1]) / 1000
            except ValueError:
                return None
    return None


def _clean(upstream: str | None) -> str:
    if not upstream or len(upstream) > _MAX_UPSTREAM_CHARACTERS:
        return ""
    return ", ".join(entry.strip() for entry in upstream.split(",") if _ENTRY.match(entry))
