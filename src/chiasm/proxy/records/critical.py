"""The critical path: what the first token waited for, at each instant."""

from __future__ import annotations

from collections.abc import Sequence

from chiasm.proxy.records.spans import PROXY, Span, Timeline

_TOLERANCE_SECONDS = 0.0003
_TOLERANCE = 0.01
"""Of the time to the first token: so far apart are instants that two instances tell of one event."""


def critical_path(timeline: Timeline) -> list[Span]:
    """Return the pieces of spans on which the time to the first token (without one, to the end) depends, in order.

    It goes back from the first token. From a wait it goes on with the work that ended when the wait ended; from the beginning
    of other work, with what ended there, first of all about the same image.
    """
    end = timeline.end if timeline.first_token is None else timeline.first_token
    near = max(_TOLERANCE_SECONDS, end * _TOLERANCE)
    path: list[Span] = []
    at, item, where = end, None, PROXY
    while at > 0:
        span = _before(timeline.spans, at, near, item, where)
        if span is None:
            break
        stop = min(at, span.end)
        path.append(span._replace(end=stop))
        at, item, where = span.start, span.item, span.where
    return path[::-1]


def _before(spans: Sequence[Span], at: float, near: float, item: int | None, where: str) -> Span | None:
    """Return what the state at an instant was due to."""
    begun = [span for span in spans if span.start < at - 1e-9]
    ending = [span for span in begun if abs(span.end - at) <= near and span.start < at - near / 10]
    running = [span for span in begun if span.end > at + near]
    if not ending and not running:
        return max(begun, key=lambda span: span.end, default=None)

    def rank(span: Span) -> tuple[bool, bool, bool, float, float]:
        is_related = span.where in (where, PROXY) or span.item == item
        return is_related and not span.is_wait, is_related, span.item == item, span.end, span.start

    return max(ending or running, key=rank)
