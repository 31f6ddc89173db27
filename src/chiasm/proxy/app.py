"""The proxy's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from aiohttp.abc import AbstractResolver
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from chiasm.errors import ChiasmError
from chiasm.proxy.admin import Admin
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.exchange import Exchange
from chiasm.proxy.gateway import CHAT, COMPLETIONS, Gateway
from chiasm.proxy.pages import Pages
from chiasm.proxy.relay import error_body


def create_app(config: ProxyConfig, *, resolver: AbstractResolver | None = None) -> Starlette:
    """The proxy as an ASGI application. ``resolver`` looks up the names of media hosts, in place of the system's."""
    gateway = Gateway(config, resolver)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.close()

    pages = Pages(gateway)
    routes: list[BaseRoute] = [
        Route(CHAT, _Answered(gateway, CHAT), methods=["POST"]),
        Route(COMPLETIONS, _Answered(gateway, COMPLETIONS), methods=["POST"]),
        Route("/v1/models", pages.models),
        Route("/v1/models/{model:path}", pages.model),
        Route("/health", pages.health),
        Route("/metrics", pages.metrics),
    ]
    if config.admin_key is not None:
        routes.append(Route("/instances", Admin(gateway, config.admin_key).handle, methods=["GET", "POST", "DELETE"]))
    app = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error, ChiasmError: _error}
    )
    app.state.gateway = gateway
    return app


class _Answered:
    """A route whose requests take the gateway's way; as plain ASGI, since it streams and watches the client."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self._gateway = gateway
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gateway.handle(self._path, Exchange(scope, receive, send))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    shown = {"message": error.detail, "type": kind, "param": None, "code": None}
    body = msgspec.json.encode({"error": shown})
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ChiasmError)
    return Response(error_body(error), error.status, media_type="application/json")
