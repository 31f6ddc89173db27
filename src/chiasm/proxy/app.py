"""The proxy's routes: answers, what can be read about the proxy, and changes of its instances with the admin key."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
from aiohttp.abc import AbstractResolver
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chiasm.errors import (
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    PathNotFoundError,
)
from chiasm.http import json_response, read_body
from chiasm.http.errors import error_response
from chiasm.http.front import FrontDoor
from chiasm.http.key_rules import check_key, read_key_file
from chiasm.http.keys import bearer, digest_of, is_one_of
from chiasm.http.listen import check_url, is_loopback
from chiasm.http.untrusted import read_json
from chiasm.proxy.balancing import model_not_found
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.metrics import CONTENT_TYPE
from chiasm.proxy.service import ProxyService
from chiasm.wire import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    InstanceList,
    InstanceState,
    ModelCard,
    ModelList,
    ProxyHealth,
    Role,
    model_card,
)

_MAX_ORDER_BYTES = 64 << 10


def create_app(config: ProxyConfig, *, resolver: AbstractResolver | None = None) -> Starlette:
    """Return the proxy as an ASGI application; its ``state.service`` is the ProxyService.

    ``resolver`` looks up the names of media hosts, in place of the system's. Raises ConfigurationError for keys that cannot be
    read.
    """
    service = ProxyService(config, resolver)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    pages = _Pages(service)
    routes: list[BaseRoute] = [
        Route(CHAT_PATH, service.endpoint(CHAT_PATH), methods=["POST"]),
        Route(COMPLETIONS_PATH, service.endpoint(COMPLETIONS_PATH), methods=["POST"]),
        Route("/v1/models", pages.models),
        Route("/v1/models/{model:path}", pages.model),
        Route("/health", pages.health),
        Route("/metrics", pages.metrics),
    ]
    if config.has_admin:
        admin = _Admin(service, _admin_keys(config))
        routes.append(Route("/instances", admin.handle, methods=["GET", "POST", "DELETE"]))
    app = FrontDoor(
        routes,
        config.http,
        lifespan=lifespan,
        is_local=is_loopback(config.host),
        refusals=service.metrics.refusals,
    )
    app.state.service = service
    return app


class _Pages:
    """Handlers of the routes that only read."""

    def __init__(self, service: ProxyService) -> None:
        self._service = service
        self._fleet = service.fleet
        self._metrics = service.metrics
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """Answer with 200 if new requests for text can be answered, otherwise with 503."""
        fleet = self._fleet
        ready = fleet.missing is None and not self._service.is_stopping
        health = ProxyHealth(
            status="ok" if ready else "stopping" if self._service.is_stopping else "unavailable",
            models=fleet.models,
            instances=[instance.describe(time.monotonic()) for instance in fleet.instances],
        )
        return json_response(health, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=None, headers={"content-type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return json_response(ModelList(data=[self._describe(name) for name in self._fleet.models]))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._fleet.models:
            raise model_not_found(name, self._fleet)
        return json_response(self._describe(name))

    def _describe(self, name: str) -> ModelCard:
        return model_card(name, created=self._created, max_model_len=self._fleet.max_model_len)


class _Order(msgspec.Struct):
    """The body of a POST or DELETE of ``/instances``."""

    url: str
    role: Role | None = None


_order = msgspec.json.Decoder(_Order)


class _Admin:
    """Lists, adds and removes instances for requests with the admin key."""

    def __init__(self, service: ProxyService, keys: Sequence[str]) -> None:
        self._service = service
        self._digests = [digest_of(key) for key in keys]

    async def handle(self, request: Request) -> Response:
        if not is_one_of(bearer(request.headers), self._digests):
            return error_response(AuthenticationError("Send the admin key as a bearer token."))
        actions: dict[str, Callable[[Request], Awaitable[Response]]] = {"POST": self._add, "DELETE": self._remove}
        return await actions.get(request.method, self._list)(request)

    async def _list(self, request: Request) -> Response:
        return json_response(
            InstanceList(instances=[one.describe(time.monotonic()) for one in self._service.fleet.instances])
        )

    async def _add(self, request: Request) -> Response:
        order = await _read_order(request)
        if order.role is None:
            raise InvalidRequestError(f"role must be one of {', '.join(Role)}.", param="role")
        fleet, prober = self._service.fleet, self._service.prober
        known = fleet.get(order.url)
        if known is not None and (known.state is not InstanceState.DRAINING or known.role is not order.role):
            raise ConflictError(
                f"{order.url} is already an instance; its role is {known.role}, its state {known.state}."
            )
        if misfit := fleet.misfit(order.role):
            raise ConflictError(misfit)
        instance = fleet.add(order.url, order.role)
        prober.watch(instance)
        await prober.check(instance)
        return json_response(instance.describe(time.monotonic()), 201)

    async def _remove(self, request: Request) -> Response:
        order = await _read_order(request)
        instance = self._service.fleet.get(order.url)
        if instance is None:
            raise PathNotFoundError(f"{order.url} is not an instance.")
        self._service.fleet.remove(instance)
        return json_response(instance.describe(time.monotonic()), 202)


def _admin_keys(config: ProxyConfig) -> list[str]:
    """Return the keys that may change the instances. Raises ConfigurationError for a file that can't be used."""
    keys = [] if config.admin_key is None else [config.admin_key]
    if config.admin_key_file is not None:
        found = read_key_file("--admin-key-file", config.admin_key_file)
        for key in found:
            check_key("--admin-key-file", key)
        keys += found
    return keys


async def _read_order(request: Request) -> _Order:
    body = await read_body(request.receive, request.headers, _MAX_ORDER_BYTES)
    order = read_json(_order, body)
    try:
        order.url = check_url(order.url)
    except ConfigurationError as error:
        raise InvalidRequestError(error.message, param="url") from None
    return order
