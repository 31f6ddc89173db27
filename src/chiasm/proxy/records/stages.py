"""How long the stages at language instances took, for a request's line in the log. Where they are in time, ``spans`` tells."""

from __future__ import annotations

import time
from collections.abc import Iterator

from chiasm.http.timing import read_timing
from chiasm.http.visit import Visit
from chiasm.proxy.records.trail import Trail

_BEFORE_TOKEN = ("queue", "wait", "prefill")


def language_stages(trail: Trail, visit: Visit) -> dict[str, float]:
    """Return the seconds up to the first token that instances tell, and those from it to now, when the answer has ended.

    Each is the sum over all instances that answered: with P and D apart both have a queue. What isn't known is left out.
    """
    sums: dict[str, float] = {}
    for name, seconds in _told(trail):
        sums[name] = sums.get(name, 0.0) + seconds
    if visit.is_stream and visit.first_at is not None:
        sums["decode"] = time.monotonic() - visit.first_at
    return sums


def _told(trail: Trail) -> Iterator[tuple[str, float]]:
    for call in trail.calls:
        told = {entry.name: entry.seconds for entry in read_timing(call.timing) if entry.seconds is not None}
        yield from ((name, told[name]) for name in _BEFORE_TOKEN if name in told)
        if "total" in told and "ttft" in told:
            yield "decode", max(0.0, told["total"] - told["ttft"])
