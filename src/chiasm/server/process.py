"""One instance as a process: bind, load, serve, stop."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.http import serve
from chiasm.http.listen import base_url, bind, is_loopback
from chiasm.server.advertise import own_url
from chiasm.server.app import app_of
from chiasm.server.config import ServerConfig
from chiasm.server.context import ServerContext

if TYPE_CHECKING:
    from chiasm.engine import EngineConfig
    from chiasm.fleet_key import FleetKey

_logger = logging.getLogger(__name__)

_ENGINE_STOP_SECONDS = 1.0
"""Time for a load or a step of the engine to end, since neither can be interrupted."""


def run(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    served_model_name: str | None = None,
    on_ready: Callable[[str], None] | None = None,
    has_parent: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then until nothing runs; call it on the main thread. Returns with everything stopped.

    What runs has ``server_config.shutdown_timeout_seconds`` to end, or until a second signal; then it ends with an error.
    The port is bound first, and /health answers while the model loads. When the model is loaded, ``on_ready`` is called with
    the base URL, on another thread. The model's name is that of its folder unless ``served_model_name`` is given. With
    ``has_parent`` a process of chiasm asks this one to end. Raises
    ConfigurationError if the address is in use, if it can be reached from other machines and there is no fleet key, or if the
    model cannot be served.
    """
    context = ServerContext(served_model_name or engine_config.model.name, server_config, role=str(engine_config.role))
    if context.fleet_key is None and not is_loopback(server_config.host):
        raise ConfigurationError(
            f"--host {server_config.host}: without a fleet key, an instance listens on loopback alone, because whoever reaches "
            "it could answer about one image with another. Make one (openssl rand -hex 32 > fleet.key; chmod 600 fleet.key), "
            "and give it to the proxy and all instances with --fleet-key-file."
        )
    listener = bind(server_config.host, server_config.port)
    port = listener.getsockname()[1]
    url = base_url(server_config.host, port, server_config.http.scheme)
    if server_config.join:
        context.url = own_url(
            server_config.host, port, server_config.join, server_config.advertise_url, server_config.http.scheme
        )
    server = serve.HttpServer(
        app_of(context),
        server_config.http,
        context.metrics.refusals,
        shutdown_timeout_seconds=server_config.shutdown_timeout_seconds,
        on_stop=context.drain,
        is_idle=lambda: context.is_idle,
        interrupt_all=context.interrupt_all,
        has_parent=has_parent,
    )

    context.on_drain = server.drain

    untold: list[OSError] = []

    def load() -> None:
        from chiasm.engine import create_engine

        try:
            engine = create_engine(_with_fleet_key(engine_config, context.fleet_key))
            context.progress = engine.progress
            engine.start()
        except ChiasmError as error:
            context.failure = error
        except Exception as error:
            _logger.exception("the model could not be loaded")
            context.failure = ConfigurationError(f"The model could not be loaded: {type(error).__name__}: {error}")
        else:
            gc.collect()
            gc.freeze()  # a collection that walks over all modules would hold the event loop
            context.note_ready(engine)
            try:
                if on_ready is not None and not context.is_draining:
                    on_ready(url)
                return
            except OSError as error:  # nobody can be told
                untold.append(error)
        server.stop_from_thread()

    loading = threading.Thread(target=load, name="chiasm-load", daemon=True)
    loading.start()
    serve.run(server, listener)
    context.is_draining = True
    _stop_engine(context, loading)
    if context.failure is not None:
        raise context.failure
    if untold:
        raise untold[0]


def _with_fleet_key(config: EngineConfig, key: FleetKey | None) -> EngineConfig:
    """Return the configuration with the key by which the engine's connectors know those of other instances."""
    return replace(
        config,
        ec=config.ec and replace(config.ec, fleet_key=key),
        kv=config.kv and replace(config.kv, fleet_key=key),
    )


def _stop_engine(context: ServerContext, loading: threading.Thread) -> None:
    """Stop the engine, within _ENGINE_STOP_SECONDS."""
    until = time.monotonic() + _ENGINE_STOP_SECONDS
    loading.join(_ENGINE_STOP_SECONDS)
    if context.loaded_engine is None:
        return
    stopping = threading.Thread(target=context.loaded_engine.stop, name="chiasm-stop", daemon=True)
    stopping.start()
    stopping.join(max(0.0, until - time.monotonic()))
