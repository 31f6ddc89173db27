"""What a deployment starts: command line, environment and configuration of each process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiasm.errors import ConfigurationError
from chiasm.launch import vllm
from chiasm.launch.config import DeploymentConfig, EngineKind
from chiasm.launch.devices import Placement, Placements, found_devices, place
from chiasm.launch.ports import HeldPort
from chiasm.launch.process import KV_ROLES, instance_process, proxy_process, to_json
from chiasm.wire import Role

PROXY = "proxy"
LOOPBACK = "127.0.0.1"
PROBE_INTERVAL_SECONDS = 0.25
"""Interval of the proxy's probes, so short that it notices quickly when an instance of this machine comes or goes."""
_EC_ROLES = (Role.ENCODER, Role.PD, Role.PREFILL)


@dataclass(frozen=True)
class ProcessPlan:
    """One process, about to be started."""

    name: str
    """``proxy``, or the role and a number: ``encoder-0``."""
    role: Role | None
    """None for the proxy."""
    address: HeldPort
    command: list[str]
    environment: dict[str, str]
    configuration: str = field(default="", repr=False)  # it may hold the admin key
    """One line for its standard input; empty for a process that gets everything on its command line."""


@dataclass(frozen=True)
class Surroundings:
    """What all instances of a deployment have in common on this machine."""

    storage: Path | None
    """Folder of the embeddings; None if none are exchanged."""
    ec_max_bytes: int
    scratch: Path | None
    """A folder for the locks that order starts; None where no instances share a device."""


def placements_of(config: DeploymentConfig, folder: Path) -> Placements:
    """Return which instance computes where. Raises ConfigurationError for what the machine or the engine cannot do."""
    if config.engine is EngineKind.VLLM:
        on_cpu = vllm.installed().on_cpu
        found = () if on_cpu else found_devices()
        if not found and not on_cpu:
            raise ConfigurationError(
                "This vLLM is built for GPUs, and no NVIDIA GPU was found; on a machine without one, install the build for "
                "CPUs (`make vllm` does)."
            )
        return place(config.roles, found, vllm.attention_heads(folder))
    named = any(role.devices for role in config.roles.values())
    placements = place(config.roles, found_devices() if named else ())
    check_built_in(placements)
    return placements


def check_built_in(placements: Placements) -> None:
    """Raise ConfigurationError for placements that the built-in engine cannot follow."""
    for (role, _), placement in placements.items():
        if len(placement.devices) > 1:
            raise ConfigurationError(
                f"The built-in engine computes on one device, and --{role}-devices gives each instance "
                f"{len(placement.devices)}; name one for each, or use --engine vllm, which splits a model."
            )
        if placement.devices and not placement.devices[0].isdecimal():
            raise ConfigurationError(
                f"--{role}-devices: the built-in engine takes numbers, not {placement.devices[0]!r}."
            )


def plan_instances(
    config: DeploymentConfig,
    folder: Path,
    placements: Placements,
    surroundings: Surroundings,
    held: list[HeldPort],
) -> list[ProcessPlan]:
    """Return all instances, in the order of roles and numbers. The ports that they take are added to ``held``.

    Raises ConfigurationError.
    """

    def hold() -> HeldPort:
        held.append(HeldPort(LOOPBACK))
        return held[-1]

    plans = []
    for (role, index), placement in placements.items():
        name, address = f"{role}-{index}", hold()
        if config.engine is EngineKind.VLLM:
            side_channel = hold() if role in KV_ROLES else None
            command, environment = _vllm(config, folder, role, placement, surroundings, address, side_channel)
            plans.append(ProcessPlan(name, role, address, command, environment))
        else:
            settings = instance_settings(config, role, address, surroundings, placement)
            configuration = to_json(instance_process(folder, role, settings))
            plans.append(ProcessPlan(name, role, address, _child(name), dict(os.environ), configuration))
    return plans


def plan_proxy(config: DeploymentConfig, address: HeldPort, instances: Sequence[tuple[Role, str]]) -> ProcessPlan:
    """Return the proxy in front of instances, each given by role and base URL. Raises ConfigurationError."""
    settings: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "probe_interval_seconds": PROBE_INTERVAL_SECONDS,
        "cpus": config.proxy_cpus,
        "admin_key": config.admin_key,
        **{role: tuple(url for of, url in instances if of is role) for role in Role},
        **_deadline(config),
        **config.proxy_settings,
    }
    return ProcessPlan(PROXY, None, address, _child(PROXY), dict(os.environ), to_json(proxy_process(settings)))


def instance_settings(
    config: DeploymentConfig, role: Role, address: HeldPort, surroundings: Surroundings, placement: Placement
) -> dict[str, Any]:
    """Return the settings of one instance of the built-in engine."""
    chosen = config.roles[role]
    settings: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "served_model_name": config.model_name,
        "threads": config.threads(role),
        "cpus": chosen.cpus,
        **_deadline(config),
    }
    if placement.devices:
        settings["device"] = f"cuda:{placement.devices[0]}"
    if role in _EC_ROLES and surroundings.storage is not None:
        settings |= {
            "connector": config.connector,
            "connector_module_path": config.connector_module_path,
            "shared_storage_path": surroundings.storage,
            "ec_max_bytes": surroundings.ec_max_bytes,
        }
    if role in KV_ROLES:
        names = ["kv_connector", "kv_connector_module_path", *(["kv_lease_seconds"] if role is Role.PREFILL else [])]
        settings |= {name: value for name in names if (value := getattr(config, name)) is not None}
    return {**settings, **config.settings, **chosen.settings}


def _child(name: str) -> list[str]:
    return [sys.executable, "-m", "chiasm", "child", name]


def _deadline(config: DeploymentConfig) -> dict[str, float]:
    return {} if config.deadline_seconds is None else {"deadline_seconds": config.deadline_seconds}


def _vllm(
    config: DeploymentConfig,
    folder: Path,
    role: Role,
    placement: Placement,
    surroundings: Surroundings,
    address: HeldPort,
    side_channel: HeldPort | None,
) -> tuple[list[str], dict[str, str]]:
    import psutil

    turn = None
    if placement.shared and surroundings.scratch is not None:
        # vLLM measures what is free on its devices while it starts, so those that share one start one after the other.
        turn = surroundings.scratch / f"turn-{placement.devices[0]}"
    site = vllm.Site(address, placement, surroundings.storage, surroundings.ec_max_bytes, side_channel, turn)
    found = vllm.installed()
    kv_bytes = vllm.default_kv_bytes(config, int(psutil.virtual_memory().available))
    command = vllm.instance_command(config, folder, role, site, found=found, kv_bytes=kv_bytes)
    return command, vllm.instance_environment(config, role, site, found=found)
