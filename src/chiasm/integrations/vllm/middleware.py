"""What vLLM's HTTP server needs so that chiasm's proxy can treat it like one of chiasm's own instances.

``vllm serve --middleware chiasm.integrations.vllm.middleware.ChiasmMiddleware``. Without it the proxy can use vLLM too, but
waits for the encoder's answer before it calls a PD, and cannot check that instances match.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from prometheus_client import REGISTRY
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.errors import ChiasmError, ConflictError, EmbeddingUnavailableError
from chiasm.fleet_key import read_fleet_key
from chiasm.http import ClientLeftError, json_response, read_body
from chiasm.http.body import Incoming, replayed
from chiasm.http.config import HttpConfig
from chiasm.http.errors import error_response
from chiasm.http.fleet_calls import FleetGuard, caller_of, check_fleet
from chiasm.http.json_size import INLINE_BYTES
from chiasm.http.limits import Refusals
from chiasm.http.liveness import ready_response
from chiasm.integrations.vllm.bodies import EMBEDS_KEY, chat_for_vllm, check_completion, other_for_vllm
from chiasm.integrations.vllm.calibration import measure_costs
from chiasm.integrations.vllm.engines import ask_engines, awaited_embeddings, has_several_servers, lost_embeddings
from chiasm.integrations.vllm.health import Description, asks_engines, describe
from chiasm.integrations.vllm.membership import Membership
from chiasm.integrations.vllm.messages import EXPECT_METHOD, PLACE_METHOD, Exchange
from chiasm.integrations.vllm.named_images import note_named, resolve_stand_ins
from chiasm.integrations.vllm.shutdown import ServerEnd
from chiasm.integrations.vllm.stages import Stages, has_failed
from chiasm.server.config import ServerConfig
from chiasm.server.losses import MAX_QUESTION_BYTES, read_question, until_told
from chiasm.server.places import MAX_PLACES_BYTES, read_places
from chiasm.wire import (
    AWAITED_PATH,
    CHAT_PATH,
    COMPLETIONS_PATH,
    DRAIN_PATH,
    DRAINING,
    IMAGE_PATHS,
    LOST_PATH,
    OTHER_PATHS,
    PLACES_PATH,
    AwaitedEmbeddings,
    Costs,
    DrainState,
    Health,
)

_SHOWN_BYTES = 200
_NO_EMBEDDING = EmbeddingUnavailableError(
    "An embedding of this request did not arrive in time or could not be used; the log of the instance says which."
)
_MAX_ORDER_BYTES = 16 << 10
_WHILE_ENDING = (PLACES_PATH, DRAIN_PATH, LOST_PATH)
"""What is asked of a server that takes no new requests, too."""
_HARMLESS_METHODS = ("GET", "HEAD", "OPTIONS")
_T = TypeVar("_T")


class ChiasmMiddleware:
    """Answers /health with what the instance is, tells the engine where embeddings are, and replaces image sizes in chat
    completions by vLLM's metadata; in responses and messages too, which have no names of images (``named_images.py``).

    When vLLM is asked to end, it lets what runs end first (``shutdown.py``). It also keeps texts from naming the place of an
    image, refuses bodies of completions that are larger or say more than chiasm's own instances take (``bodies.py``),
    explains the error of a request that failed for lack of an embedding, and tells where the time of an answer went
    (``stages.py``).

    Only processes of the fleet (``http/fleet_calls.py``; the key is in CHIASM_FLEET_KEY) may name images and embeddings, hand
    KV over, and use paths that chiasm doesn't know. Everything else passes unchanged.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int = ServerConfig.max_body_bytes,
        max_text_bytes: int = HttpConfig.max_text_bytes,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_text_bytes = max_text_bytes
        self._fleet_key = read_fleet_key()
        self._guard = FleetGuard(self._answer, self._fleet_key)
        self._describing: asyncio.Task[Description] | None = None
        self._end = ServerEnd()
        self._membership = Membership(self._end, self._fleet_key)
        self._stages = Stages()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # the server starts, after vLLM has taken the signals
            self._end.take_over(scope["app"].state)
            self._membership.start(scope["app"].state)
            self._stages.watch(scope["app"].state)
        # What runs while the server ends still waits for embeddings, and has to learn where they are.
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] not in _WHILE_ENDING:
            await self._end.run(self._guard, scope, receive, send)
        else:
            await self._guard(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = (scope["method"], scope["path"]) if scope["type"] == "http" else ("GET", "")
        if (method, path) == ("GET", "/health"):
            await self._health(scope, receive, send)
        elif (method, path) == ("GET", "/livez"):
            await json_response({"status": "ok"})(scope, receive, send)
        elif (method, path) == ("GET", "/readyz"):
            status, health = await self._current_health(scope, receive)
            await ready_response(health.status, status == HTTPStatus.OK)(scope, receive, send)
        elif (method, path) == ("POST", DRAIN_PATH):
            await _answering(self._drain)(scope, receive, send)
        elif (method, path) == ("GET", AWAITED_PATH) and (await self._described(scope)).has_connector:
            await _answering(self._awaited)(scope, receive, send)
        elif (method, path) == ("POST", LOST_PATH) and (await self._described(scope)).health.tells_lost:
            await _answering(self._lost)(scope, receive, send)
        elif (method, path) == ("POST", PLACES_PATH) and (await self._described(scope)).has_connector:
            await _answering(self._expect)(scope, receive, send)
        elif (method, path) == ("POST", CHAT_PATH):
            await self._stages.run(_answering(self._chat), scope, receive, send)
        elif (method, path) == ("POST", COMPLETIONS_PATH):
            await self._stages.run(_answering(self._completion), scope, receive, send)
        elif method == "POST" and path in OTHER_PATHS and caller_of(scope).is_of_fleet:
            await self._stages.run(_answering(self._other) if path in IMAGE_PATHS else self._app, scope, receive, send)
        elif method in _HARMLESS_METHODS or caller_of(scope).is_of_fleet:
            await self._app(scope, receive, send)
        else:
            await _answering(self._for_stranger)(scope, receive, send)

    async def _described(self, scope: Scope) -> Description:
        """Return the instance's description, which is made once; after a failure it is tried again."""
        task = self._describing
        if task is None or (task.done() and task.exception() is not None):
            task = self._describing = asyncio.create_task(self._describe(scope["app"].state))
        return await asyncio.shield(task)

    async def _describe(self, state: Any) -> Description:
        answers = await ask_engines(state, PLACE_METHOD) if asks_engines(state.vllm_config) else []
        await self._stages.ask_engines(state)
        costs = await measure_costs(state) if self._stages.are_of_answers else Costs()
        exchanges = [msgspec.json.decode(answer, type=Exchange) for answer in answers]
        return await asyncio.to_thread(describe, state, exchanges, costs, resolves_stand_ins=resolve_stand_ins())

    async def _placeholder(self, scope: Scope) -> str:
        """Return the word that stands for an image, or "" if it isn't known."""
        try:
            return (await self._described(scope)).placeholder
        except (ChiasmError, OSError):  # /health says why
            return ""

    # ---- /health ----------------------------------------------------------------------------------------------------

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, health = await self._current_health(scope, receive)
        await self._membership.told.ask(scope["app"].state)
        health = msgspec.structs.replace(health, incarnation=self._membership.incarnation, load=self._membership.load)
        if self._fleet_key is not None:
            names, clock = list(self._fleet_key.names), int(time.time() * 1000)
            health = msgspec.structs.replace(health, fleet_keys=names, clock_milliseconds=clock)
        await json_response(health, status)(scope, receive, send)

    async def _current_health(self, scope: Scope, receive: Receive) -> tuple[int, Health]:
        if self._end.is_asked:
            return 503, Health(status=DRAINING)
        status, message = await self._ask_vllm(scope, receive)
        health = Health(status="failed", message=message or "vLLM's engine has stopped; its log says why.")
        if status == 200:
            try:
                health = await asyncio.to_thread((await self._described(scope)).current_health)
            except (ChiasmError, OSError) as error:
                status, health = 503, Health(status="failed", message=str(error))
        return status, health

    async def _ask_vllm(self, scope: Scope, receive: Receive) -> tuple[int, str]:
        """Return the status and the beginning of the body with which vLLM itself answers."""
        status, body = 500, b""

        async def note(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                body += message.get("body", b"")[: _SHOWN_BYTES - len(body)]

        await self._app({**scope, "path": "/health", "raw_path": b"/health"}, receive, note)
        return status, body.decode(errors="replace")

    async def _drain(self, scope: Scope, incoming: Incoming) -> ASGIApp:
        check_fleet(caller_of(scope), "Draining an instance")
        await read_body(incoming, Headers(scope=scope), _MAX_ORDER_BYTES)
        if has_several_servers(scope["app"].state):
            raise ConflictError(
                "Several API servers share the engines of this instance. An order to drain reaches one of them, and when "
                "that has ended, vLLM ends the others with all that they answer. Send SIGTERM to its `vllm serve`, whose "
                "--shutdown-timeout is the time for what runs, or start it with --api-server-count 1."
            )
        self._end.drain()
        state = DrainState(incarnation=self._membership.incarnation, requests=self._end.requests)
        return json_response(state, HTTPStatus.ACCEPTED)

    # ---- embeddings ---------------------------------------------------------------------------------------------------

    async def _awaited(self, scope: Scope, incoming: Incoming) -> ASGIApp:
        """Name the embeddings that the requests of all engines wait for. Waits for the end of a step."""
        check_fleet(caller_of(scope), "What embeddings are awaited")
        return json_response(AwaitedEmbeddings(identifiers=await awaited_embeddings(scope["app"].state)))

    async def _lost(self, scope: Scope, incoming: Incoming) -> ASGIApp:
        """Answer when some embeddings are lost, at the end of the time, or when the server is asked to end."""
        check_fleet(caller_of(scope), "What embeddings are lost")
        question = read_question(await read_body(incoming, Headers(scope=scope), MAX_QUESTION_BYTES))
        told = lost_embeddings(scope["app"].state, question.asker, question.published)
        lost = await until_told(told, question.seconds, receive=incoming, ends=self._end.asked)
        return json_response(AwaitedEmbeddings(identifiers=lost))

    async def _expect(self, scope: Scope, incoming: Incoming) -> ASGIApp:
        """Tell all engines where embeddings are or will be. Waits for the end of a step."""
        check_fleet(caller_of(scope), "Saying where embeddings are")
        told = read_places(await read_body(incoming, Headers(scope=scope), MAX_PLACES_BYTES))
        await ask_engines(scope["app"].state, EXPECT_METHOD, msgspec.json.encode(told).decode())
        return Response(status_code=HTTPStatus.NO_CONTENT)

    # ---- what vLLM answers --------------------------------------------------------------------------------------------

    async def _for_stranger(self, scope: Scope, incoming: Incoming) -> ASGIApp:
        """Refuse any other path, since it may be one that does what only the fleet may."""
        check_fleet(caller_of(scope), f"{scope['method']} {scope['path'][:_SHOWN_BYTES]}")
        return self._app

    async def _completion(self, scope: Scope, incoming: Incoming) -> ASGIApp:
        body, limit = await read_body(incoming, Headers(scope=scope), self._max_body_bytes), self._max_text_bytes
        await _beside(body, lambda: check_completion(body, caller_of(scope), max_text_bytes=limit))
        return self._with_body(body)

    async def _chat(self, scope: Scope, incoming: Incoming) -> ASGIApp:
        given, described, placeholder = await self._given(scope, incoming)
        limit = self._max_text_bytes
        body = await _beside(
            given, lambda: chat_for_vllm(given, caller_of(scope), described, placeholder, max_text_bytes=limit)
        )
        return self._with_body(body, has_embeddings=described is not None)

    async def _other(self, scope: Scope, incoming: Incoming) -> ASGIApp:
        """Responses and messages."""
        given, described, placeholder = await self._given(scope, incoming)
        path, limit = scope["path"], self._max_text_bytes
        body, named = await _beside(
            given, lambda: other_for_vllm(path, given, described, placeholder, max_text_bytes=limit)
        )
        note_named(named)
        return self._with_body(body, has_embeddings=described is not None)

    async def _given(self, scope: Scope, incoming: Incoming) -> tuple[bytes, Description | None, str]:
        """Return a body, the instance's description if the body may have embeddings, and the word for an image."""
        body = await read_body(incoming, Headers(scope=scope), self._max_body_bytes)
        described = await self._described(scope) if EMBEDS_KEY in body else None
        return body, described, await self._placeholder(scope)

    def _with_body(self, body: bytes, *, has_embeddings: bool = False) -> ASGIApp:
        """Have vLLM answer a request with this body, and explain its errors if an embedding may be the reason."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            told = _explained(scope, receive, send) if has_embeddings else send
            await self._app(_with_length(scope, body), replayed(body, receive), told)

        return answer


def _answering(prepare: Callable[[Scope, Incoming], Awaitable[ASGIApp]]) -> ASGIApp:
    """Have a request answered by what ``prepare`` returns; refuse it if that raises a ChiasmError."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        incoming = Incoming(receive)
        try:
            prepared = await prepare(scope, incoming)
        except ClientLeftError:
            return
        except ChiasmError as error:
            await _refuse(error, incoming, scope, receive, send)
            return
        await prepared(scope, receive, send)

    return answer


async def _beside(body: bytes, read: Callable[[], _T]) -> _T:
    """Return what ``read`` makes of the body; of a large one, beside the event loop."""
    return read() if len(body) <= INLINE_BYTES else await asyncio.to_thread(read)


@functools.cache
def _refusals() -> Refusals:
    """The counters of what is refused here, among vLLM's metrics."""
    return Refusals(REGISTRY)


async def _refuse(error: ChiasmError, incoming: Incoming, scope: Scope, receive: Receive, send: Send) -> None:
    if error.limit is not None:
        _refusals().note(error.limit)
    _refusals().note_error(error.code or error.kind)
    await incoming.discard(HttpConfig.discard_seconds, HttpConfig.discard_bytes)
    await error_response(error)(scope, receive, send)


def _with_length(scope: Scope, body: bytes) -> Scope:
    scope = dict(scope)
    headers = MutableHeaders(scope=scope)  # copies the headers into the new scope
    del headers["transfer-encoding"]
    del headers["content-encoding"]  # the body has been decompressed
    headers["content-length"] = str(len(body))
    return scope


def _explained(scope: Scope, receive: Receive, send: Send) -> Send:
    """Return a ``send`` that explains an error 500: vLLM says only "Internal server error" if the connector fails a request.

    vLLM begins the stream of a chat at the first output, even if that is a failure, so the head waits for what comes first. If
    its engine has died, vLLM says so, and the proxy calls another instance.
    """
    head: Message | None = None
    is_replaced = False

    async def explained(message: Message) -> None:
        nonlocal head, is_replaced
        if is_replaced:
            return
        is_head = message["type"] == "http.response.start"
        is_error = message["status"] == 500 if is_head else head is not None and has_failed()
        if is_error and not scope["app"].state.engine_client.errored:
            is_replaced = True
            await error_response(_NO_EMBEDDING)(scope, receive, send)
        elif is_head:
            head = message
        else:
            if head is not None:
                await send(head)
                head = None
            await send(message)

    return explained
