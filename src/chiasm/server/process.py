"""One instance as a process: bind, load, serve, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.server.app import app_of
from chiasm.server.config import ServerConfig
from chiasm.server.instance import Instance

if TYPE_CHECKING:
    from chiasm.engine import EngineConfig

logger = logging.getLogger(__name__)

GRACE_SECONDS = 0.5
"""After the signal to stop, in which open requests may still end by themselves."""
DRAIN_SECONDS = 1
"""In which all connections must then be closed."""
ENGINE_STOP_SECONDS = 1.0
"""For the engine's current step."""
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections in their pools, so that it is they who close them."""
BACKLOG = 2048


def run(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    served_model_name: str | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; call it in the main thread. Returns when all is stopped, within 3 s of the signal.

    The port is bound first, and /health answers while the model loads. ``on_ready`` gets the base URL, in another
    thread, when requests are taken. The model's name is that of its folder unless ``served_model_name`` is given.
    Raises ConfigurationError when the address is taken or the model cannot be served.
    """
    listener = bind(server_config.host, server_config.port)
    instance = Instance(served_model_name or engine_config.model.name, server_config)
    server = _Server(instance)
    url = _url(server_config.host, listener.getsockname()[1])

    def load() -> None:
        from chiasm.engine import create_engine

        try:
            engine = create_engine(engine_config)
            engine.start()
        except ChiasmError as error:
            instance.failure = error
        except Exception as error:
            logger.exception("the model could not be loaded")
            instance.failure = ConfigurationError(f"The model could not be loaded: {type(error).__name__}: {error}")
        else:
            instance.loaded_engine = engine
            if on_ready is not None and not instance.stopping:
                on_ready(url)
            return
        server.should_exit = True

    loading = threading.Thread(target=load, name="chiasm-load", daemon=True)
    loading.start()
    server.run(sockets=[listener])
    instance.stopping = True
    _stop_engine(instance, loading)
    if instance.failure is not None:
        raise instance.failure


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigurationError that says why there is none."""
    if not 0 <= port < 1 << 16:  # the resolver would take it modulo 2**16
        raise ConfigurationError(f"{port} is not a port; use one from 0 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"Port {port} on {host} is in use; stop what uses it, or choose another port with --port."
            ) from error
        raise ConfigurationError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from error


class _Server(uvicorn.Server):
    """uvicorn, with signals that end it quietly and at once."""

    def __init__(self, instance: Instance) -> None:
        super().__init__(
            uvicorn.Config(
                app_of(instance),
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=DRAIN_SECONDS,
                backlog=BACKLOG,
            )
        )
        self._instance = instance

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._instance.stopping = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._instance.interrupt_all)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again at the end, and so end the process by it.
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop_engine(instance: Instance, loading: threading.Thread) -> None:
    """Stop the engine, but wait no longer than ENGINE_STOP_SECONDS for a load or a step that cannot be broken off."""
    until = time.monotonic() + ENGINE_STOP_SECONDS
    loading.join(ENGINE_STOP_SECONDS)
    if instance.loaded_engine is None:
        return
    stopping = threading.Thread(target=instance.loaded_engine.stop, name="chiasm-stop", daemon=True)
    stopping.start()
    stopping.join(max(0.0, until - time.monotonic()))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
