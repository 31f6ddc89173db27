"""The proxy's routes: answers, what can be read about the proxy, and changes of its instances with the admin key."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import msgspec
from aiohttp.abc import AbstractResolver
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chiasm.errors import (
    ConfigurationError,
    InvalidRequestError,
    PathNotFoundError,
)
from chiasm.http import json_response, read_body
from chiasm.http.admin import AdminCheck
from chiasm.http.config import REQUESTS
from chiasm.http.front import FrontDoor
from chiasm.http.key_ring import Share
from chiasm.http.listen import check_instance_url, is_loopback
from chiasm.http.liveness import live, ready_response
from chiasm.http.untrusted import read_json
from chiasm.proxy.balancing import model_not_found
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.drain import drain_route
from chiasm.proxy.leases import lease_route
from chiasm.proxy.metrics import CONTENT_TYPE
from chiasm.proxy.records.pages import record_routes
from chiasm.proxy.service import ProxyService
from chiasm.proxy.siblings import Repeater, Siblings, Worker, is_from_sibling, members_route
from chiasm.tasks import beside
from chiasm.wire import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    INSTANCES_PATH,
    OTHER_PATHS,
    InstanceList,
    ModelCard,
    ModelList,
    ProxyHealth,
    Role,
    model_card,
)

_MAX_ORDER_BYTES = 64 << 10
_READY = "ok"


def create_app(
    config: ProxyConfig, *, resolver: AbstractResolver | None = None, worker: Worker | None = None
) -> Starlette:
    """Return the proxy as an ASGI application; its ``state.service`` is the ProxyService.

    ``resolver`` looks up the names of media hosts, in place of the system's. ``worker`` is given to one of several. Raises
    ConfigurationError for keys that cannot be read, and a shared cache that can't be used.
    """
    service = ProxyService(config, resolver)
    siblings = None if worker is None else Siblings(worker)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        assert isinstance(app, FrontDoor)
        missed = None
        if siblings is not None:
            siblings.open()
            missed = await siblings.missed()
        await service.start(missed, lambda: app.keys.first)
        try:
            async with beside(admin.follow()):
                yield
        finally:
            if siblings is not None:
                await siblings.close()
            await service.close()

    admin = AdminCheck(config.admin_key, config.admin_key_file, config.supervisor_key)
    pages = _Pages(service, admin, siblings)
    routes: list[BaseRoute] = [
        Route(CHAT_PATH, service.endpoint(CHAT_PATH), methods=["POST"]),
        Route(COMPLETIONS_PATH, service.endpoint(COMPLETIONS_PATH), methods=["POST"]),
        *(Route(path, service.endpoint(path), methods=["POST"]) for path in OTHER_PATHS),
        Route("/v1/models", pages.models),
        Route("/v1/models/{model:path}", pages.model),
        Route("/health", pages.health),
        Route("/livez", live),
        Route("/readyz", pages.ready),
        Route("/metrics", pages.metrics),
        lease_route(lambda: service.leases, service.fleet_key, service.now),
        drain_route(service, admin),
        *record_routes(service.records, admin, siblings),
    ]
    if siblings is not None:
        routes.append(members_route(lambda: service.membership.members(time.monotonic())))
    if admin.has_key:
        routes.append(Route(INSTANCES_PATH, _Instances(service, admin).handle, methods=["GET", "POST", "DELETE"]))
    app = FrontDoor(
        routes,
        config.http,
        lifespan=lifespan,
        is_local=is_loopback(config.host),
        guard=None if siblings is None else partial(Repeater, siblings=siblings),
        guarded_paths=OTHER_PATHS,
        refusals=service.metrics.refusals,
        access_log=REQUESTS,
        share=Share(proxies=config.proxies) if worker is None else Share(worker.number, worker.count, config.proxies),
    )
    app.state.service = service
    return app


class _Pages:
    """Handlers of the routes that only read."""

    def __init__(self, service: ProxyService, admin: AdminCheck, siblings: Siblings | None) -> None:
        self._service = service
        self._admin = admin
        self._siblings = siblings
        self._fleet = service.fleet
        self._metrics = service.metrics
        config = service.config
        self._metrics_are_open = config.open_metrics or not (admin.has_key or config.http.needs_key)
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """Answer with 200 if new requests for text can be answered, otherwise with 503; the operator learns more."""
        status = self._status
        if not self._admin.may_see(request.scope):
            return ready_response(status, status == _READY)
        health = ProxyHealth(
            status=status,
            models=self._fleet.models,
            instances=[instance.describe(time.monotonic()) for instance in self._fleet.instances],
        )
        return json_response(health, 200 if status == _READY else 503)

    async def ready(self, request: Request) -> Response:
        """Answer with the same status, and tell nobody more."""
        return ready_response(self._status, self._status == _READY)

    @property
    def _status(self) -> str:
        if self._service.is_stopping:
            return "stopping"
        return _READY if self._fleet.missing is None else "unavailable"

    async def metrics(self, request: Request) -> Response:
        if not self._metrics_are_open:
            self._admin.check_may_see(request.scope)
        page = self._metrics.render()
        if self._siblings is not None and not is_from_sibling(request.scope):
            page = await self._siblings.metrics(page, request.scope)
        return Response(page, media_type=None, headers={"content-type": CONTENT_TYPE})

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


class _Instances:
    """Lists, adds and removes instances for requests with the admin key."""

    def __init__(self, service: ProxyService, admin: AdminCheck) -> None:
        self._service = service
        self._admin = admin

    async def handle(self, request: Request) -> Response:
        self._admin.check_may_change(request.scope)
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
        instance = self._service.membership.add(order.url, order.role)
        await self._service.prober.check(instance)
        return json_response(instance.describe(time.monotonic()), 201)

    async def _remove(self, request: Request) -> Response:
        order = await _read_order(request)
        instance = self._service.membership.remove(order.url)
        if instance is None:
            raise PathNotFoundError(f"{order.url} is not an instance.")
        return json_response(instance.describe(time.monotonic()), 202)


async def _read_order(request: Request) -> _Order:
    body = await read_body(request.receive, request.headers, _MAX_ORDER_BYTES)
    order = read_json(_order, body)
    try:
        order.url = check_instance_url(order.url)
    except ConfigurationError as error:
        raise InvalidRequestError(error.message, param="url") from None
    return order
