"""What vLLM's HTTP server needs so that chiasm's proxy knows it like one of chiasm's own instances.

``vllm serve --middleware chiasm.integrations.vllm.middleware.ChiasmMiddleware``. Without it vLLM is still of use to the
proxy: that then waits for the encoder's answer before it calls a PD, and cannot check that instances fit each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.errors import ChiasmError, EmbeddingUnavailableError, InvalidRequestError
from chiasm.http.errors import error_body, error_headers
from chiasm.integrations.vllm import placeholders
from chiasm.integrations.vllm.description import Description, describe
from chiasm.integrations.vllm.request_body import read_body, receive_of, scope_of
from chiasm.models.base import ItemGeometry, Metadata
from chiasm.server.config import ServerConfig

_CHAT = ("POST", "/v1/chat/completions")
_HEALTH = ("GET", "/health")
_SAID_BYTES = 200
_NO_EMBEDDING = EmbeddingUnavailableError(
    "An embedding of this request has not come in time or could not be used, or vLLM's engine has failed; the instance's log "
    "says which."
)


class ChiasmMiddleware:
    """Answers /health with what the instance is, and turns images' sizes in chat completions into vLLM's metadata.

    Everything else passes as it is, but for bodies of chat completions larger than chiasm's instances take, and the error of
    a request whose embeddings were not there.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int = ServerConfig.max_body_bytes) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._describing: asyncio.Task[Description] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        called = (scope["method"], scope["path"]) if scope["type"] == "http" else None
        if called == _HEALTH:
            await self._health(scope, receive, send)
        elif called == _CHAT:
            await self._chat(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, message = await self._ask(scope, receive)
        answer: dict[str, Any] = {
            "status": "failed",
            "message": message or "vLLM's engine has stopped; its log says why",
        }
        if status == 200:
            try:
                answer = await asyncio.to_thread((await self._described(scope)).current_health)
            except (ChiasmError, OSError) as error:
                status, answer = 503, {"status": "failed", "message": str(error)}
        await _reply(send, msgspec.json.encode(answer), status)

    async def _ask(self, scope: Scope, receive: Receive) -> tuple[int, str]:
        """What vLLM itself answers."""
        status, said = 500, b""

        async def note(message: Message) -> None:
            nonlocal status, said
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                said += message.get("body", b"")[: _SAID_BYTES - len(said)]

        await self._app(scope, receive, note)
        return status, said.decode(errors="replace")

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
            if body is None:
                return
            if placeholders.may_name_embeddings(body):
                body = await self._with_grids(scope, body)
                scope, send = scope_of(scope, body), _explained(send)
        except ChiasmError as error:
            await _refuse(send, error)
            return
        await self._app(scope, receive_of(body, receive), send)

    async def _with_grids(self, scope: Scope, body: bytes) -> bytes:
        described = await self._described(scope)
        processor = described.processor

        def geometry_of(metadata: Metadata) -> ItemGeometry:
            if processor is None:
                raise InvalidRequestError(
                    "This instance cannot tell how many tokens an image of this size takes: send the metadata of the "
                    "encoder's answer, or the image.",
                    param="messages",
                )
            return processor.geometry_of_metadata(metadata)

        return placeholders.with_grids(body, geometry_of, are_named=described.has_connector)

    async def _described(self, scope: Scope) -> Description:
        """Found out once; what has failed is tried again."""
        task = self._describing
        if task is None or (task.done() and task.exception() is not None):
            task = self._describing = asyncio.create_task(asyncio.to_thread(describe, scope["app"].state))
        return await asyncio.shield(task)


def _explained(send: Send) -> Send:
    """vLLM answers with no more than "Internal server error" when the connector fails a request."""
    replaced = False

    async def explained(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start" and message["status"] == 500:
            replaced = True
            await _refuse(send, _NO_EMBEDDING)
        elif not replaced:
            await send(message)

    return explained


async def _refuse(send: Send, error: ChiasmError) -> None:
    await _reply(send, error_body(error), error.status, error_headers(error))


async def _reply(send: Send, body: bytes, status: int, headers: Iterable[tuple[str, str]] = ()) -> None:
    named = [("content-type", "application/json"), ("content-length", str(len(body))), *headers]
    raw = [(name.encode(), value.encode()) for name, value in named]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
