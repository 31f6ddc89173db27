"""The application: which path leads where, and what an error looks like."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chiasm.errors import ChiasmError
from chiasm.server import errors
from chiasm.server.chat import chat_completions
from chiasm.server.completions import completions
from chiasm.server.config import ServerConfig
from chiasm.server.exchange import Endpoint
from chiasm.server.instance import Instance
from chiasm.server.status import Status

if TYPE_CHECKING:
    from chiasm.engine.base import Engine


def create_app(engine: Engine, *, served_model_name: str, config: ServerConfig | None = None) -> Starlette:
    """The API of an instance whose engine has been started; who started it stops it."""
    return app_of(Instance(served_model_name, config or ServerConfig(), engine))


def app_of(instance: Instance) -> Starlette:
    """The API of an instance in whatever state it is."""
    status = Status(instance)
    chat_path = "/v1/chat/completions"
    completions_path = "/v1/completions"

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with instance.opened():
            yield

    return Starlette(
        routes=[
            Route(chat_path, Endpoint(instance, chat_path, chat_completions), methods=["POST"]),
            Route(completions_path, Endpoint(instance, completions_path, completions), methods=["POST"]),
            Route("/v1/models", status.models),
            Route("/v1/models/{name:path}", status.model),
            Route("/health", status.health),
            Route("/metrics", status.metrics),
            Route("/version", status.version),
        ],
        exception_handlers={
            ChiasmError: _on_error,
            HTTPException: _on_http_exception,
            Exception: _on_error,
        },
        lifespan=lifespan,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    known = errors.as_chiasm_error(error)
    return Response(
        errors.body_of(known), known.status, headers=dict(errors.headers_of(known)), media_type="application/json"
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    wrong = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 405:
        return await _on_error(request, errors.MethodNotAllowedError(f"{wrong} is not possible here."))
    return await _on_error(request, errors.PathNotFoundError(f"{wrong}: nothing is served under this path."))
