"""How long the stages of a request took, for its line in the log and its record. Where they are in time, ``spans`` tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from chiasm.http.timing import read_timing
from chiasm.http.visit import Visit
from chiasm.proxy.records.trail import Trail

_BEFORE_TOKEN = ("queue", "wait", "prefill")


def stages_at_end(own: Mapping[str, float], trail: Trail, visit: Visit) -> Callable[[], dict[str, float]]:
    """Return what tells the seconds of each stage of a request whose answer ends now; most requests are never asked.

    ``own`` are the proxy's stages. Of language instances there are the stages up to the first token that they tell, and
    ``decode`` from it to now. Each is the sum over all instances that answered: with P and D apart both have a queue. What
    isn't known is left out.
    """
    streamed_since = visit.first_at if visit.is_stream else None
    decode_seconds = None if streamed_since is None else time.monotonic() - streamed_since
    return partial(_summed, own, trail, decode_seconds)


def _summed(own: Mapping[str, float], trail: Trail, decode_seconds: float | None) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, seconds in _told(trail):
        sums[name] = sums.get(name, 0.0) + seconds
    if decode_seconds is not None:
        sums["decode"] = decode_seconds
    return {**own, **sums}


def _told(trail: Trail) -> Iterator[tuple[str, float]]:
    for call in trail.calls:
        told = {entry.name: entry.seconds for entry in read_timing(call.timing) if entry.seconds is not None}
        yield from ((name, told[name]) for name in _BEFORE_TOKEN if name in told)
        if "total" in told and "ttft" in told:
            yield "decode", max(0.0, told["total"] - told["ttft"])
