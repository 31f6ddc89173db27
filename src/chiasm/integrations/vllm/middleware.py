"""What vLLM's HTTP server needs so that chiasm's proxy can treat it like one of chiasm's own instances.

``vllm serve --middleware chiasm.integrations.vllm.middleware.ChiasmMiddleware``. Without it the proxy can use vLLM too, but
waits for the encoder's answer before it calls a PD, and cannot check that instances match.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import Any

import msgspec
from msgspec import Raw
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.chat_body import json_object, with_content_parts, with_texts
from chiasm.ec_transfer import check_identifier
from chiasm.errors import ChiasmError, Code, EmbeddingUnavailableError, InvalidRequestError
from chiasm.fleet_key import read_fleet_key
from chiasm.http import ClientLeftError, json_response, read_body
from chiasm.http.body import Incoming
from chiasm.http.config import HttpConfig
from chiasm.http.errors import error_response
from chiasm.http.fleet_calls import Caller, FleetGuard, caller_of, check_fleet
from chiasm.http.liveness import ready_response
from chiasm.integrations.vllm.health import Description, asks_engines, describe
from chiasm.integrations.vllm.membership import Membership
from chiasm.integrations.vllm.messages import AWAITED_METHOD, EXPECT_METHOD, PLACE_METHOD, Exchange
from chiasm.integrations.vllm.shutdown import ServerEnd
from chiasm.models.families.base import SIZE_KEY
from chiasm.server.config import ServerConfig
from chiasm.server.places import MAX_PLACES_BYTES, read_places
from chiasm.wire import (
    AWAITED_PATH,
    CHAT_PATH,
    COMPLETIONS_PATH,
    DRAIN_PATH,
    DRAINING,
    PLACES_PATH,
    UNREADABLE,
    AwaitedEmbeddings,
    DrainState,
    Health,
)

_EMBEDS = "image_embeds"
_EMBEDS_KEY = f'"{_EMBEDS}"'.encode()
_SHOWN_BYTES = 200
_JOINER = "\u2060"
"""A character without width, between which and its neighbours no line is broken."""
_NO_EMBEDDING = EmbeddingUnavailableError(
    "An embedding of this request did not arrive in time or could not be used, or vLLM's engine has failed; the log of the "
    "instance says which."
)
_MAX_ORDER_BYTES = 16 << 10
_WHILE_ENDING = (PLACES_PATH, DRAIN_PATH)
"""What is asked of a server that takes no new requests, too."""
_HARMLESS_METHODS = ("GET", "HEAD", "OPTIONS")
_OF_FLEET = ("kv_transfer_params", "ec_transfer_params")
"""Fields of a request that only the fleet may give."""
_fields = msgspec.json.Decoder(dict[str, Raw])


class ChiasmMiddleware:
    """Answers /health with what the instance is, tells the engine where embeddings are, and replaces image sizes in chat
    completions by vLLM's metadata.

    When vLLM is asked to end, it lets what runs end first (``shutdown.py``). It also keeps texts from naming the place of an
    image, refuses bodies of chat completions that are larger than chiasm's own instances take, and explains the error of a
    request that failed for lack of an embedding.

    Only processes of the fleet (``http/fleet_calls.py``; the key is in CHIASM_FLEET_KEY) may name images and embeddings, hand
    KV over, and use paths that chiasm doesn't know. Everything else passes unchanged.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int = ServerConfig.max_body_bytes) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._fleet_key = read_fleet_key()
        self._guard = FleetGuard(self._answer, self._fleet_key)
        self._describing: asyncio.Task[Description] | None = None
        self._end = ServerEnd()
        self._membership = Membership(self._end, self._fleet_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # the server starts, after vLLM has taken the signals
            self._end.take_over(scope["app"].state)
            self._membership.start(scope["app"].state)
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
            await self._drain(scope, receive, send)
        elif (method, path) == ("GET", AWAITED_PATH) and (await self._described(scope)).has_connector:
            await self._awaited(scope, receive, send)
        elif (method, path) == ("POST", PLACES_PATH) and (await self._described(scope)).has_connector:
            await self._expect(scope, receive, send)
        elif (method, path) == ("POST", CHAT_PATH):
            await self._chat(scope, receive, send)
        elif method in _HARMLESS_METHODS or caller_of(scope).is_of_fleet:
            await self._app(scope, receive, send)
        else:
            await self._for_stranger(scope, receive, send)

    async def _described(self, scope: Scope) -> Description:
        """Return the instance's description, which is made once; after a failure it is tried again."""
        task = self._describing
        if task is None or (task.done() and task.exception() is not None):
            task = self._describing = asyncio.create_task(self._describe(scope["app"].state))
        return await asyncio.shield(task)

    @staticmethod
    async def _describe(state: Any) -> Description:
        answers = await _ask_engines(state, PLACE_METHOD) if asks_engines(state.vllm_config) else []
        exchanges = [msgspec.json.decode(answer, type=Exchange) for answer in answers]
        return await asyncio.to_thread(describe, state, exchanges)

    async def _placeholder(self, scope: Scope) -> str:
        """Return the word that stands for an image, or "" if it isn't known."""
        try:
            return (await self._described(scope)).placeholder
        except (ChiasmError, OSError):  # /health says why
            return ""

    # ---- /health ----------------------------------------------------------------------------------------------------

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, health = await self._current_health(scope, receive)
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

    async def _drain(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = Incoming(receive)
        try:
            check_fleet(caller_of(scope), "Draining an instance")
            await read_body(incoming, Headers(scope=scope), _MAX_ORDER_BYTES)
        except ClientLeftError:
            return
        except ChiasmError as error:
            await _refuse(error, incoming, scope, receive, send)
            return
        self._end.drain()
        state = DrainState(incarnation=self._membership.incarnation, requests=self._end.requests)
        await json_response(state, HTTPStatus.ACCEPTED)(scope, receive, send)

    # ---- embeddings ---------------------------------------------------------------------------------------------------

    async def _awaited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Name the embeddings that the requests of all engines wait for. Waits for the end of a step."""
        try:
            check_fleet(caller_of(scope), "What embeddings are awaited")
        except ChiasmError as error:
            await error_response(error)(scope, receive, send)
            return
        answers = await _ask_engines(scope["app"].state, AWAITED_METHOD)
        awaited = dict.fromkeys(name for names in answers for name in names)
        await json_response(AwaitedEmbeddings(identifiers=list(awaited)))(scope, receive, send)

    async def _expect(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell all engines where embeddings are or will be. Waits for the end of a step."""
        incoming = Incoming(receive)
        try:
            check_fleet(caller_of(scope), "Saying where embeddings are")
            body = await read_body(incoming, Headers(scope=scope), MAX_PLACES_BYTES)
            told = read_places(body)
        except ClientLeftError:
            return
        except ChiasmError as error:
            await _refuse(error, incoming, scope, receive, send)
            return
        await _ask_engines(scope["app"].state, EXPECT_METHOD, msgspec.json.encode(told).decode())
        await Response(status_code=HTTPStatus.NO_CONTENT)(scope, receive, send)

    # ---- strangers ----------------------------------------------------------------------------------------------------

    async def _for_stranger(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a text completion; any other path may be one that does what only the fleet may."""
        incoming = Incoming(receive)
        try:
            if scope["path"] != COMPLETIONS_PATH:
                check_fleet(caller_of(scope), f"{scope['method']} {scope['path'][:_SHOWN_BYTES]}")
            headers = Headers(scope=scope)
            body = await read_body(incoming, headers, self._max_body_bytes)
            _check_stranger(body, caller_of(scope))
        except ClientLeftError:
            return
        except ChiasmError as error:
            await _refuse(error, incoming, scope, receive, send)
            return
        await self._app(_with_length(scope, body), _replayed(body, receive), send)

    # ---- chat completions -------------------------------------------------------------------------------------------

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = Incoming(receive)
        try:
            headers = Headers(scope=scope)
            given = body = await read_body(incoming, headers, self._max_body_bytes)
            if not (caller := caller_of(scope)).is_of_fleet:
                _check_stranger(body, caller)
            if _EMBEDS_KEY in body:
                body = _with_grids(body, await self._described(scope))
                send = _explained(scope, receive, send)
            body = _without_placeholders(body, await self._placeholder(scope))
            if body is not given or "content-encoding" in headers:
                scope = _with_length(scope, body)
        except ClientLeftError:
            return
        except ChiasmError as error:
            await _refuse(error, incoming, scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)


async def _refuse(error: ChiasmError, incoming: Incoming, scope: Scope, receive: Receive, send: Send) -> None:
    await incoming.discard(HttpConfig.discard_seconds, HttpConfig.discard_bytes)
    await error_response(error)(scope, receive, send)


def _check_stranger(body: bytes, caller: Caller) -> None:
    """Raise ForbiddenError for a body that does what only the fleet may, InvalidRequestError for one that isn't understood.

    vLLM understands some JSON that isn't valid, so that it can't be left to refuse it.
    """

    def check(part: Raw) -> Raw:
        fields = _fields.decode(part) if bytes(part).startswith(b"{") else {}  # vLLM takes bare strings too
        if _is_given(fields, "uuid"):
            check_fleet(caller, "Naming an image (uuid)")
        if _EMBEDS in fields:
            check_fleet(caller, f"Asking about an image by its name ({_EMBEDS})")
        return part

    try:
        fields = _fields.decode(body)
        if "messages" in fields:
            with_content_parts(body, check)
    except UNREADABLE:
        raise InvalidRequestError("The body is not valid JSON of a completion.", code=Code.INVALID_JSON) from None
    for name in _OF_FLEET:
        if _is_given(fields, name):
            check_fleet(caller, f"Handing over what instances have computed ({name})")


async def _ask_engines(state: Any, method: str, *arguments: str) -> list[Any]:
    """Call a method of all engines; return what each answers."""
    core = state.engine_client.engine_core
    if hasattr(core, "call_utility_all_async"):
        answers: list[Any] = await core.call_utility_all_async(method, *arguments)
        return answers
    return [await core.call_utility_async(method, *arguments)]


def _is_given(fields: dict[str, Raw], name: str) -> bool:
    return name in fields and bytes(fields[name]) != b"null"


def _with_grids(body: bytes, described: Description) -> bytes:
    """Return the body with each ``image_size`` of an ``image_embeds`` part replaced by what vLLM sizes placeholders by.

    vLLM takes ``image_grid_thw``, which is in the encoder's answer. chiasm's proxy knows height and width before that, and the
    grid follows from them. A body that isn't a chat completion is returned as it is, for vLLM to refuse. Raises
    InvalidRequestError for a bad size, and for a bad name of an embedding that chiasm's connector would look for.
    """
    is_changed = False

    def with_grid(part: Raw) -> bytes | Raw:
        nonlocal is_changed
        fields: dict[str, Any] = _fields.decode(part) if _EMBEDS_KEY in bytes(part) else {}
        embeds: Any = msgspec.json.decode(fields.get(_EMBEDS, b"null"))
        if not isinstance(embeds, dict):
            return part
        is_sized = SIZE_KEY in embeds
        if is_sized or described.has_connector:
            check_identifier(msgspec.json.decode(fields.get("uuid", b"null")))
        if not is_sized:
            return part
        if described.processor is None:
            raise InvalidRequestError(
                "This instance cannot tell how many tokens an image of this size takes; send the metadata of the encoder's "
                "answer, or the image.",
                param="messages",
            )
        is_changed = True
        grid = described.processor.geometry_of_metadata(embeds).metadata
        return json_object({**fields, _EMBEDS: msgspec.json.encode(grid)})

    try:
        rewritten = with_content_parts(body, with_grid)
    except UNREADABLE:
        return body
    return rewritten if is_changed else body


def _without_placeholders(body: bytes, placeholder: str) -> bytes:
    """Return the body with an invisible character in each placeholder of an image that a text contains.

    vLLM would put the embedding of an image there, and leave the image's own place empty.
    """
    if not placeholder or not (placeholder[0].encode() in body or b"\\u" in body):
        return body
    before, is_changed = "", False

    def broken(text: str) -> str:
        nonlocal before, is_changed
        changed = text.replace(placeholder, placeholder[0] + _JOINER + placeholder[1:])
        if placeholder in before + changed:  # a template may join two texts
            changed = _JOINER + changed
        is_changed = is_changed or changed != text
        before = (before + changed)[1 - len(placeholder) :]
        return changed

    try:
        rewritten = with_texts(body, broken)
    except UNREADABLE:
        return body
    return rewritten if is_changed else body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return the ``receive`` of an application that has yet to read a body that was read here."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed


def _with_length(scope: Scope, body: bytes) -> Scope:
    scope = dict(scope)
    headers = MutableHeaders(scope=scope)  # copies the headers into the new scope
    del headers["transfer-encoding"]
    del headers["content-encoding"]  # the body has been decompressed
    headers["content-length"] = str(len(body))
    return scope


def _explained(scope: Scope, receive: Receive, send: Send) -> Send:
    """Return a ``send`` that explains status 500: vLLM says only "Internal server error" if the connector fails a request."""
    is_replaced = False

    async def explained(message: Message) -> None:
        nonlocal is_replaced
        if message["type"] == "http.response.start" and message["status"] == 500:
            is_replaced = True
            await error_response(_NO_EMBEDDING)(scope, receive, send)
        elif not is_replaced:
            await send(message)

    return explained
