"""Records of requests to the paths of vLLM that the proxy passes on: the same stages as those of a chat have."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from aiohttp import web

from chiasm.http.timing import TimingEntry, write_timing
from chiasm.wire import COUNT_TOKENS_PATH, IMAGE_PATHS, MESSAGES_PATH, OTHER_PATHS, RESPONSES_PATH

from .conftest import Images, Start, image_bytes
from .instances import MODEL, VLLM, FakeInstance, Received, encode
from .test_image_paths import body_of, image_of

GENERATING = (RESPONSES_PATH, MESSAGES_PATH, "/v1/chat/completions/batch", "/generative_scoring")
COMPUTES_NOTHING = (COUNT_TOKENS_PATH, "/tokenize", "/detokenize")
POOLING = tuple(path for path in OTHER_PATHS if path not in (*GENERATING, *COMPUTES_NOTHING))
STREAM = [
    b'event: response.created\ndata: {"type":"response.created"}\n\n',
    b'event: response.in_progress\ndata: {"type":"response.in_progress"}\n\n',
    b'event: message_start\r\ndata: {"type":"message_start"}\r\n\r\n',
    b'event: one.delta\ndata: {"delta":"a"}\n\n',
    b'event: end\ndata: {"type":"end"}\n\n',
]
WHOLE = b'{"object" : "whatever",  "it": [1.50, "is"]}'


class PlayedVLLM(FakeInstance):
    """A language instance of vLLM with chiasm's middleware, which tells its stages in the head of each answer."""

    def __init__(self, role: str = "pd", *, pools: bool = False, embedding: asyncio.Event | None = None) -> None:
        """``embedding`` is what its prompts wait for."""
        super().__init__(role, engine=VLLM["engine"], image_paths=list(IMAGE_PATHS))
        self._pools = pools
        self._embedding = embedding
        self.answer = self._compute

    async def _compute(self, instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        now = _clock()
        await _work()
        prefill = now()
        waits: list[TimingEntry] = []
        if self._embedding is not None:
            await self._embedding.wait()
            seconds = now() - prefill
            waits = [TimingEntry("stall", seconds, at=prefill), TimingEntry("item0", seconds, "waited", at=prefill)]
        await _work()
        computed = now()
        entries = [
            TimingEntry("queue", prefill, at=0.0),
            TimingEntry("prefill", computed - prefill, at=prefill),
            TimingEntry("pooled" if self._pools else "ttft", computed),
            *waits,
        ]
        if not received.json.get("stream"):
            await _work()
            entries.append(TimingEntry("total", now()))
            return web.Response(body=WHOLE, headers={"Server-Timing": write_timing(entries)})
        headers = {"Content-Type": "text/event-stream", "Server-Timing": write_timing(entries)}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for event in STREAM:
            await response.write(event)
        return response


async def _work() -> None:
    """Do what takes long beside what lies between two spans, such as a turn of the event loop on a busy machine."""
    await asyncio.sleep(0.01)


def _clock() -> Callable[[], float]:
    """Return what tells the seconds since now."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    return lambda: loop.time() - began


def played_encoder() -> FakeInstance:
    """Return an encoder of vLLM with chiasm's middleware."""

    async def encode_and_tell(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        now = _clock()
        await _work()
        prepared = now()
        await _work()
        encoded = now()
        response = await encode(instance, request, received)
        entries = [
            TimingEntry("preprocess0", prepared, at=0.0),
            TimingEntry("encode0", encoded - prepared, at=prepared),
            TimingEntry("total", now()),
        ]
        response.headers["Server-Timing"] = write_timing(entries)
        return response

    encoder = FakeInstance("encoder", engine=VLLM["engine"])
    encoder.answer = encode_and_tell
    return encoder


def names_in(record: Any, instance: FakeInstance | None = None) -> list[str]:
    """Return the names of spans in the order of their starts: those of an instance, or without one of the proxy."""
    where = "proxy" if instance is None else instance.url.removeprefix("http://")
    return [span["name"] for span in record["spans"] if span["where"] == where]


def check_order(record: Any, instance: FakeInstance, *names: str) -> None:
    """Check that stages of a language instance follow each other without a gap."""
    where = instance.url.removeprefix("http://")
    spans: Mapping[str, Any] = {span["name"]: span for span in record["spans"] if span["where"] == where}
    for before, after in itertools.pairwise(names):
        assert spans[before]["end"] == pytest.approx(spans[after]["start"], abs=1e-5), (before, after)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATING)
async def test_an_answer_that_is_generated_has_the_stages_of_a_chat(start: Start, path: str, stream: bool) -> None:
    pd = PlayedVLLM()
    front = await start([pd])
    answer = await front.post({"model": MODEL, "stream": stream}, path, **{"X-Request-Id": "mine"})
    assert answer.body == (b"".join(STREAM) if stream else WHOLE)
    record = await front.record("mine")
    assert record["covered"] >= 0.98
    assert names_in(record)[:5] == ["read", "parse", "ready", "place", "send"]
    assert ("first token" in names_in(record)) == stream
    assert set(names_in(record, pd)) <= {"prepare", "queue", "prefill", "decode"}
    assert {"queue", "prefill", "decode"} <= set(names_in(record, pd))
    check_order(record, pd, "queue", "prefill")
    assert {"queue", "prefill", "decode"} <= record["stages"].keys()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [RESPONSES_PATH, MESSAGES_PATH])
async def test_an_image_that_is_encoded_apart_has_its_stages(
    start: Start, images: Images, path: str, stream: bool
) -> None:
    published = asyncio.Event()
    encoder, pd = played_encoder(), PlayedVLLM(embedding=published)
    front = await start([encoder, pd])
    url = await images(image_bytes())
    body = body_of(path, image_of(path, url), stream=stream)
    asking = asyncio.ensure_future(front.post(body, path, **{"X-Request-Id": "mine"}))
    await encoder.arrived.acquire()
    while front.service.router.encoders._flights:  # until the proxy has the encoder's answer
        await front.get("/health")
    published.set()
    answer = await asking
    assert answer.body == (b"".join(STREAM) if stream else WHOLE)
    record = await front.record("mine")
    assert record["covered"] >= 0.98
    assert {"read", "parse", "ready", "images", "fetch", "place", "await encoder", "send"} <= set(names_in(record))
    assert {"preprocess", "encode"} <= set(names_in(record, encoder))
    assert {"queue", "wait", "transfer", "decode"} <= set(names_in(record, pd))
    assert {span["name"] for span in record["spans"] if span.get("item") == 0} >= {"fetch", "encode", "transfer"}
    assert not {"call", "encode call"} & {span["name"] for span in record["spans"]}


@pytest.mark.parametrize("path", POOLING)
async def test_a_prompt_that_is_pooled_has_its_stages_and_is_not_decoded(start: Start, path: str) -> None:
    pd = PlayedVLLM(pools=True)
    front = await start([pd])
    answer = await front.post({"model": MODEL}, path, **{"X-Request-Id": "mine"})
    assert answer.body == WHOLE
    record = await front.record("mine")
    assert record["covered"] >= 0.98
    assert {"queue", "prefill", "answer"} <= set(names_in(record, pd)) <= {"prepare", "queue", "prefill", "answer"}
    check_order(record, pd, "queue", "prefill", "answer")
    assert "decode" not in record["stages"]


async def test_what_computes_nothing_has_a_call(start: Start) -> None:
    pd = FakeInstance("pd", engine=VLLM["engine"])
    front = await start([pd])
    for path in COMPUTES_NOTHING:
        name = path.replace("/", ".")
        assert (await front.post({"model": MODEL}, path, **{"X-Request-Id": name})).status == 200
        record = await front.record(name)
        assert "call" in names_in(record, pd)
        assert record["covered"] >= 0.98
