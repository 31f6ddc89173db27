"""The proxy's routes."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
from aiohttp.abc import AbstractResolver
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from chiasm.errors import ChiasmError, ConfigurationError, InvalidRequestError
from chiasm.proxy.config import ProxyConfig, check_url
from chiasm.proxy.exchange import Exchange
from chiasm.proxy.fleet import LANGUAGE_ROLES, Role, State
from chiasm.proxy.gateway import CHAT, COMPLETIONS, Gateway
from chiasm.proxy.metrics import CONTENT_TYPE
from chiasm.proxy.relay import error_body

_MAX_ADMIN_BODY_BYTES = 64 << 10


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

    pages = _Pages(gateway)
    routes: list[BaseRoute] = [
        Route(CHAT, _Answered(gateway, CHAT), methods=["POST"]),
        Route(COMPLETIONS, _Answered(gateway, COMPLETIONS), methods=["POST"]),
        Route("/v1/models", pages.models),
        Route("/v1/models/{model:path}", pages.model),
        Route("/health", pages.health),
        Route("/metrics", pages.metrics),
    ]
    if config.admin_key is not None:
        routes.append(Route("/instances", _Admin(gateway, config.admin_key).handle, methods=["GET", "POST", "DELETE"]))
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


class _Pages:
    """What can be read of the proxy."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """200 if text can be answered, else 503."""
        fleet = self._gateway.fleet
        ready = bool(fleet.healthy(*LANGUAGE_ROLES))
        return _json(
            200 if ready else 503,
            {
                "status": "ok" if ready else "unavailable",
                "models": fleet.models,
                "instances": [instance.describe() for instance in fleet.instances],
            },
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self._gateway.metrics.render(), media_type=None, headers={"content-type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return _json(200, {"object": "list", "data": [self._describe(name) for name in self._gateway.fleet.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._gateway.fleet.models:
            raise HTTPException(404, f"the model {name[:200]!r} is not served here")
        return _json(200, self._describe(name))

    def _describe(self, name: str) -> dict[str, object]:
        lengths = [
            instance.report.max_model_len
            for instance in self._gateway.fleet.healthy(*LANGUAGE_ROLES)
            if instance.report is not None and instance.report.max_model_len is not None
        ]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "chiasm",
            "max_model_len": min(lengths, default=None),
        }


class _Order(msgspec.Struct):
    url: str
    role: Role | None = None


class _Admin:
    """Instances added and removed while the proxy runs, by whoever has the key."""

    def __init__(self, gateway: Gateway, key: str) -> None:
        self._gateway = gateway
        self._key = key.encode()

    async def handle(self, request: Request) -> Response:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
            raise HTTPException(401, "the admin key is needed as Bearer token", {"www-authenticate": "Bearer"})
        actions: dict[str, Callable[[Request], Awaitable[Response]]] = {"POST": self._add, "DELETE": self._remove}
        return await actions.get(request.method, self._list)(request)

    async def _list(self, request: Request) -> Response:
        return _json(200, {"instances": [instance.describe() for instance in self._gateway.fleet.instances]})

    async def _add(self, request: Request) -> Response:
        order = await _order(request)
        if order.role is None:
            raise InvalidRequestError("role must be encoder, pd or aggregated", param="role")
        fleet = self._gateway.fleet
        known = fleet.get(order.url)
        if known is not None and (known.state is not State.DRAINING or known.role is not order.role):
            raise HTTPException(409, f"{order.url} is there already, as {known.role}, {known.state}")
        instance = fleet.add(order.url, order.role)
        self._gateway.prober.watch(instance)
        await self._gateway.prober.check(instance)
        return _json(201, instance.describe())

    async def _remove(self, request: Request) -> Response:
        order = await _order(request)
        instance = self._gateway.fleet.get(order.url)
        if instance is None:
            raise HTTPException(404, f"there is no instance {order.url}")
        self._gateway.fleet.remove(instance)
        return _json(202, instance.describe())


async def _order(request: Request) -> _Order:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_ADMIN_BODY_BYTES:
            raise HTTPException(413, "the body is too large")
    try:
        order = msgspec.json.decode(body, type=_Order)
        order.url = check_url(order.url)
    except (msgspec.MsgspecError, ConfigurationError) as error:
        raise InvalidRequestError(
            f'the body must look like {{"url": "http://host:port", "role": …}}: {error}'
        ) from None
    return order


def _json(status: int, content: object) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    shown = {"message": error.detail, "type": kind, "param": None, "code": None}
    body = msgspec.json.encode({"error": shown})
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ChiasmError)
    return Response(error_body(error), error.status, media_type="application/json")
