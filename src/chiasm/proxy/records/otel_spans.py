"""From a record to spans of OpenTelemetry: the request, and below it each of its stages.

They are made when the request has ended, so they can't be made by a tracer, which times spans itself and gives them ids. The
names are those of the semantic conventions for generative AI (``gen_ai.*``, https://github.com/open-telemetry/semantic-conventions-genai)
and for HTTP; what has no name there begins with ``chiasm.``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import AttributeValue

from chiasm import __version__
from chiasm.proxy.records.record import Record
from chiasm.proxy.records.spans import PROXY, Span, timeline_of
from chiasm.proxy.records.trace_context import TraceContext
from chiasm.wire import CHAT_PATH, COMPLETIONS_PATH, MESSAGES_PATH, RESPONSES_PATH

PROVIDER = "chiasm"
SCOPE = InstrumentationScope("chiasm", __version__)
SHORTEST_SECONDS = 1e-4
_OPERATIONS = {
    CHAT_PATH: "chat",
    COMPLETIONS_PATH: "text_completion",
    RESPONSES_PATH: "chat",
    MESSAGES_PATH: "chat",
    "/v1/embeddings": "embeddings",
    "/v2/embed": "embeddings",
}
"""Of other paths the conventions say nothing."""
_LOST = "lost call"
_FIRST_FAULT = 500
"""Lower statuses are the client's errors, by which a server's span hasn't failed."""
_NANOSECONDS = 1e9
_OK, _FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)


def span_context(trace: TraceContext, *, is_remote: bool) -> SpanContext:
    """Return the same for OpenTelemetry; ``is_remote``: whether another process made the span."""
    state = TraceState.from_header([trace.state]) if trace.state else None
    return SpanContext(trace.trace_id, trace.span_id, is_remote, TraceFlags(trace.flags), state)


def spans_of(record: Record, resource: Resource, new_id: Callable[[], int]) -> list[ReadableSpan]:
    """Return the spans of a request that has one of its own in its trail: first that, then its stages in order.

    Stages of less than 0.1 ms are left out: a collector's pages don't show them, and each span costs tens of microseconds.
    ``new_id`` returns random ids of spans.
    """
    trail = record.trail
    assert trail.trace is not None
    own = span_context(trail.trace, is_remote=False)
    parent = None if trail.client_trace is None else span_context(trail.client_trace, is_remote=True)
    timeline = timeline_of(record)
    operation, model = _OPERATIONS.get(record.path), record.details.get("model")
    root = ReadableSpan(
        name=f"{operation or f'POST {record.path}'} {model}" if model else operation or f"POST {record.path}",
        context=own,
        parent=parent,
        resource=resource,
        attributes=dict(_of_request(record, operation, timeline.first_token)),
        kind=SpanKind.SERVER,
        status=_FAILED if record.status >= _FIRST_FAULT or (record.error and record.status < 400) else _OK,
        start_time=int(record.arrived * _NANOSECONDS),
        end_time=int((record.arrived + record.seconds) * _NANOSECONDS),
        instrumentation_scope=SCOPE,
    )
    shown = (span for span in timeline.spans if span.seconds >= SHORTEST_SECONDS)
    return [root, *(_stage(record, span, own, resource, new_id()) for span in shown)]


def _of_request(
    record: Record, operation: str | None, first_token: float | None
) -> Iterator[tuple[str, AttributeValue]]:
    """Yield the attributes of the request's own span."""
    yield "chiasm.request.id", record.id
    yield "http.request.method", "POST"
    yield "http.route", record.path
    yield "http.response.status_code", record.status
    if record.error:
        yield "error.type", record.error
    if operation is not None:
        yield "gen_ai.operation.name", operation
        yield "gen_ai.provider.name", PROVIDER
        yield "gen_ai.request.stream", record.is_stream
    if model := record.details.get("model"):
        yield "gen_ai.request.model", str(model)
    for name, of in (("input", "prompt"), ("output", "completion")):
        if of in record.tokens:
            yield f"gen_ai.usage.{name}_tokens", record.tokens[of]
    if record.is_stream and first_token is not None:
        yield "gen_ai.response.time_to_first_chunk", first_token
    if record.key:
        yield "chiasm.key.name", record.key
    if isinstance(images := record.details.get("images"), int):
        yield "chiasm.items", images
    if isinstance(instances := record.details.get("instances"), list):
        yield "chiasm.instances", tuple(map(str, instances))


def _stage(record: Record, span: Span, parent: SpanContext, resource: Resource, span_id: int) -> ReadableSpan:
    attributes: dict[str, AttributeValue] = {"chiasm.request.id": record.id}
    if span.where != PROXY:
        attributes["chiasm.instance"] = span.where
    if span.is_wait:
        attributes["chiasm.is_wait"] = True
    if span.item is not None:
        attributes["chiasm.item.index"] = span.item
        identifiers: Sequence[str] = record.trail.identifiers
        if span.item < len(identifiers):
            attributes["chiasm.item.identifier"] = identifiers[span.item]
    if span.name == _LOST:
        attributes["error.type"] = "instance_lost"
    return ReadableSpan(
        name=span.name,
        context=SpanContext(parent.trace_id, span_id, False, parent.trace_flags, parent.trace_state),
        parent=parent,
        resource=resource,
        attributes=attributes,
        status=_FAILED if span.name == _LOST else _OK,
        start_time=int((record.arrived + span.start) * _NANOSECONDS),
        end_time=int((record.arrived + span.end) * _NANOSECONDS),
        instrumentation_scope=SCOPE,
    )
