"""The front door of a server: what holds for every request, whatever its path, before any route is looked up.

A request gets an id, which every answer carries; its path is read as it was meant; it is logged if it fails; web pages of other
origins are let in or kept out; and it needs an API key if the server has any. All of it passes messages on as they come, so
streams aren't held up, and takes no task of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.http.config import FAILURES, HttpConfig
from chiasm.http.endpoint import Endpoint
from chiasm.http.errors import EXCEPTION_HANDLERS
from chiasm.http.flood import limited
from chiasm.http.key_ring import ALONE, KeyRing, Share
from chiasm.http.keys import KeyGuard
from chiasm.http.limits import Refusals
from chiasm.http.log import RequestLog
from chiasm.http.log_format import request_id
from chiasm.http.origins import LocalOnly, Origins
from chiasm.http.paths import normal_path
from chiasm.http.visit import Visit, with_visit
from chiasm.tasks import beside

EXPOSED_HEADERS = ("X-Request-Id", "Server-Timing", "Retry-After", "X-Should-Retry")
"""Headers of answers that web pages of other origins may read."""
_LOGS_OF_CLIENTS = ("chiasm.http.errors", "uvicorn.error")
"""Loggers to which any client can add lines, beside the log of requests: unexpected errors, and what isn't HTTP."""
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


class FrontDoor(Starlette):
    """An application with these routes behind the front door."""

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        config: HttpConfig,
        *,
        lifespan: Lifespan | None = None,
        is_local: bool = False,
        guard: Callable[[ASGIApp], ASGIApp] | None = None,
        guarded_paths: Collection[str] = (),
        refusals: Refusals | None = None,
        access_log: str = FAILURES,
        share: Share = ALONE,
    ) -> None:
        """``is_local`` says that the server listens on loopback alone; ``guard`` is put around the routes. ``guarded_paths``
        need an API key besides those below /v1. ``refusals`` counts the answers that are errors. ``access_log`` holds unless
        the configuration says something else; ``share`` of the keys' limits is that of this server.

        Raises ConfigurationError for API keys that cannot be read."""
        self._config = config
        self._is_local = is_local
        self._guard = guard
        self._guarded_paths = guarded_paths
        self._refusals = refusals or Refusals()
        self.keys = KeyRing(config, share)
        self._log = RequestLog(config.access_log or access_log)

        @asynccontextmanager
        async def flushed(app: Starlette) -> AsyncIterator[None]:
            async with AsyncExitStack() as stack:
                for name in _LOGS_OF_CLIENTS:
                    stack.enter_context(limited(name))
                stack.callback(self._log.close)
                await stack.enter_async_context(beside(self.keys.follow()))
                if lifespan is not None:
                    await stack.enter_async_context(lifespan(app))
                yield

        super().__init__(routes=routes, exception_handlers=EXCEPTION_HANDLERS, lifespan=flushed)
        self.router.redirect_slashes = False  # a redirect would lose the body

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = _Direct(super().build_middleware_stack(), self.routes)
        config = self._config
        if self._guard is not None:
            app = self._guard(app)
        if self.keys:
            app = KeyGuard(app, self.keys, self._guarded_paths, self._refusals)
        if self._is_local:
            app = LocalOnly(app, config)
        app = Origins(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=EXPOSED_HEADERS,
        )
        return _Entrance(app, self._log, self._refusals, timing_comments=config.timing_comments == "on")


class _Direct:
    """Leads requests with a body to their endpoints at once.

    An endpoint answers every error itself, so Starlette's layers would only make each message of a stream dearer.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._endpoints = {
            route.path: route.endpoint
            for route in routes
            if isinstance(route, Route) and isinstance(route.endpoint, Endpoint) and route.methods == {"POST"}
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (endpoint or self._app)(scope, receive, send)


class _Entrance:
    """Names each request, reads its path, and logs and counts what became of it."""

    def __init__(self, app: ASGIApp, log: RequestLog, refusals: Refusals, *, timing_comments: bool) -> None:
        self._app = app
        self._log = log
        self._refusals = refusals
        self._timing_comments = timing_comments

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(scope, timing_comments=self._timing_comments)
        id_field = (b"x-request-id", visit.request_id.encode())
        request_id.set(visit.request_id)  # in the context of this request's task

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), id_field]
            visit.note(message)
            await send(message)
            visit.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(with_visit(scope, visit, normal_path(scope["path"])), receive, noted)
        except Exception:
            if not visit.is_complete:
                visit.status = visit.status or HTTPStatus.INTERNAL_SERVER_ERROR
                raise
            # It was logged and answered with status 500; the server would only log it again.
        finally:
            self._log.note(visit)
            if visit.has_failed and (code := visit.error[0]):  # the state of an instance that isn't ready has none
                self._refusals.note_error(code)
