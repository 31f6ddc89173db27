"""How vLLM's server ends: before its engine does, so that nobody takes an answer that was cut off for a whole one.

By itself vLLM stops its engine at SIGTERM while requests run. They end with ``finish_reason: "abort"``, or with an error and
``[DONE]``, and decode instances lose the KV that they haven't fetched yet.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.errors import Code, OverloadedError
from chiasm.http import events
from chiasm.http.errors import error_body, error_response
from chiasm.http.shutdown import Shutdown
from chiasm.integrations.vllm.engines import others_have_fetched

_logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EVENTS = b"text/event-stream"


class ServerEnd:
    """The requests that run in one server, and its end. All methods belong to its event loop."""

    def __init__(self) -> None:
        self._calls: set[_Call] = set()
        self._shutdown: Shutdown | None = None
        self._state: Any = None
        self._ending: asyncio.Task[None] | None = None
        self._refuses_new = False
        self.asked = asyncio.Event()
        """Set when the server is asked to end; ends what waits for nothing but news."""
        self.tell: Callable[[], Awaitable[None]] = _nobody
        """Tells the proxies that it ends; until then, it takes what they send."""
        self.leave: Callable[[], Awaitable[None]] = _nobody
        """Called when nothing runs any more, and nobody has anything to fetch from it."""

    @property
    def is_asked(self) -> bool:
        """Whether the server is asked to end."""
        return self._shutdown is not None and self._shutdown.is_asked

    @property
    def requests(self) -> int:
        """How many requests it answers."""
        return len(self._calls)

    def take_over(self, state: Any) -> None:
        """Take the signals that end the process from vLLM, whose application has this ``state``.

        What runs has vLLM's ``--shutdown-timeout`` to end and others have it to fetch what they need; after it, and at a second
        signal, what runs ends with an error.
        """
        self._shutdown = Shutdown(float(state.vllm_config.shutdown_timeout))
        self._state = state
        loop = asyncio.get_running_loop()
        try:
            for number in _SIGNALS:
                loop.add_signal_handler(number, self._ask)
        except (RuntimeError, ValueError) as error:  # not in the main thread
            _logger.warning("Requests that run when vLLM is asked to end are cut off by vLLM itself: %s", error)

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the application answer a request, unless the server is ending."""
        if self._refuses_new:
            await error_response(_stopping())(scope, receive, send)
            return
        call = _Call(scope, receive, send)
        self._calls.add(call)
        try:
            await app(scope, receive, call.send)
        except asyncio.CancelledError:
            if not call.is_cut:
                raise
        finally:
            self._calls.discard(call)

    async def ended(self) -> None:
        """Wait until it has ended, once that has begun."""
        assert self._ending is not None
        await self._ending

    def drain(self) -> None:
        """End when nothing runs any more and others have fetched what they need, however long that takes."""
        assert self._shutdown is not None
        self._shutdown.drain()
        self.asked.set()
        self._ending = self._ending or asyncio.ensure_future(self._end(self._shutdown))

    def _ask(self) -> None:
        assert self._shutdown is not None
        self._shutdown.ask()
        self.asked.set()
        self._ending = self._ending or asyncio.ensure_future(self._end(self._shutdown))

    async def _end(self, shutdown: Shutdown) -> None:
        await self.tell()
        self._refuses_new = True
        await shutdown.drained(lambda: not self._calls)
        for call in list(self._calls):
            await call.cut()
        fetching = asyncio.ensure_future(others_have_fetched(self._state))
        await shutdown.drained(fetching.done)
        fetching.cancel()
        await self.leave()
        self._state.server.should_exit = True  # vLLM ends its engine when its HTTP server has ended


class _Call:
    """One request that vLLM answers. Compared by identity."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.is_cut = False
        self._scope, self._receive, self._send = scope, receive, send
        self._task = asyncio.current_task()
        self._has_begun = self._has_ended = self._is_stream = False

    async def send(self, message: Message) -> None:
        """Pass on what vLLM answers, until the call is cut."""
        if self.is_cut:
            return
        if message["type"] == "http.response.start":
            self._has_begun = True
            self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(_EVENTS)
        else:
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def cut(self) -> None:
        """End the answer with an error, and the work on it."""
        self.is_cut = True
        if not self._has_begun:
            await error_response(_stopping())(self._scope, self._receive, self._send)
        elif self._is_stream and not self._has_ended:
            last = events.error_event(error_body(_stopping()), self._scope["path"])
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        if self._task is not None:
            self._task.cancel()


async def _nobody() -> None:
    """There is nobody to tell."""


def _stopping() -> OverloadedError:
    return OverloadedError("This instance is stopping; send the request to another one.", code=Code.STOPPING)
