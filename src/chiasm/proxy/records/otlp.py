"""Exports the traces of requests by OTLP over HTTP, with the SDK of OpenTelemetry; its ``OTEL_*`` variables hold.

A request pays for two ids and a place in a queue. A thread of its own makes the spans of the requests that wait there and posts
them, so a collector that is slow or gone holds nothing up: beyond a number of requests that wait, those that come are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import NonRecordingSpan, SpanKind, set_span_in_context

from chiasm import __version__
from chiasm.proxy.records.otel_spans import span_context, spans_of
from chiasm.proxy.records.record import Record
from chiasm.proxy.records.trace_context import SAMPLED, TraceContext

MAX_WAITING_TRACES = 1024
"""Requests whose spans have yet to be exported."""
SERVICE = "chiasm-proxy"
FLUSH_SECONDS = 2.0
EXPORTED, FAILED, DROPPED = "exported", "failed", "dropped"
_BATCH = 16
"""Requests for which spans are made at a time. A larger batch would hold Python's lock for longer without a pause."""
_MAX_SPANS = 512
"""Spans in one message."""
_log = logging.getLogger(__name__)


class Tracing:
    """Gives requests spans of their own, and exports them. All methods but those of the exporter belong to the event loop."""

    def __init__(self, url: str, count: Callable[[str, int], None], exporter: SpanExporter | None = None) -> None:
        """``count`` is told, in any thread, what became of how many requests' spans. ``exporter`` is for one that doesn't post
        them to ``url``."""
        given = OTELResourceDetector().detect().attributes
        names = {SERVICE_NAME: given.get(SERVICE_NAME) or SERVICE, SERVICE_VERSION: __version__}
        self._provider = TracerProvider(resource=Resource.create({**names, **given}), shutdown_on_exit=False)
        self._new_ids = self._provider.id_generator
        self._count = count
        self._exporter = _Exporter(exporter or OTLPSpanExporter(endpoint=url), url, self._provider, count)
        self._queue: SpanProcessor | None = None
        self._taken = 0

    def start(self) -> None:
        """Start the thread that exports."""
        self._queue = BatchSpanProcessor(
            self._exporter, max_queue_size=MAX_WAITING_TRACES, max_export_batch_size=_BATCH
        )

    def begin(self, client: TraceContext | None, path: str) -> TraceContext:
        """Return the own span of a request that begins now, below the client's, and whether it is sampled."""
        context = Context()
        if client is not None:
            context = set_span_in_context(NonRecordingSpan(span_context(client, is_remote=True)), context)
        trace_id = self._new_ids.generate_trace_id() if client is None else client.trace_id
        sampling = self._provider.sampler.should_sample(context, trace_id, path, SpanKind.SERVER)
        flags, state = (0, "") if client is None else (client.flags & ~SAMPLED, client.state)
        if sampling.decision is Decision.RECORD_AND_SAMPLE:
            flags |= SAMPLED
        return TraceContext(trace_id, self._new_ids.generate_span_id(), flags, state)

    def offer(self, record: Record) -> None:
        """Take the record of a request that has ended, if it is sampled; drop it if too many wait."""
        trace = record.trail.trace
        if trace is None or not trace.is_sampled or self._queue is None:
            return
        if self._taken - self._exporter.ended >= MAX_WAITING_TRACES:
            self._count(DROPPED, 1)
            return
        self._taken += 1
        self._queue.on_end(_Waiting(record, trace, self._provider.resource))

    async def close(self) -> None:
        """Export what waits, for a bounded time; what is left then is lost."""
        queue, self._queue = self._queue, None
        if queue is None:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            queue.shutdown()
            with contextlib.suppress(RuntimeError):  # the event loop may have ended
                loop.call_soon_threadsafe(ended.set)

        # Daemons, as the thread of the queue: a collector that hangs must not keep the process.
        threading.Thread(target=shut_down, name="close-traces", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await ended.wait()
        except TimeoutError:
            self._exporter.give_up()
            lost = self._taken - self._exporter.ended
            _log.warning("The spans of %d requests were not exported in %g s, and are lost.", lost, FLUSH_SECONDS)


class _Waiting(ReadableSpan):
    """A request in the queue, which takes spans."""

    def __init__(self, record: Record, trace: TraceContext, resource: Resource) -> None:
        super().__init__(record.path, context=span_context(trace, is_remote=False), resource=resource)
        self.record = record


class _Exporter(SpanExporter):
    """Makes the spans of requests and hands them on; in the thread of the queue."""

    def __init__(
        self, exporter: SpanExporter, url: str, provider: TracerProvider, count: Callable[[str, int], None]
    ) -> None:
        self._exporter = exporter
        parts = urlsplit(url)
        self._where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._provider = provider
        self._count = count
        self._reasons = _Reasons()
        self._has_failed = False
        self._gives_up = False
        self.ended = 0
        """How many requests have come out of the queue."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export the spans of the requests that are waiting in this batch."""
        waiting = [one.record for one in spans if isinstance(one, _Waiting)]
        is_done = False
        try:
            is_done = not self._gives_up and self._export(waiting)
        finally:
            self.ended += len(waiting)
            self._count(EXPORTED if is_done else FAILED, len(waiting))
        if is_done == self._has_failed and not self._gives_up:
            self._has_failed = not is_done
            if is_done:
                _log.info("Spans are exported to %s again.", self._where)
            else:
                _log.warning("Spans can't be exported to %s, and are lost: %s", self._where, self._reasons.last)
        return SpanExportResult.SUCCESS if is_done else SpanExportResult.FAILURE

    def _export(self, records: Sequence[Record]) -> bool:
        new_id, resource = self._provider.id_generator.generate_span_id, self._provider.resource
        made = [span for record in records for span in spans_of(record, resource, new_id)]
        with self._reasons:
            return all(
                self._exporter.export(made[at : at + _MAX_SPANS]) is SpanExportResult.SUCCESS
                for at in range(0, len(made), _MAX_SPANS)
            )

    def give_up(self) -> None:
        """Export nothing more, and end what waits for the collector to come back."""
        self._gives_up = True
        self._exporter.shutdown()

    def shutdown(self) -> None:
        """End the exporter, whose queue is empty."""
        if not self._gives_up:
            self._exporter.shutdown()


class _Reasons(logging.Filter):
    """Keeps the last line of the exporter's log in place of writing it: one for each try would be too many."""

    _logger = logging.getLogger(trace_exporter.__name__)

    def __init__(self) -> None:
        super().__init__()
        self.last = "no reason is known."

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written: never."""
        self.last = record.getMessage()
        return False

    def __enter__(self) -> None:
        self._logger.addFilter(self)

    def __exit__(self, *error: object) -> None:
        self._logger.removeFilter(self)
