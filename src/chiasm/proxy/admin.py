"""Instances added and removed while the proxy runs, by whoever has the admin key."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from chiasm.errors import ConfigurationError, InvalidRequestError
from chiasm.proxy.config import check_url
from chiasm.proxy.gateway import Gateway
from chiasm.proxy.pages import answer_json
from chiasm.wire import InstanceState, Role

_MAX_BODY_BYTES = 64 << 10


class _Order(msgspec.Struct):
    url: str
    role: Role | None = None


class Admin:
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
        return answer_json(200, {"instances": [instance.describe() for instance in self._gateway.fleet.instances]})

    async def _add(self, request: Request) -> Response:
        order = await _order(request)
        if order.role is None:
            raise InvalidRequestError("role must be encoder, pd, aggregated, prefill or decode", param="role")
        fleet = self._gateway.fleet
        known = fleet.get(order.url)
        if known is not None and (known.state is not InstanceState.DRAINING or known.role is not order.role):
            raise HTTPException(409, f"{order.url} is there already, as {known.role}, {known.state}")
        if misfit := fleet.misfit(order.role):
            raise HTTPException(409, misfit)
        instance = fleet.add(order.url, order.role)
        self._gateway.prober.watch(instance)
        await self._gateway.prober.check(instance)
        return answer_json(201, instance.describe())

    async def _remove(self, request: Request) -> Response:
        order = await _order(request)
        instance = self._gateway.fleet.get(order.url)
        if instance is None:
            raise HTTPException(404, f"there is no instance {order.url}")
        self._gateway.fleet.remove(instance)
        return answer_json(202, instance.describe())


async def _order(request: Request) -> _Order:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise HTTPException(413, "the body is too large")
    try:
        order = msgspec.json.decode(body, type=_Order)
        order.url = check_url(order.url)
    except (msgspec.MsgspecError, ConfigurationError) as error:
        raise InvalidRequestError(
            f'the body must look like {{"url": "http://host:port", "role": …}}: {error}'
        ) from None
    return order
