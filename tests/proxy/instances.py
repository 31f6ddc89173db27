"""Small servers that stand in for instances of all roles, and record what they receive.

They build what they send from the types in ``chiasm.wire``; test_contract.py holds them to real instances.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from chiasm.http.listen import bind
from chiasm.wire import (
    AWAITED_PATH,
    DRAIN_PATH,
    DRAINING,
    KV_RELEASE_PATH,
    LOST_PATH,
    PLACES_PATH,
    AwaitedEmbeddings,
    DrainState,
    ECItem,
    ECPlace,
    EmbeddingPlaces,
    ErrorBody,
    ErrorDetail,
    Health,
    KVRelease,
    KVTransferParams,
    LossQuestion,
)

Answering = Callable[..., Awaitable[web.StreamResponse]]

FINGERPRINT = "f" * 64
MODEL = "tiny"
PART = {"kv_connector": "SharedMemoryConnector", "kv_blocks_total": 100, "kv_blocks_free": 100, "max_num_seqs": 8}
"""Health of prefill and decode instances, besides the other fields."""


@dataclass
class Received:
    """One request as it was received."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float = field(default_factory=time.monotonic)
    """When, on the clock of ``time.monotonic``."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """All content parts of all messages."""
        messages = self.json["messages"]
        return [part for message in messages if isinstance(message["content"], list) for part in message["content"]]

    @property
    def params(self) -> dict[str, Any]:
        """What the proxy says about KV, but for the random name of the lease."""
        return {name: value for name, value in self.json["kv_transfer_params"].items() if name != "lease"}

    @property
    def lease(self) -> str:
        return str(self.json["kv_transfer_params"]["lease"])

    @property
    def identifiers(self) -> list[str]:
        return [part["uuid"] for part in self.parts if "uuid" in part]


class FakeInstance:
    """An instance on a port of its own. Set ``answer`` to change its behaviour."""

    def __init__(self, role: str, /, **health: Any) -> None:
        self.role = role
        known: dict[str, Any] = {
            "role": role,
            "model": MODEL,
            "fingerprint": FINGERPRINT,
            "ec_store": "store",
            "version": "1",
            "max_model_len": 4096,
            "max_items": 8,
        }
        self.health: Health | None = Health(**(known | (PART if role in {"prefill", "decode"} else {}) | health))
        """None responds like vLLM without chiasm's middleware: an empty 200, and the model's name elsewhere."""
        self.health_status = 200
        self.health_body: bytes | None = None
        """What /health responds with in place of ``health``."""
        self._awaited_now: list[str] | None = []
        self.awaited_body: bytes | None = None
        """What it says in place of that."""
        self._changed = asyncio.Event()
        """Set, and replaced, when that changes, and with each question that waits and each call."""
        self.questions: list[LossQuestion] = []
        """Those that wait until it lacks one of some embeddings; the health of an instance that takes them should say so."""
        self.waiting_questions = 0
        self.mistakes: list[str] = []
        """Embeddings that it calls lost when such a question names them, although it doesn't lack them."""
        self.lets_wait = True
        """Whether such questions wait; otherwise they are answered at once."""
        self.asked = asyncio.Semaphore(0)
        """Released for each question about them."""
        self.awake = asyncio.Event()
        """While it is clear, the instance is frozen: it takes connections and requests, and responds to none."""
        self.awake.set()
        self.key: str | None = None
        """The API key that requests below /v1 need, as vLLM's --api-key; the health of an instance should say so."""
        self.probes = 0
        """How many it got."""
        self.unanswered_probes = 0
        """How many of the next probes get no response."""
        self.received: list[Received] = []
        self.released: asyncio.Queue[list[str]] = asyncio.Queue()
        """The leases that each call has given back."""
        self.unanswered_releases = 0
        """How many of the next of these calls are broken off."""
        self.told: list[EmbeddingPlaces] = []
        """What it was told about places, message by message."""
        self.messages = 0
        """How many such messages came, taken or not."""
        self._heard = asyncio.Condition()
        self.hears = asyncio.Event()
        """While it is clear, it doesn't answer such messages."""
        self.hears.set()
        self.places_status = 204
        """How it answers them; 0 breaks the connection off."""
        self.models_asked = 0
        self.drains = 0
        """How often it was told to drain."""
        self.drain_body: bytes | None = None
        """What it answers then in place of its state."""
        self.heeds_drains = asyncio.Event()
        """While it is clear, it doesn't answer such an order."""
        self.heeds_drains.set()
        self.arrived = asyncio.Semaphore(0)
        self.gone = asyncio.Semaphore(0)
        """Released for each call that the proxy ended before it was answered."""
        self.answer: Callable[[FakeInstance, web.Request, Received], Awaitable[web.StreamResponse]] = {
            "encoder": encode,
            "prefill": prefill,
            "decode": decode,
        }.get(role, chat)
        self._runner: web.AppRunner | None = None
        self._held: socket.socket | None = None
        """Keeps the port, also while nothing listens there: a server of another test there would answer in its place."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._held.getsockname()[1] if self._held else 0}"

    async def start(self) -> FakeInstance:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_get("/health", self._health)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get(AWAITED_PATH, self._awaited)
        application.router.add_post(LOST_PATH, self._lost)
        application.router.add_post(PLACES_PATH, self._places)
        application.router.add_post(KV_RELEASE_PATH, self._release)
        application.router.add_post(DRAIN_PATH, self._drain)
        application.router.add_post("/{route:.*}", self._take)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0, access_log=None)
        await self._runner.setup()
        if self._held is None:
            self._held = bind("127.0.0.1", 0, listening=False)
        await web.SockSite(self._runner, bind("127.0.0.1", self._held.getsockname()[1])).start()
        return self

    async def kill(self) -> None:
        """Close the port and reset all connections, as SIGKILL does."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        await asyncio.sleep(0)  # connections that were just accepted become known
        assert runner.server is not None
        for connection in runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        self.probes += 1
        await self.awake.wait()
        if self.health_body is not None:
            return web.Response(body=self.health_body)
        if self.unanswered_probes:
            self.unanswered_probes -= 1
            await asyncio.Event().wait()
        if self.health is None:
            return web.Response(status=self.health_status)
        return respond(self.health, status=self.health_status)

    async def _models(self, request: web.Request) -> web.Response:
        self.models_asked += 1
        if self._is_refused(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 2048}]})

    def _is_refused(self, request: web.Request) -> bool:
        return self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}"

    async def _awaited(self, request: web.Request) -> web.Response:
        self.asked.release()
        await self.awake.wait()
        if self.awaited is None:
            return web.Response(status=404)
        if self.awaited_body is not None:
            return web.Response(body=self.awaited_body)
        return respond(AwaitedEmbeddings(identifiers=self.awaited))

    @property
    def awaited(self) -> list[str] | None:
        """Embeddings that it says it lacks; None responds like vLLM without chiasm's middleware, with 404."""
        return self._awaited_now

    @awaited.setter
    def awaited(self, identifiers: list[str] | None) -> None:
        self._awaited_now = identifiers
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Return when something is so that depends on what it awaits, was asked and has received."""
        async with asyncio.timeout(60):
            while not is_so():
                await self._changed.wait()

    async def _lost(self, request: web.Request) -> web.Response:
        question = msgspec.json.decode(await request.read(), type=LossQuestion)
        self.questions.append(question)
        self._change()
        self.waiting_questions += 1
        try:
            while not (
                lost := [name for name in question.published if name in (*(self.awaited or ()), *self.mistakes)]
            ):
                if not (self.lets_wait and question.published) or self._newest_of(question.asker) is not question:
                    break
                await self._changed.wait()
        finally:
            self.waiting_questions -= 1
            self._change()
        return respond(AwaitedEmbeddings(identifiers=lost))

    def _newest_of(self, asker: str) -> LossQuestion:
        return [question for question in self.questions if question.asker == asker][-1]

    async def _places(self, request: web.Request) -> web.Response:
        message = msgspec.json.decode(await request.read(), type=EmbeddingPlaces)
        await self.awake.wait()
        await self.hears.wait()
        if not self.places_status:
            await break_off(request)
        elif self.places_status < 300:
            self.told.append(message)
        async with self._heard:
            self.messages += 1
            self._heard.notify_all()
        return web.Response(status=self.places_status or 500)

    async def until_heard(self, is_enough: Callable[[], bool]) -> None:
        """Return when it has heard enough of places."""
        async with asyncio.timeout(60), self._heard:
            await self._heard.wait_for(is_enough)

    @property
    def places(self) -> dict[str, ECPlace]:
        """Where embeddings are, as it was told last."""
        return {name: place for message in self.told for name, place in message.places.items()}

    async def _drain(self, request: web.Request) -> web.Response:
        assert self.health is not None
        self.drains += 1
        await self.heeds_drains.wait()
        if self.drain_body is not None:
            return web.Response(body=self.drain_body, status=202)
        self.health_status, self.health = 503, msgspec.structs.replace(self.health, status=DRAINING)
        return respond(DrainState(incarnation=self.health.incarnation), status=202)

    async def _release(self, request: web.Request) -> web.Response:
        leases = msgspec.json.decode(await request.read(), type=KVRelease).leases
        if self.unanswered_releases:
            self.unanswered_releases -= 1
            await break_off(request)
        else:
            self.released.put_nowait(leases)
        return web.Response(status=401 if self._is_refused(request) else 204)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        received = Received(request.path, request.headers, await request.read())
        self.received.append(received)
        self._change()
        self.arrived.release()
        if self._is_refused(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            await self.awake.wait()
            return await self.answer(self, request, received)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.release()
            raise


def respond(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(content), status=status, headers=headers, content_type="application/json"
    )


async def encode(instance: FakeInstance, request: web.Request, received: Received) -> web.Response:
    """Answer as an encoder that has published all images."""
    items: dict[str, ECItem] = {}
    for index, name in enumerate(received.identifiers):
        indices = items[name].item_indices if name in items else []
        items[name] = ECItem(item_indices=[*indices, index], metadata=msgspec.Raw(b'{"image_grid_thw":[1,4,6]}'))
    return respond(
        {"object": "chat.completion", "choices": [], "ec_transfer_params": items},
        headers={"Server-Timing": "encode;dur=12.5"},
    )


async def chat(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer as a PD, with two tokens."""
    timing = {"Server-Timing": 'queue;dur=1.5, item0;desc="hit"'}
    head = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL}
    if not received.json.get("stream"):
        message = {"role": "assistant", "content": "a cat"}
        answer = head | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return web.json_response(answer, headers=timing)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"} | timing)
    await response.prepare(request)
    for word in ("a ", "cat"):
        await response.write(event(word))
    await response.write(b": server-timing prefill;dur=3\n\ndata: [DONE]\n\n")
    return response


def event(word: str) -> bytes:
    choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return b"data: " + json.dumps(head | {"choices": [choice]}).encode() + b"\n\n"


async def never(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Don't answer until the proxy ends the call."""
    await asyncio.Event().wait()
    raise AssertionError


def refuse(
    status: int, message: str, *, kind: str = "invalid_request_error", code: str | int | None = None, **headers: str
) -> Answering:
    """Answer with an error."""

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return respond(error_of(message, kind, code), status=status, headers=headers)

    return answer


def error_of(message: str, kind: str = "internal_error", code: str | int | None = None) -> ErrorBody:
    return ErrorBody(error=ErrorDetail(message=message, type=kind, code=code))


def error_event(error: ErrorBody) -> bytes:
    return b"data: " + msgspec.json.encode(error) + b"\n\n"


# Prefill and decode. Their answer to any prompt is WORDS; the token id of a word is its index plus 100.

WORDS = ("the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "slept")
SAID = "".join(WORDS)
TIMING = {"Server-Timing": "prefill;dur=2.5"}

full = refuse(503, "no room", kind="overloaded_error", code="queue_full")
kv_unavailable = refuse(503, "the lease has run out", kind="kv_unavailable_error", code="kv_unavailable")


async def prefill(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer as prefill: with the next word and a handle; with the last word, the answer ends."""
    known = received.params.get("output_token_ids", [])
    index = len(known)
    handle = handle_of(instance, index, received.params)
    ends = index + 1 == min(len(WORDS), received.json.get("max_tokens", len(WORDS)))
    if not received.json.get("stream"):
        answer = whole("".join(WORDS[: index + 1]), "stop" if ends else "length")
        return web.json_response(answer | ({} if ends else {"kv_transfer_params": handle}), headers=TIMING)
    response = await begin_stream(request)
    await response.write((b"" if index else role_event()) + event(WORDS[index]))
    await response.write(end_of_stream() if ends else handle_comment(handle))
    return response


def handle_of(instance: FakeInstance, index: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return the handle of an answer whose words up to and including ``index`` are sampled."""
    handle = KVTransferParams(
        do_remote_prefill=True,
        remote_engine_id=instance.url,
        remote_block_ids=[1, 2],
        remote_request_id=f"r{len(instance.received)}",
        num_tokens=32 + index,
        digest="d1",
        output_token_ids=[100 + one for one in range(index + 1)],
        num_sent=index,
        seed=given.get("seed", 7),
        created=given.get("created", 1),
        cached_tokens=given.get("cached_tokens", 16),
    )
    built: dict[str, Any] = msgspec.to_builtins(handle)
    return built


async def decode(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer as decode: in a stream with the words that were not sent yet, otherwise with all."""
    if not received.json.get("stream"):
        return web.json_response(whole(SAID, "stop"))
    response = await begin_stream(request)
    for index in range(received.params["num_sent"], len(WORDS)):
        await response.write(token_event(index))
    await response.write(end_of_stream())
    return response


def decode_until(words: int, then: Callable[[web.Request, web.StreamResponse], Awaitable[None]]) -> Answering:
    """Answer as decode up to this many words, including prefill's; then do something else."""

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if not received.json.get("stream"):
            response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
            await response.prepare(request)
        else:
            response = await begin_stream(request)
            for index in range(received.params["num_sent"], words):
                await response.write(token_event(index))
        await then(request, response)
        return response

    return answer


async def break_off(request: web.Request, response: web.StreamResponse | None = None) -> None:
    """Reset the connection; what was written before reaches the proxy."""
    await asyncio.sleep(0)
    assert request.transport is not None
    request.transport.abort()


def tell(message: str, kind: str, code: str | None) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Send an error event."""

    async def write(request: web.Request, response: web.StreamResponse) -> None:
        await response.write(error_event(error_of(message, kind, code)))

    return write


async def begin_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"} | TIMING)
    await response.prepare(request)
    return response


def role_event() -> bytes:
    return event("").replace(b'"content": ""', b'"role": "assistant", "content": ""')


def token_event(index: int) -> bytes:
    """Return the event of a word of decode, with the announcement of its token."""
    return b": tokens %d\n" % (100 + index) + event(WORDS[index])


def handle_comment(handle: dict[str, Any]) -> bytes:
    return b": kv_transfer_params " + json.dumps(handle).encode() + b"\n\n"


def end_of_stream() -> bytes:
    finish = event("").replace(b'"finish_reason": null', b'"finish_reason": "stop"')
    return finish + b": server-timing decode;dur=3\n\ndata: [DONE]\n\n"


# Prefill and decode of vLLM with chiasm's middleware.

VLLM = {"engine": "vllm 0.32.0", "kv_connector": "NixlConnector"}
VLLM_HANDLE = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[3, 4]], "remote_port": 5600}


def vllm_prefill() -> FakeInstance:
    instance = FakeInstance("prefill", **VLLM)
    instance.answer = prefill_of_vllm
    return instance


def vllm_decode() -> FakeInstance:
    instance = FakeInstance("decode", **VLLM)
    instance.answer = decode_of_vllm
    return instance


async def prefill_of_vllm(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer with a handle that has the number of the call if one is asked for, otherwise as a PD."""
    if "kv_transfer_params" not in received.json:
        return await chat(instance, request, received)
    handle = VLLM_HANDLE | {"remote_engine_id": instance.url, "remote_request_id": f"r{len(instance.received)}"}
    return web.json_response(whole(WORDS[0], "length") | {"kv_transfer_params": handle})


async def decode_of_vllm(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer with all words, including the first."""
    if not received.json.get("stream"):
        return web.json_response(whole(SAID, "stop"))
    response = await begin_stream(request)
    await response.write(role_event())
    for word in WORDS:
        await response.write(event(word))
    await response.write(end_of_stream())
    return response


async def vllm_error_event(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Report like vLLM, after the head of a stream, that its engine failed on a request."""
    if not received.json.get("stream"):
        return respond(_VLLM_FAILURE, status=500)
    response = await begin_stream(request)
    await response.write(error_event(_VLLM_FAILURE) + b"data: [DONE]\n\n")
    return response


_VLLM_FAILURE = error_of("Internal server error", "InternalServerError", 500)


def whole(text: str, finish_reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    head = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL}
    return head | {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


# Faults.

Then = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


def once(first: Answering, then: Answering, *some: FakeInstance) -> None:
    """Have the first call of any of these instances answered by ``first``, and all others by ``then``."""
    in_order([first], then, *some)


def in_order(answers: list[Answering], then: Answering, *some: FakeInstance) -> None:
    """Have the calls of these instances answered by ``answers`` one after another, and all others by ``then``."""
    left = iter(answers)

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return await next(left, then)(instance, request, received)

    for one in some:
        one.answer = answer


def when(event: asyncio.Event, then: Then = break_off) -> Then:
    """Wait for an event before a fault."""

    async def wait(request: web.Request, response: web.StreamResponse) -> None:
        await event.wait()
        await then(request, response)

    return wait


def after(event: asyncio.Event, answer: Answering) -> Answering:
    """Wait for an event before an answer."""

    async def wait(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await event.wait()
        return await answer(instance, request, received)

    return wait


def interrupted_by(pause: asyncio.Event) -> Answering:
    """Stream ``a cat``, and wait for an event between the words."""

    async def stream(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event("a "))
        await pause.wait()
        await response.write(event("cat") + b"data: [DONE]\n\n")
        return response

    return stream


async def lose(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Reset the connection before any response."""
    await break_off(request)
    raise ConnectionError


async def only_a_head(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Reset the connection after the head of a stream."""
    response = await begin_stream(request)
    await break_off(request)
    return response


async def half_a_response(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Reset the connection in the middle of a response that isn't a stream."""
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
    await response.prepare(request)
    await break_off(request)
    return response


@dataclass(frozen=True)
class Pair:
    """Prefill and decode of one engine, for tests of what is the same for both engines."""

    prefill: Callable[[], FakeInstance]
    decode: Callable[[], FakeInstance]
    answer_prefill: Answering
    answer_decode: Answering


CHIASM = Pair(lambda: FakeInstance("prefill"), lambda: FakeInstance("decode"), prefill, decode)
VLLM_PAIR = Pair(vllm_prefill, vllm_decode, prefill_of_vllm, decode_of_vllm)


def received_by(some: list[FakeInstance]) -> list[Received]:
    return [received for one in some for received in one.received]
