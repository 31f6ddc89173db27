"""A record as the operator sees it: its spans, its critical path and what overlap saved."""

from __future__ import annotations

import msgspec

from chiasm.proxy.records.critical import critical_path
from chiasm.proxy.records.record import Record
from chiasm.proxy.records.spans import Span, timeline_of


class SpanInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One stage of a request. Seconds from the request's arrival."""

    name: str
    where: str
    """``proxy``, or the address of an instance."""
    start: float
    end: float
    item: int | None = None
    """Index of the image."""
    is_wait: bool = False
    """Whether nothing is done for the request meanwhile."""


class RecordInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request."""

    id: str
    path: str
    status: int
    """499: the client left."""
    arrived: float
    """Unix time."""
    seconds: float
    """To the end of the answer."""
    first_token_seconds: float | None = None
    covered: float | None = None
    """The part of the time to the first token that spans cover."""
    overlap_seconds: float = 0.0
    """How much later the first token would have come if one stage had begun where another ended."""
    key: str = ""
    details: dict[str, object] = {}
    """``model``, ``images`` and ``instances``."""
    tokens: dict[str, int] = {}
    stages: dict[str, float] = {}
    """Seconds: those of the proxy, by their names in ``Server-Timing``, and ``queue``, ``wait``, ``prefill`` and
    ``decode`` of language instances."""
    spans: list[SpanInfo] = []
    critical_path: list[SpanInfo] = []


def info_of(record: Record) -> RecordInfo:
    """Return what the operator sees of a record."""
    timeline = timeline_of(record)
    return RecordInfo(
        id=record.id,
        path=record.path,
        status=record.status,
        arrived=record.arrived,
        seconds=record.seconds,
        first_token_seconds=timeline.first_token,
        covered=timeline.covered(),
        overlap_seconds=timeline.overlap_seconds(),
        key=record.key,
        details=dict(record.details),
        tokens=dict(record.tokens),
        stages=dict(record.stages()),
        spans=[_span(span) for span in timeline.spans],
        critical_path=[_span(span) for span in critical_path(timeline)],
    )


def _span(span: Span) -> SpanInfo:
    return SpanInfo(
        name=span.name, where=span.where, start=span.start, end=span.end, item=span.item, is_wait=span.is_wait
    )
