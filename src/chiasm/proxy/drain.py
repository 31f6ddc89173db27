"""Takes an instance down through the proxy (``POST /drain``): the proxy gives it no more work from then on."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response

from chiasm.errors import ConfigurationError, InvalidRequestError, PathNotFoundError
from chiasm.http import json_response, read_body
from chiasm.http.admin import AdminCheck
from chiasm.http.fleet_calls import FleetGuard, caller_of
from chiasm.http.listen import check_url
from chiasm.http.untrusted import read_json
from chiasm.proxy.service import ProxyService
from chiasm.proxy.upstream import UpstreamError
from chiasm.wire import DRAIN_PATH, UNREADABLE, DrainOrder, DrainState

_MAX_ORDER_BYTES = 16 << 10
_MAX_ANSWER_BYTES = 64 << 10
_OTHERWISE = "Remove it from this proxy with DELETE /instances, and end it when it has no more calls."
_order = msgspec.json.Decoder(DrainOrder)
_state = msgspec.json.Decoder(DrainState)


def drain_route(service: ProxyService, admin: AdminCheck) -> Route:
    """Return the route; it needs the admin key, or a signature with the fleet key."""

    async def handle(request: Request) -> Response:
        is_signed = service.fleet_key is not None and caller_of(request.scope).is_of_fleet
        if not is_signed:
            admin.check_may_change(request.scope)
        order = read_json(_order, await read_body(request.receive, request.headers, _MAX_ORDER_BYTES))
        try:
            url = check_url(order.url)
        except ConfigurationError as error:
            raise InvalidRequestError(error.message, param="url") from None
        return json_response(await _drain(service, url), 202)

    return Route(DRAIN_PATH, FleetGuard(request_response(handle), service.fleet_key, service.now), methods=["POST"])


async def _drain(service: ProxyService, url: str) -> DrainState:
    """Ask an instance to drain, and see that it does. Raises UpstreamError if it doesn't."""
    instance = service.fleet.get(url)
    if instance is None:
        raise PathNotFoundError(f"{url} is not an instance.")
    seconds = service.config.probe_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            with await service.upstream.post(url, DRAIN_PATH, b"{}", {}) as call:
                answer = await call.read(_MAX_ANSWER_BYTES)
    except TimeoutError:
        raise UpstreamError(f"{url} does not answer within {seconds:g} s. {_OTHERWISE}") from None
    if answer.status != 202:
        raise UpstreamError(f"{url} doesn't drain: it answers with status {answer.status}. {_OTHERWISE}")
    await service.prober.check(instance)
    try:
        return _state.decode(answer.body)
    except UNREADABLE as error:
        raise UpstreamError(
            f"{url} answers with status {answer.status}, and not as chiasm does: {error}. {_OTHERWISE}"
        ) from None
