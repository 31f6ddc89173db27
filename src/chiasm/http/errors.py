"""Errors as OpenAI's clients understand them: status, headers and body."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chiasm.errors import (
    AuthenticationError,
    ChiasmError,
    Code,
    DeadlineExceededError,
    MethodNotAllowedError,
    NotServedError,
    OverloadedError,
    PathNotFoundError,
    UnsupportedMediaTypeError,
)
from chiasm.http.encoding import ACCEPTED
from chiasm.http.paths import nearest_path
from chiasm.wire import ErrorBody, ErrorDetail

_logger = logging.getLogger(__name__)
_SHOWN_CHARACTERS = 200


def error_body(error: ChiasmError) -> bytes:
    """Return the JSON of the error."""
    return msgspec.json.encode(
        ErrorBody(error=ErrorDetail(message=error.message, type=error.kind, param=error.param, code=error.code))
    )


def error_headers(error: ChiasmError) -> list[tuple[str, str]]:
    """Return the headers that go with the error.

    That is ``Retry-After`` in whole seconds if trying again can help, ``X-Should-Retry`` if it can't but clients would do it,
    ``Connection`` if this server is stopping and can't be asked again, and what says which requests would be accepted.
    """
    if isinstance(error, AuthenticationError):
        return [("www-authenticate", "Bearer")]
    if isinstance(error, MethodNotAllowedError):
        return [("allow", error.allow)]
    if isinstance(error, UnsupportedMediaTypeError):
        return [("accept", "application/json"), ("accept-encoding", ", ".join(ACCEPTED))]
    if isinstance(error, NotServedError | DeadlineExceededError):
        # Clients of OpenAI and Anthropic repeat what got 5xx, which here costs as much again.
        return [("x-should-retry", "false")]
    if error.code == Code.STOPPING:
        return [("retry-after", "1"), ("connection", "close")]
    if isinstance(error, OverloadedError):
        return [("retry-after", str(error.retry_after_seconds))]
    return [("retry-after", "1")] if error.status == HTTPStatus.SERVICE_UNAVAILABLE else []


def error_response(error: ChiasmError) -> Response:
    """Return the answer to a request that failed."""
    return Response(error_body(error), error.status, headers=dict(error_headers(error)), media_type="application/json")


def as_chiasm_error(error: BaseException) -> ChiasmError:
    """Return an error that may be shown to a client; an unexpected one is logged and shown without details."""
    if isinstance(error, ChiasmError):
        return error
    _logger.error("unexpected error while answering a request", exc_info=error)
    return ChiasmError("An unexpected error happened in this process; its log has the details.")


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(as_chiasm_error(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path: str = request.scope["path"]
    asked = f"{request.method} {path[:_SHOWN_CHARACTERS]}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(sorted({"OPTIONS", *((error.headers or {}).get("Allow", "").split(", "))}))
        if request.method == "OPTIONS":
            return Response(status_code=HTTPStatus.NO_CONTENT, headers={"allow": allowed})
        return error_response(
            MethodNotAllowedError(f"{asked}: this path does not support this method; use {allowed}.", allow=allowed)
        )
    known = [route.path for route in request.app.routes if isinstance(route, Route) and "{" not in route.path]
    nearest = nearest_path(path, known)
    hint = f" Did you mean {nearest}?" if nearest else ""
    return error_response(PathNotFoundError(f"{asked}: nothing is served under this path.{hint}"))


EXCEPTION_HANDLERS: Mapping[Any, Callable[[Request, Exception], Any]] = {
    ChiasmError: _on_error,
    HTTPException: _on_http_exception,
    Exception: _on_error,
}
"""For Starlette applications. HTTPException is only what the router raises: unknown paths and methods."""
