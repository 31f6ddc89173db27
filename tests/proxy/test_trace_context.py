"""W3C Trace Context: what the proxy believes of a client's headers, and what instances get of them."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from chiasm.proxy.records.trace_context import MAX_STATE_CHARACTERS, MAX_STATE_MEMBERS, read_trace_context

from .conftest import Start, ask, image, image_bytes
from .instances import FakeInstance

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def headers(parent: str | None = PARENT, *states: str) -> Headers:
    named = [("traceparent", parent), *(("tracestate", state) for state in states)]
    return Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in named if value is not None])


def test_a_clients_span_is_read_and_written_again() -> None:
    context = read_trace_context(headers(PARENT, "rojo=00f067aa0ba902b7, congo=t61rcWkgMzE"))
    assert context is not None
    assert (context.trace_id, context.span_id, context.is_sampled) == (int(TRACE, 16), int(SPAN, 16), True)
    assert context.headers() == {
        "traceparent": PARENT,
        "tracestate": "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
    }


@pytest.mark.parametrize(
    ("flags", "passed_on", "sampled"), [("00", "00", False), ("03", "03", True), ("fe", "02", False)]
)
def test_flags_that_are_not_known_are_cleared(flags: str, passed_on: str, sampled: bool) -> None:
    context = read_trace_context(headers(f"00-{TRACE}-{SPAN}-{flags}"))
    assert context is not None
    assert context.is_sampled is sampled
    assert context.headers()["traceparent"] == f"00-{TRACE}-{SPAN}-{passed_on}"


@pytest.mark.parametrize("given", [f"cc-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-what-the-future-brings"])
def test_a_later_version_is_read_as_far_as_it_is_known(given: str) -> None:
    context = read_trace_context(headers(given))
    assert context is not None
    assert context.headers() == {"traceparent": PARENT}


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "00",
        PARENT.upper(),
        PARENT + "-00",
        PARENT + "\x00",
        "ff" + PARENT[2:],
        "0x" + PARENT[2:],
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01, 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}é-{SPAN}-01",
        "00-" * 20_000,
        f"cc-{TRACE}-{SPAN}-01-" + "x" * 60_000,
    ],
)
def test_a_malformed_parent_is_as_none(given: str | None) -> None:
    assert read_trace_context(headers(given, "a=b")) is None


def test_two_parents_are_as_none() -> None:
    assert read_trace_context(Headers(raw=[(b"traceparent", PARENT.encode())] * 2)) is None


@pytest.mark.parametrize(
    ("states", "passed_on"),
    [
        (["a=1", "b=2"], "a=1,b=2"),
        (["a=1,, ,b=2"], "a=1,b=2"),
        (["1t@v=x y"], "1t@v=x y"),
        (["A=1"], ""),
        (["a"], ""),
        (["a=1,a=2"], ""),
        (["a=\r\nX-Other: 1"], ""),
        (["a=é"], ""),
        ([",".join(f"k{number}=v" for number in range(MAX_STATE_MEMBERS + 1))], ""),
        ([f"a{number}={'v' * 200}" for number in range(MAX_STATE_CHARACTERS // 200 + 1)], ""),
        (["a=" + " " * 4000], ""),
    ],
)
def test_a_state_is_passed_on_whole_or_not_at_all(states: list[str], passed_on: str) -> None:
    context = read_trace_context(headers(PARENT, *states))
    assert context is not None
    assert context.state == passed_on


async def test_every_instance_is_told_the_clients_trace(start: Start) -> None:
    encoder, prefill, decode = (FakeInstance(role) for role in ("encoder", "prefill", "decode"))
    front = await start([encoder, prefill, decode])
    body = ask("What?", image(image_bytes()))
    answer = await front.post(body, traceparent=PARENT, tracestate="a=1", **{"X-Request-Id": "mine"})
    assert answer.status == 200
    for instance in (encoder, prefill, decode):
        [received] = instance.received
        assert (received.headers["traceparent"], received.headers["tracestate"]) == (PARENT, "a=1")
    assert (await front.record("mine"))["details"]["trace_id"] == TRACE


async def test_hostile_headers_of_a_trace_are_left_out(start: Start) -> None:
    front = await start([FakeInstance("pd")])
    answer = await front.post(ask("Hi"), traceparent="00-evil", tracestate="a=1")
    assert answer.status == 200
    [received] = front.instances[0].received
    assert not {"traceparent", "tracestate"} & {name.lower() for name in received.headers}


async def test_the_line_of_a_failed_request_has_the_trace(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    front = await start([FakeInstance("pd")])
    with caplog.at_level("INFO", logger="chiasm.requests"):
        assert (await front.post(ask("Hi", model="absent"), traceparent=PARENT)).status == 404
    assert f"trace_id={TRACE}" in caplog.text
