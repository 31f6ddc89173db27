"""Takes this instance down without losing anything (``POST /drain``)."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from chiasm.http import json_response, read_body
from chiasm.http.fleet_calls import caller_of, check_fleet
from chiasm.server.context import ServerContext

_MAX_BODY_BYTES = 16 << 10


async def drain(context: ServerContext, request: Request) -> Response:
    """Take no new work, end when nothing is left to do, and say what is left. Asking again does no harm."""
    check_fleet(caller_of(request.scope), "Draining an instance")
    await read_body(request.receive, request.headers, _MAX_BODY_BYTES)
    context.on_drain()
    return json_response(context.left, HTTPStatus.ACCEPTED)
