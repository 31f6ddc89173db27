"""``chiasm instance``: one instance of a model, in one role."""

from __future__ import annotations

from typing import Annotated

import typer

from chiasm.cli import options
from chiasm.cli.process import end_at_once, log_to_stderr, print_ready
from chiasm.ec_transfer.base import ECTransferConfig, ECTransferRole
from chiasm.engine.config import EngineConfig, Role
from chiasm.errors import ConfigurationError

_EC_ROLES = {Role.ENCODER: ECTransferRole.PRODUCER, Role.PD: ECTransferRole.CONSUMER}


def instance(
    model: options.Model,
    role: Annotated[Role, typer.Option(help="What the instance does.")],
    engine: options.EngineOptions,
    ec: options.ECOptions,
    server: options.ServerOptions,
    media: options.MediaOptions,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    served_model_name: options.ServedModelName = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one operator on CPU.", show_default="all cores")
    ] = None,
    cpus: options.Cpus = None,
    log_level: options.LogLevel = "info",
    end_with_stdin: options.EndWithStdin = False,
) -> None:
    """Run one instance of MODEL; prints `ready http://HOST:PORT` when it serves."""
    from chiasm.launch.commands import model_name
    from chiasm.launch.cores import pin_to, share_cores
    from chiasm.launch.lifeline import end_with_stdin as watch_stdin
    from chiasm.launch.ports import HeldPort
    from chiasm.models import resolve_folder

    if end_with_stdin:
        watch_stdin()
    log_to_stderr(log_level)
    pin_to(cpus or ())
    share_cores(threads)
    HeldPort(host, port).release()  # a port in use is known at once, not after the imports below
    transfer = _transfer(role, ec)
    folder = resolve_folder(model)

    from chiasm.media import MediaConfig
    from chiasm.server import ServerConfig, run

    run(
        EngineConfig(folder, role, threads=threads, ec=transfer, **engine.given()),
        ServerConfig(host, port, media=MediaConfig(**media.given()), **server.given()),
        served_model_name=served_model_name or model_name(model),
        on_ready=print_ready,
    )
    end_at_once()


def _transfer(role: Role, ec: options.ECOptions) -> ECTransferConfig | None:
    """The connector's configuration; an aggregated instance has one only if it is told where others' embeddings lie."""
    given = ec.given()
    if role is Role.AGGREGATED and not given:
        return None
    if "ec_max_bytes" in given:
        given["max_bytes"] = given.pop("ec_max_bytes")
    config = ECTransferConfig(role=_EC_ROLES.get(role, ECTransferRole.CONSUMER), **given)
    if config.connector == ECTransferConfig.connector and config.shared_storage_path is None:
        raise ConfigurationError(
            f"{config.connector} needs --shared-storage-path, the folder that encoders and pd instances have in common"
        )
    return config
