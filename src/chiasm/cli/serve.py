"""``chiasm serve``: everything on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.cli import options
from chiasm.engine.config import Role
from chiasm.launch.config import Engine

if TYPE_CHECKING:
    from chiasm.launch import DeploymentConfig

_POLL_SECONDS = 0.1


def serve(
    model: options.Model,
    options_of_engine: options.EngineOptions,
    devices: options.DeviceOptions,
    arguments: options.ArgumentOptions,
    ec: options.ECOptions,
    kv: options.KVOptions,
    media: options.MediaOptions,
    engine: Annotated[
        Engine, typer.Option(help="What instances run: the built-in engine, or `vllm serve` of the same environment.")
    ] = Engine.CHIASM,
    encoders: Annotated[
        int | None, typer.Option(min=0, help="Encoder instances.", show_default="1, or 0 with --aggregated")
    ] = None,
    pds: Annotated[
        int | None,
        typer.Option(min=0, help="Prefill-and-decode instances.", show_default="1, or 0 if there are others"),
    ] = None,
    aggregated: Annotated[int | None, typer.Option(min=0, help="Instances that do it all.", show_default="0")] = None,
    prefills: Annotated[
        int | None, typer.Option(min=0, help="Prefill instances, with --decodes.", show_default="0")
    ] = None,
    decodes: Annotated[
        int | None, typer.Option(min=0, help="Decode instances, with --prefills.", show_default="0")
    ] = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    served_model_name: options.ServedModelName = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of each instance on CPU.", show_default="the cores shared out evenly"),
    ] = None,
    encoder_cpus: options.Cpus = None,
    pd_cpus: options.Cpus = None,
    aggregated_cpus: options.Cpus = None,
    prefill_cpus: options.Cpus = None,
    decode_cpus: options.Cpus = None,
    deadline_seconds: Annotated[
        float | None, typer.Option(help="The longest that a request may take.", show_default="600")
    ] = None,
    admin_key: options.AdminKey = None,
    log_level: options.LogLevel = "info",
) -> None:
    """Run instances of MODEL and the proxy, all on this machine.

    Prints `ready http://HOST:PORT` when every instance is healthy.
    """
    from chiasm.cli.engines import flags_of
    from chiasm.cli.process import check_level
    from chiasm.launch import DeploymentConfig, RoleConfig

    check_level(log_level)
    cpus = {
        Role.ENCODER: encoder_cpus,
        Role.PD: pd_cpus,
        Role.AGGREGATED: aggregated_cpus,
        Role.PREFILL: prefill_cpus,
        Role.DECODE: decode_cpus,
    }
    counts = count_instances(encoders, pds, aggregated, prefills, decodes)
    log = ("--log-level", log_level)
    of_proxy = (*media.arguments(), *log)
    if options_of_engine.max_items is not None:
        of_proxy += ("--max-items", str(options_of_engine.max_items))
    flags = flags_of(engine, options_of_engine, media, arguments, log_level)
    dealt = devices.given()
    run(
        DeploymentConfig(
            model,
            {
                role: RoleConfig(
                    count,
                    threads,
                    cpus[role] or (),
                    devices=dealt.get(f"{role}_devices", ()),
                    memory_share=dealt.get(f"{role}_memory_share"),
                    flags=flags.of_role(role),
                )
                for role, count in counts.items()
            },
            engine=engine,
            host=host,
            port=port,
            served_model_name=served_model_name,
            deadline_seconds=deadline_seconds,
            instance_flags=flags.of_all,
            proxy_flags=of_proxy,
            admin_key=admin_key,
            **ec.given(),
            **kv.given(),
        )
    )


def count_instances(
    encoders: int | None, pds: int | None, aggregated: int | None, prefills: int | None, decodes: int | None
) -> dict[Role, int]:
    """How many instances of each role: without any count one encoder and one pd."""
    apart = bool(prefills or decodes)
    counts = {
        Role.ENCODER: (0 if aggregated and not apart else 1) if encoders is None else encoders,
        Role.PD: (0 if aggregated or apart else 1) if pds is None else pds,
        Role.AGGREGATED: aggregated or 0,
        Role.PREFILL: prefills or 0,
        Role.DECODE: decodes or 0,
    }
    return {role: count for role, count in counts.items() if count}


def run(config: DeploymentConfig) -> None:
    """Run a deployment until a signal asks for its end."""
    from chiasm.cli.signals import EndSignals
    from chiasm.cli.view import View
    from chiasm.launch import Deployment
    from chiasm.launch.devices import describe

    view = View()
    deployment = Deployment(config, on_change=view.change, on_line=view.line)
    if placed := describe(deployment.placements):
        view.line("serve", placed)
    with EndSignals() as signals, view, deployment:
        view.show(lambda: deployment.processes)
        announced = False
        while signals.received is None:
            deployment.check()
            if not announced and deployment.is_ready():
                view.ready(deployment.url)
                announced = True
            time.sleep(_POLL_SECONDS)
