"""Traces: spans of OpenTelemetry from records, and their export to a collector, which may be slow or gone."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import count
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from chiasm.errors import ConfigurationError
from chiasm.proxy import ProxyConfig
from chiasm.proxy.records import otlp
from chiasm.proxy.records.otel_spans import spans_of
from chiasm.proxy.records.otlp import MAX_WAITING_TRACES, Tracing
from chiasm.proxy.records.record import Record
from chiasm.proxy.records.trace_context import TraceContext
from chiasm.proxy.records.tracing import traces_url, tracing_to
from chiasm.proxy.records.trail import LanguageCall, Step
from tests.launch.waiting import eventually

from .conftest import Start, ask, image, image_bytes
from .instances import MODEL, FakeInstance, refuse
from .test_records import ENCODER, PD, record_of_one_image

TRACE, CLIENT, OWN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, 0x1111
PARENT = f"00-{TRACE:032x}-{CLIENT:016x}-01"


def traced(*, flags: int = 1, client: bool = True, **more: Any) -> Record:
    """Return the record of a request that has a span of its own, below its client's."""
    record = record_of_one_image()
    record.trail.client_trace = TraceContext(TRACE, CLIENT, flags) if client else None
    record.trail.trace = TraceContext(TRACE, OWN, flags)
    return dataclasses.replace(record, **more)


def made(record: Record) -> list[ReadableSpan]:
    return spans_of(record, Resource({}), count(1).__next__)


def milliseconds(span: ReadableSpan) -> tuple[int, int]:
    """Return when a span began and ended, from the request's arrival."""
    assert span.start_time is not None
    assert span.end_time is not None
    began = int(1.7e18)
    return round((span.start_time - began) / 1e6), round((span.end_time - began) / 1e6)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# ---- from a record to spans ----------------------------------------------------------------------------------------------


def test_the_request_is_the_server_span_below_its_clients() -> None:
    details = {"model": "tiny", "images": 1, "instances": [ENCODER, PD]}
    tokens = {"prompt": 20, "completion": 7}
    root = made(traced(details=details, tokens=tokens, key="team", is_stream=True))[0]
    assert (root.name, root.kind, root.status.status_code) == ("chat tiny", SpanKind.SERVER, StatusCode.UNSET)
    assert (root.context.trace_id, root.context.span_id) == (TRACE, OWN)
    assert root.parent is not None
    assert (root.parent.span_id, root.parent.is_remote) == (CLIENT, True)
    assert milliseconds(root) == (0, 2000)
    found = attributes(root)
    assert found.pop("gen_ai.response.time_to_first_chunk") == pytest.approx(0.89)
    assert found == {
        "chiasm.request.id": "r",
        "chiasm.key.name": "team",
        "chiasm.items": 1,
        "chiasm.instances": (ENCODER, PD),
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "chiasm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 7,
    }


def test_a_request_without_a_clients_span_has_no_parent() -> None:
    assert made(traced(client=False))[0].parent is None


def test_each_stage_is_a_span_below_the_request() -> None:
    root, *stages = made(traced())
    assert all(stage.parent == root.context for stage in stages)
    assert {stage.context.trace_id for stage in stages} == {TRACE}
    assert len({stage.context.span_id for stage in stages} | {OWN}) == len(stages) + 1
    assert {stage.kind for stage in stages} == {SpanKind.INTERNAL}
    times = {(stage.name, attributes(stage).get("chiasm.instance")): milliseconds(stage) for stage in stages}
    assert times["encode", ENCODER] == (310, 610)
    assert times["transfer", PD] == (660, 670)
    assert times["decode", PD] == (890, 2000)
    assert times["place", None] == (50, 60)
    assert all(0 <= began <= ended <= 2000 for began, ended in times.values())


def test_stages_shorter_than_a_tenth_of_a_millisecond_have_no_span() -> None:
    record = traced()
    record.trail.steps += [Step("parse", 100.05, 100.05009), Step("store", 100.05, 100.05011)]
    names = [stage.name for stage in made(record)]
    assert "store" in names
    assert "parse" not in names


def test_the_stages_of_an_image_name_it() -> None:
    stages = {stage.name: attributes(stage) for stage in made(traced())[1:]}
    for name in ("await encoder", "preprocess", "encode", "publish", "transfer"):
        assert (stages[name]["chiasm.item.index"], stages[name]["chiasm.item.identifier"]) == (0, "i")
    assert stages["wait"]["chiasm.is_wait"]
    assert not any(name.startswith("chiasm.item") for name in stages["decode"])
    assert {one["chiasm.request.id"] for one in stages.values()} == {"r"}


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (200, "", StatusCode.UNSET),
        (200, "instance_lost", StatusCode.ERROR),
        (400, "too_many_images", StatusCode.UNSET),
        (499, "client_left", StatusCode.UNSET),
        (502, "instance_lost", StatusCode.ERROR),
    ],
)
def test_an_error_that_is_not_the_clients_is_the_spans_status(status: int, error: str, code: StatusCode) -> None:
    root = made(traced(status=status, error=error))[0]
    assert root.status.status_code is code
    assert attributes(root).get("error.type", "") == error


def test_a_call_that_was_lost_is_a_span_that_failed() -> None:
    record = traced()
    record.trail.calls.append(LanguageCall("10.0.0.3:8003", "pd", 101.0))
    [lost] = [stage for stage in made(record) if stage.name == "lost call"]
    assert lost.status.status_code is StatusCode.ERROR
    assert attributes(lost)["error.type"] == "instance_lost"


@pytest.mark.parametrize(
    ("path", "name", "operation"),
    [
        ("/v1/completions", "text_completion tiny", "text_completion"),
        ("/v1/embeddings", "embeddings tiny", "embeddings"),
        ("/tokenize", "POST /tokenize tiny", None),
    ],
)
def test_the_path_tells_the_operation(path: str, name: str, operation: str | None) -> None:
    root = made(traced(path=path, details={"model": "tiny"}))[0]
    assert root.name == name
    assert attributes(root).get("gen_ai.operation.name") == operation


# ---- what is exported ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def the_end_waits_for_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "FLUSH_SECONDS", 60.0)


class Outcomes(Counter[str]):
    """What became of how many requests' spans."""

    def note(self, outcome: str, number: int) -> None:
        self[outcome] += number


async def test_what_is_sampled_is_exported_and_nothing_else() -> None:
    exporter, outcomes = InMemorySpanExporter(), Outcomes()
    tracing = Tracing("http://collector", outcomes.note, exporter)
    tracing.start()
    tracing.offer(traced(id="yes"))
    tracing.offer(traced(id="no", flags=0))
    await tracing.close()
    assert {attributes(span)["chiasm.request.id"] for span in exporter.get_finished_spans()} == {"yes"}
    assert outcomes == {"exported": 1}


@pytest.mark.parametrize(
    ("sampler", "client", "sampled"),
    [
        ("parentbased_always_on", None, True),
        ("parentbased_always_on", 1, True),
        ("parentbased_always_on", 0, False),
        ("always_on", 0, True),
        ("always_off", 1, False),
        ("parentbased_always_off", None, False),
    ],
)
def test_the_sampler_is_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, sampler: str, client: int | None, sampled: bool
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    tracing = Tracing("http://collector", Outcomes().note, InMemorySpanExporter())
    given = None if client is None else TraceContext(TRACE, CLIENT, client, "a=1")
    own = tracing.begin(given, "/v1/chat/completions")
    assert own.is_sampled is sampled
    assert own.span_id not in (0, CLIENT)
    assert (own.trace_id == TRACE, own.state) == (given is not None, "" if given is None else "a=1")


class Stuck(SpanExporter):
    """An exporter that hangs until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.let_go.wait(30)
        return SpanExportResult.SUCCESS


async def test_requests_beyond_those_that_wait_are_dropped_and_counted() -> None:
    exporter, outcomes = Stuck(), Outcomes()
    tracing = Tracing("http://collector", outcomes.note, exporter)
    tracing.start()
    for _ in range(MAX_WAITING_TRACES + 5):
        tracing.offer(traced())
    assert outcomes == {"dropped": 5}
    exporter.let_go.set()
    await tracing.close()
    assert outcomes == {"dropped": 5, "exported": MAX_WAITING_TRACES}


async def test_the_end_does_not_wait_for_an_export_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp, "FLUSH_SECONDS", 0.05)
    exporter = Stuck()
    tracing = Tracing("http://collector", Outcomes().note, exporter)
    tracing.start()
    tracing.offer(traced())
    async with asyncio.timeout(20):
        await tracing.close()
    exporter.let_go.set()
    assert "The spans of 1 requests were not exported in 0.05 s, and are lost." in caplog.text


# ---- a proxy and a collector ---------------------------------------------------------------------------------------------


class Collector:
    """What takes spans by OTLP over HTTP, and keeps them."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: list[dict[str, str]] = []
        self.messages: list[ExportTraceServiceRequest] = []
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.messages.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(status=self.status, content_type="application/x-protobuf")

    @property
    def spans(self) -> list[Any]:
        resources = [resource for message in self.messages for resource in message.resource_spans]
        return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    application = web.Application(client_max_size=64 << 20)
    application.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield collector
    await runner.cleanup()


async def test_a_clients_trace_goes_through_the_proxy_to_instances_and_to_the_collector(
    collector: Collector, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd], otlp_traces_endpoint=collector.url)
    body = ask("What?", image(image_bytes()))
    answer = await front.post(body, traceparent=PARENT, tracestate="a=1", **{"X-Request-Id": "mine"})
    assert answer.status == 200
    assert (await front.record("mine"))["details"]["trace_id"] == f"{TRACE:032x}"
    await front.stop()
    [root] = [span for span in collector.spans if span.name == f"chat {MODEL}"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (f"{TRACE:032x}", f"{CLIENT:016x}")
    assert root.trace_state == "a=1"
    others = [span for span in collector.spans if span is not root]
    assert {span.parent_span_id for span in others} == {root.span_id}
    assert {"encode call", "call"} <= {span.name for span in others}  # fake instances tell no stages
    for instance in (encoder, pd):
        [received] = instance.received
        assert received.headers["traceparent"] == f"00-{TRACE:032x}-{root.span_id.hex()}-01"
        assert received.headers["tracestate"] == "a=1"
    found = collector.messages[0].resource_spans[0].resource.attributes
    resource = {attribute.key: attribute.value.string_value for attribute in found}
    assert resource["service.name"] == "chiasm-proxy"
    assert resource["deployment.environment.name"] == "test"
    assert collector.headers[0]["x-tenant"] == "mine"
    assert front.service.metrics.traces.labels("exported")._value.get() == 1


async def test_a_request_without_a_trace_begins_one(collector: Collector, start: Start) -> None:
    front = await start([FakeInstance("pd")], otlp_traces_endpoint=collector.url)
    assert (await front.post(ask("Hi", stream=True), **{"X-Request-Id": "mine"})).status == 200
    [received] = front.instances[0].received
    _, trace, span, flags = received.headers["traceparent"].split("-")
    assert (await front.record("mine"))["details"]["trace_id"] == trace
    await front.stop()
    [root] = [one for one in collector.spans if not one.parent_span_id]
    assert (root.trace_id.hex(), root.span_id.hex(), flags) == (trace, span, "01")


async def test_an_instances_error_is_in_the_trace(collector: Collector, start: Start) -> None:
    pd = FakeInstance("pd")
    pd.answer = refuse(500, "It broke.", code="broken")
    front = await start([pd], otlp_traces_endpoint=collector.url)
    assert (await front.post(ask("Hi"))).status == 500
    await front.stop()
    [root] = [one for one in collector.spans if not one.parent_span_id]
    assert root.status.code == root.status.STATUS_CODE_ERROR
    assert {one.key: one.value.string_value for one in root.attributes}["error.type"] == "broken"


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_collector_that_takes_nothing_costs_a_line_and_a_count(
    collector: Collector,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_there: bool,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # so that it isn't tried again
    collector.status = 503
    url = collector.url if is_there else "http://127.0.0.1:9"
    front = await start([FakeInstance("pd")], otlp_traces_endpoint=url)
    for _ in range(40):
        assert (await front.post(ask("Hi"))).status == 200
    await front.stop()
    failed = front.service.metrics.traces.labels("failed")._value
    assert await asyncio.to_thread(eventually, lambda: failed.get() == 40)  # what is given up is counted by a thread
    assert caplog.text.count("Spans can't be exported to") == 1
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


# ---- off -----------------------------------------------------------------------------------------------------------------


def test_nothing_of_it_is_imported_when_it_is_off() -> None:
    code = (
        "import sys; from chiasm.proxy import ProxyConfig, create_app; create_app(ProxyConfig());"
        "assert not [one for one in sys.modules if one.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_it_is_off_where_the_environment_says_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    front = await start([FakeInstance("pd")], otlp_traces_endpoint="http://127.0.0.1:9")
    assert front.service.tracing is None


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("https://collector/", "https://collector/v1/traces"),
        ("http://collector:4318/other", "http://collector:4318/other"),
    ],
)
def test_an_endpoint_without_a_path_gets_the_usual_one(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize(
    "endpoint", ["", "collector:4317", "grpc://collector:4317", "http://", "http://[", "http://a:x"]
)
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--otlp-traces-endpoint must be the URL"):
        ProxyConfig(otlp_traces_endpoint=endpoint)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OTEL_BSP_SCHEDULE_DELAY", "-1"), ("OTEL_BSP_SCHEDULE_DELAY", "soon"), ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-3")],
)
def test_a_variable_with_a_value_that_can_not_be_is_one_clear_error(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable):
        tracing_to("http://127.0.0.1:4318", lambda outcome, count: None)
