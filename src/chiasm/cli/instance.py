"""``chiasm instance``: one instance of a model, in one role."""

from __future__ import annotations

from typing import Annotated

import typer

from chiasm.cli import options
from chiasm.cli.process import end_at_once, log_to_stderr, print_ready
from chiasm.ec_transfer.base import ECTransferConfig, ECTransferRole
from chiasm.engine.config import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.kv_transfer.base import KVTransferConfig, KVTransferRole
from chiasm.wire import Role

_EC_ROLES = {Role.ENCODER: ECTransferRole.PRODUCER}
"""Others consume."""
_OF_BOTH = ("--kv-connector", "--kv-connector-module-path")
_KV_ROLES = {Role.PREFILL: KVTransferRole.PRODUCER, Role.DECODE: KVTransferRole.CONSUMER}


def instance(
    model: options.Model,
    role: Annotated[Role, typer.Option(help="What the instance does.")],
    engine: options.EngineOptions,
    ec: options.ECOptions,
    kv: options.KVOptions,
    kv_address: options.KVAddressOptions,
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
    from chiasm.cores import pin_to, share_cores
    from chiasm.launch.commands import model_name
    from chiasm.launch.lifeline import end_with_stdin as watch_stdin
    from chiasm.launch.ports import HeldPort
    from chiasm.models import resolve_folder

    if end_with_stdin:
        watch_stdin()
    log_to_stderr(log_level)
    pin_to(cpus or ())
    share_cores(threads)
    HeldPort(host, port).release()  # a port in use is known at once, not after the imports below
    ec_transfer, kv_transfer = ec_config(role, ec), kv_config(role, kv, kv_address)
    folder = resolve_folder(model)

    from chiasm.media import MediaConfig
    from chiasm.server import ServerConfig, run

    run(
        EngineConfig(folder, role, threads=threads, ec=ec_transfer, kv=kv_transfer, **engine.given()),
        ServerConfig(host, port, media=MediaConfig(**media.given()), **server.given()),
        served_model_name=served_model_name or model_name(model),
        on_ready=print_ready,
    )
    end_at_once()


def ec_config(role: Role, ec: options.ECOptions) -> ECTransferConfig | None:
    """How embeddings travel; an aggregated instance takes part only if it is told where others' embeddings lie.

    Raises ConfigurationError for options that aren't the role's.
    """
    given = ec.given()
    if role is Role.DECODE and given:
        raise ConfigurationError(
            f"a decode instance uses no embeddings, its prefill instance does; leave out {', '.join(ec.names)}"
        )
    if role is Role.DECODE or (role is Role.AGGREGATED and not given):
        return None
    if "ec_max_bytes" in given:
        given["max_bytes"] = given.pop("ec_max_bytes")
    config = ECTransferConfig(role=_EC_ROLES.get(role, ECTransferRole.CONSUMER), **given)
    if config.connector == ECTransferConfig.connector and config.shared_storage_path is None:
        raise ConfigurationError(
            f"{config.connector} needs --shared-storage-path, the folder that encoders and the instances that use their "
            "embeddings have in common"
        )
    return config


def kv_config(role: Role, kv: options.KVOptions, address: options.KVAddressOptions) -> KVTransferConfig | None:
    """How KV travels: from prefill and to decode instances, and to no others.

    Raises ConfigurationError for options that aren't the role's.
    """
    if role not in _KV_ROLES:
        if names := ", ".join((*kv.names, *address.names)):
            raise ConfigurationError(f"{names}: only prefill and decode instances exchange KV, and this one is {role}")
        return None
    if role is Role.DECODE and (
        names := ", ".join(name for name in (*kv.names, *address.names) if name not in _OF_BOTH)
    ):
        raise ConfigurationError(f"{names}: decode instances come to prefill instances for KV; give it to those")
    given = {name.removeprefix("kv_"): value for name, value in (kv.given() | address.given()).items()}
    return KVTransferConfig(role=_KV_ROLES[role], **given)
