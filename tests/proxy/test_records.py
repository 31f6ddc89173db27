"""Records of requests: where their time went, on one clock, and which of it their first token waited for."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from typing import Any

import pytest
from aiohttp import web

from chiasm.http.timing import TimingEntry, write_timing
from chiasm.proxy.records.critical import critical_path
from chiasm.proxy.records.info import info_of
from chiasm.proxy.records.record import Record
from chiasm.proxy.records.ring import Records
from chiasm.proxy.records.spans import Span, timeline_of
from chiasm.proxy.records.trace_file import trace_of
from chiasm.proxy.records.trail import EncodedAt, EncoderCall, ItemTrail, LanguageCall, Step, Trail

from .conftest import Images, Start, ask, image, image_bytes, listen
from .instances import FakeInstance, Received, after, chat, encode

KEY = "s3cret" * 3
ENCODER, PD = "10.0.0.1:8001", "10.0.0.2:8002"


def entry(name: str, seconds: float, at: float | None = None, description: str = "") -> TimingEntry:
    return TimingEntry(name, seconds, description, at)


def record_of_one_image(*, stream: bool = True, request_id: str = "r", ended_at: float = 102.0) -> Record:
    """A request that came at 100 s: its image was encoded at 100.1 to 100.7, while the text before it was prefilled."""
    trail = Trail(100.0)
    trail.steps += [Step("read", 100.0, 100.02), Step("images", 100.02, 100.05), Step("place", 100.05, 100.06)]
    trail.identifiers = ["i"]
    encoder = [
        entry("preprocess0", 0.1, at=0.05),
        entry("encode0", 0.3, at=0.2),
        entry("publish0", 0.05, at=0.5),
        entry("total", 0.58),
    ]
    call = EncoderCall(ENCODER, 100.1, 100.7, write_timing(encoder))
    trail.items.append(ItemTrail("i", 100.06, EncodedAt(call, 0)))
    language = [
        entry("queue", 0.02, at=0.03),
        entry("prefill", 0.35, at=0.05),
        entry("stall", 0.4, at=0.2),
        entry("transfer", 0.02),
        entry("ttft", 0.8),
        entry("item0", 0.57, at=0.03, description="waited"),
        *([] if stream else [entry("total", 1.8)]),
    ]
    answered_at = 100.88 if stream else 101.88
    trail.calls.append(LanguageCall(PD, "pd", 100.06, answered_at, write_timing(language)))
    return Record(
        id=request_id,
        path="/v1/chat/completions",
        key="",
        status=200,
        details={"images": 1},
        stages=dict,
        tokens={},
        arrived=1.7e9,
        arrival=100.0,
        first_at=100.89 if stream else 101.9,
        ended_at=ended_at,
        trail=trail,
    )


def rounded(spans: list[Span]) -> list[tuple[str, str, float, float]]:
    return [(span.name, span.where, round(span.start, 3), round(span.end, 3)) for span in spans]


def test_stages_of_all_instances_are_on_one_clock() -> None:
    spans = rounded(timeline_of(record_of_one_image()).spans)
    assert (
        "encode",
        ENCODER,
        0.31,
        0.61,
    ) in spans  # sent at 0.1, half of the 20 ms that the encoder didn't have it, 0.2 there
    assert ("publish", ENCODER, 0.61, 0.66) in spans
    assert ("prefill", PD, 0.12, 0.27) in spans
    assert ("wait", PD, 0.27, 0.67) in spans
    assert ("load", PD, 0.67, 0.69) in spans
    assert ("prefill", PD, 0.69, 0.87) in spans
    assert ("transfer", PD, 0.66, 0.67) in spans
    assert ("decode", PD, 0.89, 2.0) in spans


@pytest.mark.parametrize("stream", [True, False])
def test_spans_cover_the_time_to_the_first_token(stream: bool) -> None:
    timeline = timeline_of(record_of_one_image(stream=stream))
    assert timeline.first_token == pytest.approx(0.89 if stream else 0.87)
    assert (timeline.covered() or 0.0) > 0.999


def test_the_critical_path_goes_through_what_the_first_token_waited_for() -> None:
    path = critical_path(timeline_of(record_of_one_image()))
    names = [span.name for span in path]
    assert names[-4:] == ["transfer", "load", "prefill", "first token"]
    assert names.index("preprocess") < names.index("encode") < names.index("publish") < names.index("transfer")
    assert "wait" not in names
    assert all(span.name != "prefill" or span.start > 0.6 for span in path)
    assert sum(span.seconds for span in path) == pytest.approx(0.89, abs=0.01)


def test_what_overlap_saved_is_the_work_that_was_done_at_the_same_time() -> None:
    # Prefill of the text before the image, 0.12 to 0.27, beside preparing and preprocessing it from 0.16 on.
    assert timeline_of(record_of_one_image()).overlap_seconds() == pytest.approx(0.12, abs=0.05)


def test_an_instance_that_tells_nothing_has_one_span() -> None:
    record = record_of_one_image()
    record.trail.calls[0].timing = ""
    spans = rounded(timeline_of(record).spans)
    assert ("call", PD, 0.06, 0.89) in spans


def test_an_encoder_that_publishes_while_it_encodes_has_the_embedding_travel_from_then_on() -> None:
    record = record_of_one_image()
    (item,) = record.trail.items
    call = item.encoded.call._replace(timing=write_timing([entry("encode0", 0.35, at=0.2), entry("total", 0.58)]))
    record.trail.items = [item._replace(encoded=EncodedAt(call, 0))]
    assert ("transfer", PD, 0.66, 0.67) in rounded(timeline_of(record).spans)


def test_an_encoder_that_has_yet_to_answer_has_a_call_until_the_embedding_is_where_it_was_waited_for() -> None:
    record = record_of_one_image()
    (item,) = record.trail.items
    record.trail.items = [item._replace(encoded=EncodedAt(EncoderCall(ENCODER, 100.1, None), 0))]
    timeline = timeline_of(record)
    assert [one for one in rounded(timeline.spans) if one[1] == ENCODER] == [("open call", ENCODER, 0.1, 0.67)]
    assert timeline.overlap_seconds() == pytest.approx(0.0)  # how much of it is work isn't known
    assert "transfer" not in {span.name for span in timeline.spans}
    record.trail.calls[0].timing = ""  # it doesn't say that it has waited
    assert ("open call", ENCODER, 0.1, 2.0) in rounded(timeline_of(record).spans)


def test_a_whole_answer_that_another_instance_continues_is_covered_to_its_end() -> None:
    """As that of prefill at vLLM: the client has nothing of it."""
    prefill, decode = "10.0.0.3:8003", "10.0.0.4:8004"
    told = [entry("queue", 0.1, at=0.1), entry("prefill", 0.2, at=0.2), entry("ttft", 0.4), entry("total", 0.45)]
    trail = Trail(100.0)
    trail.steps += [Step("read", 100.0, 100.1), Step("place", 100.6, 100.6)]
    trail.calls += [
        LanguageCall(prefill, "prefill", 100.1, 100.6, write_timing(told)),
        LanguageCall(decode, "decode", 100.6, 101.0, "kv;dur=250, wait;dur=0, prefill;dur=50, ttft;dur=380"),
    ]
    base = record_of_one_image()
    record = dataclasses.replace(base, trail=trail, first_at=101.0)
    timeline = timeline_of(record)
    spans = rounded(timeline.spans)
    assert ("answer", prefill, 0.525, 0.575) in spans
    assert ("return", "proxy", 0.575, 0.6) in spans
    assert ("kv", decode, 0.69, 0.94) in spans
    assert ("prefill", decode, 0.94, 0.99) in spans
    assert timeline.covered() == pytest.approx(1.0)


def test_an_answer_without_tokens_is_covered_to_its_first_bytes_and_decodes_nothing() -> None:
    told = [entry("queue", 0.1, at=0.1), entry("prefill", 0.2, at=0.2), entry("pooled", 0.4), entry("total", 0.5)]
    trail = Trail(100.0)
    trail.steps += [Step("read", 100.0, 100.1)]
    trail.calls.append(LanguageCall(PD, "pd", 100.1, 100.7, write_timing(told)))
    record = dataclasses.replace(
        record_of_one_image(), path="/v1/embeddings", trail=trail, first_at=101.0, ended_at=102
    )
    timeline = timeline_of(record)
    assert rounded(timeline.spans) == [
        ("read", "proxy", 0.0, 0.1),
        ("send", "proxy", 0.1, 0.15),
        ("prepare", PD, 0.15, 0.25),
        ("queue", PD, 0.25, 0.35),
        ("prefill", PD, 0.35, 0.55),
        ("answer", PD, 0.55, 0.65),
        ("return", "proxy", 0.65, 1.0),
    ]
    assert timeline.first_token == pytest.approx(1.0)
    assert timeline.covered() == pytest.approx(1.0)


def test_what_an_instance_says_stays_within_its_call() -> None:
    record = record_of_one_image()
    record.trail.calls[
        0
    ].timing = "ttft;dur=9e9, queue;dur=1e9;at=1e9, prefill;dur=1;at=-5, item0;desc=waited;dur=1e9;at=1e9"
    timeline = timeline_of(record)
    assert all(0 <= span.start < span.end <= timeline.end for span in timeline.spans)
    critical_path(timeline)


def test_a_trace_has_no_two_spans_of_one_thread_that_overlap_in_part() -> None:
    trace = trace_of(info_of(record_of_one_image()))
    events: Any = trace["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        "critical path",
        "proxy",
        ENCODER,
        PD,
    }
    named = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert named == {"request", "image 1"}  # as on the dashboard
    assert all({"name", "cat", "ph", "ts", "dur", "pid", "tid"} <= set(event) for event in events if event["ph"] == "X")
    json.dumps(trace)


def test_the_last_records_and_the_slowest_are_kept() -> None:
    records = Records(kept=3, slowest_kept=2)
    for number, seconds in enumerate([9.0, 1.0, 8.0, 2.0, 3.0]):
        records.keep(record_of_one_image(request_id=str(number), ended_at=100.0 + seconds))
    assert [one.id for one in records.last()] == ["4", "3", "2"]
    assert [one.id for one in records.slowest()] == ["0", "2"]
    records.keep(record_of_one_image(request_id="0", ended_at=109.5))
    assert [one.seconds for one in records.named("0")] == [9.5, 9.0]
    assert list(records.named("1")) == []


def test_a_trail_is_bounded() -> None:
    trail = Trail(0.0)
    for _ in range(100):
        trail.passed("retry")
        trail.answered(trail.call_language(PD, "pd"), "x" * 8000)
        trail.encoded("i", 0.0, EncodedAt(EncoderCall(ENCODER, 0.0, 1.0, "y" * 8000), 0))
    assert max(len(trail.steps), len(trail.calls), len(trail.items)) <= 64
    assert (
        sum(len(call.timing) for call in trail.calls) + sum(len(i.encoded.call.timing) for i in trail.items) <= 64 << 10
    )


async def chat_with_report(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer as a PD that waited for an image, and tells so."""
    loop = asyncio.get_running_loop()
    arrived = loop.time()
    await instance.hears.wait()
    ttft = loop.time() - arrived
    entries = [entry("queue", 0.0, at=0.0), entry("prefill", ttft, at=0.0), entry("ttft", ttft)]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Server-Timing": write_timing(entries)})
    await response.prepare(request)
    await response.write(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n')
    return response


async def test_every_request_has_a_record(start: Start, images: Images) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    pd.answer = chat_with_report
    front = await start([encoder, pd])
    url = await images(image_bytes())
    await listen(front, ask("secret words", image(url), stream=True))
    (await front.post(b"{nothing", **{"X-Request-Id": "bad"})).error  # noqa: B018
    await front.record("bad")
    answer = await front.get("/requests")
    bad, good = answer.json["requests"]
    assert (bad["id"], bad["status"]) == ("bad", 400)
    assert good["status"] == 200
    assert good["details"]["images"] == 1
    assert good["covered"] >= 0.98
    assert {"read", "parse", "images", "fetch", "await encoder", "encode call", "decode"} <= {
        span["name"] for span in good["spans"]
    }
    assert good["critical_path"]
    assert url.encode() not in answer.body
    assert b"secret words" not in answer.body
    one = await front.get(f"/requests/{good['id']}")
    assert one.json["spans"] == good["spans"]
    trace = (await front.get(f"/requests/{good['id']}/trace.json")).json
    assert trace["otherData"]["id"] == good["id"]
    assert (await front.get("/requests/unknown")).status == 404
    assert (await front.get("/requests?limit=0")).error["param"] == "limit"
    assert (await front.get("/requests?order=x")).error["param"] == "order"


@pytest.mark.parametrize("path", ["/requests", "/requests/r", "/requests/r/trace.json"])
async def test_looking_at_records_holds_up_no_requests(start: Start, path: str) -> None:
    front = await start([FakeInstance("pd")])
    begun, others_were_answered = threading.Event(), threading.Event()

    def summed() -> dict[str, float]:
        begun.set()
        return {"were_answered": float(others_were_answered.wait(5))}

    front.service.records.keep(dataclasses.replace(record_of_one_image(), stages=summed))
    looking = asyncio.create_task(front.get(path))
    await asyncio.to_thread(begun.wait, 60)
    assert (await front.post(ask("hello"))).status == 200
    assert not looking.done()
    others_were_answered.set()
    assert (await looking).status == 200


async def test_an_image_that_was_encoded_again_has_a_record_too(start: Start) -> None:
    broken, encoder, pd = FakeInstance("encoder"), FakeInstance("encoder"), FakeInstance("pd")

    async def fail_once(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        broken.answer = encoder.answer = encode
        return web.json_response({"error": {"message": "broken", "type": "x"}}, status=500)

    broken.answer = encoder.answer = fail_once
    front = await start([broken, encoder, pd])
    assert (await front.post(ask(image(image_bytes())), **{"X-Request-Id": "mine"})).status == 200
    assert (await front.record("mine"))["covered"] >= 0.98


async def test_an_answer_that_is_there_before_the_encoders_has_its_image_in_the_record(start: Start) -> None:
    """Of vLLM, which tells an encoder's server later than the PD that an image is encoded."""
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    called, is_over = asyncio.Event(), asyncio.Event()

    async def encode_late(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        called.set()
        await is_over.wait()
        return await encode(instance, request, received)

    encoder.answer, pd.answer = encode_late, after(called, chat)
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())), **{"X-Request-Id": "mine"})).status == 200
    spans = (await front.record("mine"))["spans"]
    is_over.set()
    assert [span["name"] for span in spans if span["where"] == encoder.url.removeprefix("http://")] == ["open call"]
    assert {"await encoder", "open call"} <= {span["name"] for span in spans if span.get("item") == 0}


@pytest.mark.parametrize("path", ["/requests", "/requests/x", "/requests/x/trace.json"])
async def test_records_are_for_the_operator(start: Start, path: str) -> None:
    front = await start([FakeInstance("pd")], admin_key=KEY)
    assert (await front.get(path)).status == 401
    assert (await front.get(path, Authorization="Bearer wrong")).status == 401
    assert (await front.get(path, **front.admin)).status == (200 if path == "/requests" else 404)
