"""``chiasm serve``: everything on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chiasm.cli import options
from chiasm.wire import Role

if TYPE_CHECKING:
    from chiasm.launch import DeploymentConfig

_POLL_SECONDS = 0.1


def serve(
    model: options.Model,
    deployment: options.DeploymentOptions,
    options_of_engine: options.EngineOptions,
    devices: options.DeviceOptions,
    arguments: options.ArgumentOptions,
    ec: options.ECOptions,
    kv: options.KVOptions,
    media: options.MediaOptions,
) -> None:
    """Run instances of MODEL and the proxy, all on this machine.

    Prints `ready http://HOST:PORT` when every instance is healthy.
    """
    run(configured(model, deployment, options_of_engine, devices, arguments, ec, kv, media))


def configured(
    model: str,
    deployment: options.DeploymentOptions,
    options_of_engine: options.EngineOptions,
    devices: options.DeviceOptions,
    arguments: options.ArgumentOptions,
    ec: options.ECOptions,
    kv: options.KVOptions,
    media: options.MediaOptions,
) -> DeploymentConfig:
    """The deployment that these options ask for. Raises ConfigurationError for what cannot work together."""
    from chiasm.cli.engines import flags_of
    from chiasm.cli.process import check_level
    from chiasm.launch import DeploymentConfig, RoleConfig

    chosen = deployment
    check_level(chosen.log_level)
    cpus = {
        Role.ENCODER: chosen.encoder_cpus,
        Role.PD: chosen.pd_cpus,
        Role.AGGREGATED: chosen.aggregated_cpus,
        Role.PREFILL: chosen.prefill_cpus,
        Role.DECODE: chosen.decode_cpus,
    }
    counts = count_instances(chosen.encoders, chosen.pds, chosen.aggregated, chosen.prefills, chosen.decodes)
    of_proxy = (*media.arguments(), "--log-level", chosen.log_level)
    if options_of_engine.max_items is not None:
        of_proxy += ("--max-items", str(options_of_engine.max_items))
    flags = flags_of(chosen.engine, options_of_engine, media, arguments, chosen.log_level)
    dealt = devices.given()
    return DeploymentConfig(
        model,
        {
            role: RoleConfig(
                count,
                chosen.threads,
                cpus[role] or (),
                devices=dealt.get(f"{role}_devices", ()),
                memory_share=dealt.get(f"{role}_memory_share"),
                flags=flags.of_role(role),
            )
            for role, count in counts.items()
        },
        engine=chosen.engine,
        host=chosen.host,
        port=chosen.port,
        served_model_name=chosen.served_model_name,
        deadline_seconds=chosen.deadline_seconds,
        instance_flags=flags.of_all,
        proxy_flags=(*of_proxy, *(arguments.proxy_args or ())),
        admin_key=chosen.admin_key,
        **ec.given(),
        **kv.given(),
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
