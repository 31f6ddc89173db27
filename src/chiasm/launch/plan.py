"""What a deployment starts: each process' command line and environment, with the engine's differences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chiasm.errors import ConfigurationError
from chiasm.launch import commands, vllm
from chiasm.launch.config import DeploymentConfig, EngineKind
from chiasm.launch.devices import Placement, Placements, found_devices, place
from chiasm.launch.ports import HeldPort
from chiasm.wire import Role

PROXY = "proxy"
LOOPBACK = "127.0.0.1"


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


@dataclass(frozen=True)
class Surroundings:
    """What all instances of a deployment have in common on this machine."""

    storage: Path | None
    """Where embeddings lie; None where none are exchanged."""
    ec_max_bytes: int
    scratch: Path | None
    """A folder for the locks that order starts; None where no instances share a device."""


def placements_of(config: DeploymentConfig, folder: Path) -> Placements:
    """Which instance computes where. Raises ConfigurationError for what the machine or the engine cannot do."""
    named = any(role.devices for role in config.roles.values())
    if config.engine is EngineKind.VLLM:
        on_cpu = vllm.installed().on_cpu
        found = () if on_cpu else found_devices()
        if not found and not on_cpu:
            raise ConfigurationError(
                "this vLLM is built for GPUs, and no NVIDIA GPU was found; on a machine without one, install the build for "
                "CPUs (`make vllm` does)"
            )
        return place(config.roles, found, vllm.attention_heads(folder))
    placements = place(config.roles, found_devices()) if named else place(config.roles, ())
    for (role, _), placement in placements.items():
        if len(placement.devices) > 1:
            raise ConfigurationError(
                f"the built-in engine computes on one device, and --{role}-devices gives {len(placement.devices)} to each "
                "instance; name one for each, or take --engine vllm, which splits a model"
            )
        if placement.devices and not placement.devices[0].isdecimal():
            raise ConfigurationError(
                f"--{role}-devices: the built-in engine takes numbers, not {placement.devices[0]!r}"
            )
    return placements


def plan_instances(
    config: DeploymentConfig,
    folder: Path,
    placements: Placements,
    surroundings: Surroundings,
    held: list[HeldPort],
) -> list[ProcessPlan]:
    """All instances, in the order of roles and numbers. The ports that they take are added to ``held``."""

    def hold() -> HeldPort:
        held.append(HeldPort(LOOPBACK))
        return held[-1]

    plans = []
    for (role, index), placement in placements.items():
        address = hold()
        if config.engine is EngineKind.VLLM:
            side_channel = hold() if role in vllm.KV_ROLES else None
            command, environment = _vllm(config, folder, role, placement, surroundings, address, side_channel)
        else:
            command = commands.instance_command(
                config, folder, role, address, surroundings.storage, surroundings.ec_max_bytes, placement
            )
            environment = dict(os.environ)
        plans.append(ProcessPlan(f"{role}-{index}", role, address, command, environment))
    return plans


def plan_proxy(config: DeploymentConfig, address: HeldPort, instances: Sequence[ProcessPlan]) -> ProcessPlan:
    """The proxy in front of ``instances``."""
    urls = [(plan.role, plan.address.url) for plan in instances if plan.role is not None]
    command = commands.proxy_command(config, address, urls)
    return ProcessPlan(PROXY, None, address, command, commands.proxy_environment(config))


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
        # vLLM measures what is free on its devices while it starts, so those who share one start one after the other.
        turn = surroundings.scratch / f"turn-{placement.devices[0]}"
    site = vllm.Site(address, placement, surroundings.storage, surroundings.ec_max_bytes, side_channel, turn)
    found = vllm.installed()
    kv_bytes = vllm.default_kv_bytes(config, int(psutil.virtual_memory().available))
    command = vllm.instance_command(config, folder, role, site, found=found, kv_bytes=kv_bytes)
    return command, vllm.instance_environment(config, role, site, found=found)
