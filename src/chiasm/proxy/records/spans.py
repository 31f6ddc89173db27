"""From a record to spans: when each stage was, where, in seconds from the request's arrival at the proxy.

Clocks of instances aren't compared. An instance tells how long after a request's arrival there each stage was; the proxy knows
when it sent the call and had the answer. What both leave over is the way there and back, which are taken to be as long as each
other. So a stage of an instance is placed with an error of at most half of that, and never before the call or after its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from chiasm.http.timing import TimingEntry, duration_of, read_timing
from chiasm.proxy.records.record import Record
from chiasm.proxy.records.trail import ItemTrail, LanguageCall
from chiasm.wire import Role

PROXY = "proxy"
WAITS = frozenset({"read", "ready", "place", "await encoder", "queue", "wait"})
"""Stages in which nothing is done for the request."""
WAYS = frozenset({"send", "return", "answer", "transfer", "kv", "first token", "open call"})
"""Stages in which something is on its way, or waits to be noticed."""
_SHORTEST = 1e-6
_ITEM_STAGES = ("preprocess", "encode", "publish")
_LAST_OF_ENCODER = ("encode", "publish", "lookup", "encode call")
"""The last of them that there is for an image ends when its embedding is published; vLLM publishes as part of encoding."""
_CONSECUTIVE = ("queue", "kv", "wait", "transfer", "prefill")
"""Stages of a language instance in the order in which they are shown if it doesn't tell when they were."""


class Span(NamedTuple):
    """One stage."""

    name: str
    where: str
    """The proxy, or the address of an instance."""
    start: float
    end: float
    item: int | None = None
    """Index of the image that it is about."""

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def is_wait(self) -> bool:
        """Whether nothing is done for the request meanwhile."""
        return self.name in WAITS

    @property
    def is_work(self) -> bool:
        """Whether something is computed, read or copied for it."""
        return self.name not in WAITS and self.name not in WAYS


class Timeline(NamedTuple):
    """A whole request. Seconds from its arrival."""

    spans: list[Span]
    """In order of their starts."""
    first_token: float | None
    """When the client had the first token; in an answer that isn't a stream, when it was there. Of an answer without tokens,
    when the client had its first bytes; None without an answer."""
    end: float

    def covered(self) -> float | None:
        """Return the part of the time to the first token that spans cover."""
        if not self.first_token:
            return None
        return _union((span.start, min(span.end, self.first_token)) for span in self.spans) / self.first_token

    def overlap_seconds(self) -> float:
        """Return how much later the first token would have come if one stage had begun where another ended."""
        limit = self.end if self.first_token is None else self.first_token
        work = [(span.start, min(span.end, limit)) for span in self.spans if span.is_work and span.start < limit]
        return sum(end - start for start, end in work) - _union(work)


def timeline_of(record: Record) -> Timeline:
    """Return a record's timeline."""
    end, trail = record.seconds, record.trail
    spans = [Span(step.name, PROXY, step.began - record.arrival, step.ended - record.arrival) for step in trail.steps]
    for number, (began, ended) in trail.fetches.items():
        spans.append(Span("fetch", PROXY, began - record.arrival, ended - record.arrival, number))
    indices = {name: number for number, name in reversed(list(enumerate(trail.identifiers)))}
    arrivals = list(_arrivals(trail.calls, record.arrival))
    for item in trail.items:
        index = indices.get(item.identifier)
        arrived = min((one.end for one in arrivals if one.item == index), default=end)
        spans += _of_item(item, index, record.arrival, arrived)
    first = None if record.first_at is None else record.first_at - record.arrival
    answered = [call for call in trail.calls if call.answered_at is not None]
    giver = _giver(answered, record.first_at)
    for call in trail.calls:
        found, token_at = _of_call(call, record.arrival, end, first if call is giver else None)
        spans += found
        if call is giver and token_at is not None and first is not None:
            first = min(first, token_at)
    published = {span.item: span.end for span in spans if span.name in _LAST_OF_ENCODER}
    spans += (one._replace(start=published[one.item]) for one in arrivals if one.item in published)
    has_tokens = answered and duration_of(read_timing(answered[-1].timing), "pooled") is None
    if has_tokens and first is not None and first < end:
        spans.append(Span("decode", answered[-1].instance, first, end))
    kept = (span._replace(start=max(0.0, span.start), end=min(end, span.end)) for span in spans)
    return Timeline(sorted((span for span in kept if span.seconds > _SHORTEST), key=lambda one: one.start), first, end)


def _giver(answered: Sequence[LanguageCall], first_at: float | None) -> LanguageCall | None:
    """Return the call whose answer gave the client its first bytes."""
    before = [call for call in answered if first_at is not None and (call.answered_at or 0.0) <= first_at]
    return before[-1] if before else None


def _of_item(item: ItemTrail, index: int | None, arrival: float, arrived: float) -> Iterator[Span]:
    """Yield how an image came to an encoder and was encoded there.

    ``arrived`` is when its embedding was where it was waited for: so far a call is shown that had yet to answer.
    """
    call = item.encoded.call
    sent = call.sent_at - arrival
    yield Span("await encoder", PROXY, item.asked_at - arrival, sent, index)
    if call.answered_at is None:
        yield Span("open call", call.instance, sent, arrived, index)
        return
    answered = call.answered_at - arrival
    entries = read_timing(call.timing)
    total = duration_of(entries, "total")
    if total is None:
        yield Span("encode call", call.instance, sent, answered, index)
        return
    begin, end = _placed(sent, answered, total)
    yield Span("send", PROXY, sent, begin, index)
    stages = {one.name: one for one in entries if one.at is not None and one.seconds is not None}
    at = begin
    for name in _ITEM_STAGES:
        stage = stages.get(f"{name}{item.encoded.place}")
        if stage is None or stage.at is None or stage.seconds is None:
            continue
        start = min(end, begin + stage.at)
        yield Span("queue", call.instance, at, start, index)
        at = min(end, start + stage.seconds)
        yield Span(name, call.instance, start, at, index)
    yield Span("lookup" if at == begin else "answer", call.instance, at, end, index)
    yield Span("return", PROXY, end, answered, index)


def _of_call(call: LanguageCall, arrival: float, end: float, first: float | None) -> tuple[list[Span], float | None]:
    """Return the spans of a call of a language instance up to its first token, and when that was if the answer was whole.

    Of an answer without tokens there are those up to its first bytes. ``first`` is when the client had the first bytes, if this
    call gave them.
    """
    sent = call.sent_at - arrival
    if call.answered_at is None:
        return [Span("lost call", call.instance, sent, end)], None
    answered = call.answered_at - arrival
    received = answered if first is None else first
    entries = read_timing(call.timing)
    ttft, pooled, total = (duration_of(entries, name) for name in ("ttft", "pooled", "total"))
    computed = ttft if pooled is None else pooled
    if computed is None:
        return [Span("call", call.instance, sent, received)], None
    begin, ended = _placed(sent, answered, computed if total is None else total)
    token = begin + computed
    spans = [Span("send", PROXY, sent, begin), *_at_language(call, entries, begin, token)]
    if pooled is None and total is None:
        return [*spans, Span("first token", PROXY, token, received)], None
    if pooled is not None or first is None:  # there is no token, or another instance goes on
        spans += [Span("answer", call.instance, token, ended), Span("return", PROXY, ended, received)]
    return spans, token if pooled is None else None


def _at_language(call: LanguageCall, entries: Sequence[TimingEntry], begin: float, token: float) -> Iterator[Span]:
    """Yield what a language instance did from a call's arrival there to the first token."""
    named = {one.name: one for one in reversed(entries)}
    queue, prefill = named.get("queue"), named.get("prefill")
    if queue is None or prefill is None or queue.at is None or prefill.at is None:
        told = [(name, duration_of(entries, name) or 0.0) for name in _CONSECUTIVE]
        at = token - sum(seconds for _, seconds in told)
        yield Span("prepare", call.instance, begin, at)
        for name, seconds in told:
            yield Span(name, call.instance, at, at + seconds)
            at += seconds
        return
    at, prefill_at = begin + queue.at, begin + prefill.at
    yield Span("prepare", call.instance, begin, at)
    stalls = [
        (begin + one.at, one.seconds) for one in entries if one.name == "stall" and one.at is not None and one.seconds
    ]
    transfer = duration_of(entries, "transfer") or 0.0
    for start, seconds in stalls:
        yield from _running(call.instance, at, min(start, token), prefill_at)
        at = min(token, start + seconds)
        yield Span("wait", call.instance, min(start, token), at)
    if at < prefill_at:
        yield Span("queue", call.instance, at, prefill_at)
        at = prefill_at
    yield Span("load", call.instance, at, min(token, at + transfer))
    yield Span("prefill", call.instance, min(token, at + transfer), token)


def _running(where: str, start: float, end: float, prefill_at: float) -> Iterator[Span]:
    """Yield what is between two waits: the queue until prefill has begun, then prefill."""
    yield Span("queue", where, start, min(end, prefill_at))
    yield Span("prefill", where, max(start, prefill_at), end)


def _arrivals(calls: Iterable[LanguageCall], arrival: float) -> Iterator[Span]:
    """Yield the way of each embedding to the language instance that waited for it, of which only the end is known here."""
    for call in calls:
        if call.answered_at is None or call.role == Role.DECODE:
            continue
        entries = read_timing(call.timing)
        ttft, total = duration_of(entries, "ttft"), duration_of(entries, "total")
        if ttft is None:
            continue
        begin, _ = _placed(call.sent_at - arrival, call.answered_at - arrival, ttft if total is None else total)
        for one in entries:
            number = one.name.removeprefix("item")
            if one.description != "waited" or one.at is None or one.seconds is None or not number.isdecimal():
                continue
            yield Span("transfer", call.instance, 0.0, begin + one.at + one.seconds, int(number))


def _placed(sent: float, answered: float, seconds: float) -> tuple[float, float]:
    """Return when an instance began and ended what took it so long between these instants."""
    way = max(0.0, answered - sent - seconds) / 2
    return sent + way, answered - way


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of the intervals lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
