"""What a deployment starts: command line, environment and configuration of each process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chiasm.launch import vllm
from chiasm.launch.config import OF_STORE, DeploymentConfig, EngineKind
from chiasm.launch.devices import Placement, Placements, mps_runs
from chiasm.launch.ports import HeldPort
from chiasm.launch.process import KV_ROLES, instance_process, proxy_process, to_json
from chiasm.memory import free_memory
from chiasm.wire import Role

PROXY = "proxy"
LOOPBACK = "127.0.0.1"
_MPS_PRIORITY, _MPS_BELOW_NORMAL = "CUDA_MPS_CLIENT_PRIORITY", "1"
_EC_ROLES = (Role.ENCODER, Role.PD, Role.PREFILL)


@dataclass(frozen=True)
class ProcessPlan:
    """One process, about to be started."""

    name: str
    """``proxy``, or the role and a number: ``encoder-0``."""
    role: Role | None
    """None for the proxy."""
    index: int
    """The number of an instance within its role."""
    address: HeldPort
    command: list[str]
    environment: dict[str, str]
    configuration: str = field(default="", repr=False)  # it may hold the admin key
    """One line for its standard input; empty for a process that gets everything on its command line."""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The same as options by name."""


@dataclass(frozen=True)
class Surroundings:
    """What all instances of a deployment have in common on this machine."""

    storage: Path | None
    """Folder of the embeddings; None if none are exchanged, or not through a folder."""
    ec_max_bytes: int
    scratch: Path | None
    """A folder for the files through which instances on the same device agree; None where none share a device."""


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
            plans.append(ProcessPlan(name, role, index, address, command, environment))
        else:
            settings = instance_settings(config, role, address, surroundings, placement)
            process = instance_process(folder, role, settings)
            environment = {**os.environ, **_cuda_environment(placement)}
            plans.append(ProcessPlan(name, role, index, address, _child(name), environment, to_json(process), settings))
        plans[-1].environment.update(_mps_environment(placement))
    return plans


def plan_proxy(
    config: DeploymentConfig,
    address: HeldPort,
    instances: Sequence[tuple[Role, str]],
    *,
    listed_in: Path | None = None,
    supervisor_key: str | None = None,
) -> ProcessPlan:
    """Return the proxy in front of instances, each given by role and base URL, and of those that a file lists.

    Whoever has ``supervisor_key`` may see what its operator may. Raises ConfigurationError.
    """
    keys = vllm.api_keys(config) if config.engine is EngineKind.VLLM else ()
    settings: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "cpus": config.proxy_cpus,
        "admin_key": config.admin_key,
        "admin_key_file": config.admin_key_file,
        "ec_store": config.ec_store,
        **{role: tuple(url for of, url in instances if of is role) for role in Role},
        **_times(config),
        **config.proxy_settings,
    }
    if listed_in is not None:
        settings["discover"] = (f"file:{listed_in}", *settings.get("discover", ()))
    process = proxy_process(settings)
    process = replace(process, proxy=replace(process.proxy, supervisor_key=supervisor_key))
    if keys and not process.proxy.http.needs_key:
        http = replace(process.proxy.http, keys_of_instances=keys)
        process = replace(process, proxy=replace(process.proxy, http=http))
    return ProcessPlan(PROXY, None, 0, address, _child(PROXY), dict(os.environ), to_json(process), settings)


def instance_settings(
    config: DeploymentConfig, role: Role, address: HeldPort, surroundings: Surroundings, placement: Placement
) -> dict[str, Any]:
    """Return the settings of one instance of the built-in engine."""
    chosen = config.roles[role]
    settings: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "served_model_name": config.model_name,
        "threads": placement.threads,
        "cpus": placement.cpus,
        "nice": placement.nice,
        **_times(config),
    }
    if placement.core_share and surroundings.scratch is not None:
        settings["core_share"] = surroundings.scratch / placement.core_share  # the first instance makes it
    if placement.devices:
        settings["device"] = "cuda:0"  # the only one that the process sees
    if role in _EC_ROLES:
        settings |= {
            "connector": config.ec_connector,
            "connector_module_path": config.connector_module_path,
            "connector_extra_config": config.connector_extra_config,
            "ec_max_bytes": surroundings.ec_max_bytes,
        }
        if surroundings.storage is not None and not config.moves_from_memory:
            settings["shared_storage_path"] = surroundings.storage
        settings |= {
            name: value
            for name in ("ec_receive_bytes", *OF_STORE)
            if (value := getattr(config, name)) not in (None, "")
        }
    if role in KV_ROLES:
        names = ["kv_connector", "kv_connector_module_path", *(["kv_lease_seconds"] if role is Role.PREFILL else [])]
        settings |= {name: value for name in names if (value := getattr(config, name)) is not None}
        settings["kv_connector_extra_config"] = config.kv_connector_extra_config
    return {**settings, **config.settings, **chosen.settings}


def _cuda_environment(placement: Placement) -> dict[str, str]:
    """Return what shows a process of the built-in engine its own GPU, and no other if that one is lost."""
    if not placement.devices:
        return {}
    # The numbers are nvidia-smi's.
    visible = ",".join(placement.uuids or placement.devices)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


def _mps_environment(placement: Placement) -> dict[str, str]:
    """Return what lets an instance give way on a GPU; it needs CUDA's Multi-Process Service."""
    return {_MPS_PRIORITY: _MPS_BELOW_NORMAL} if placement.nice and placement.devices and mps_runs() else {}


def _child(name: str) -> list[str]:
    return [sys.executable, "-m", "chiasm", "child", name]


def _times(config: DeploymentConfig) -> dict[str, float]:
    """Return the limits of time that proxy and instances have in common."""
    deadline = {} if config.deadline_seconds is None else {"deadline_seconds": config.deadline_seconds}
    return {"shutdown_timeout_seconds": config.shutdown_timeout_seconds, **deadline}


def _vllm(
    config: DeploymentConfig,
    folder: Path,
    role: Role,
    placement: Placement,
    surroundings: Surroundings,
    address: HeldPort,
    side_channel: HeldPort | None,
) -> tuple[list[str], dict[str, str]]:
    turn = None
    if placement.shared and surroundings.scratch is not None:
        # vLLM measures what is free on its devices while it starts, so those that share one start one after the other.
        turn = surroundings.scratch / f"turn-{placement.devices[0]}"
    site = vllm.Site(address, placement, surroundings.storage, surroundings.ec_max_bytes, side_channel, turn)
    found = vllm.installed()
    kv_bytes = vllm.default_kv_bytes(config, free_memory())
    command = vllm.instance_command(config, folder, role, site, found=found, kv_bytes=kv_bytes)
    return command, vllm.instance_environment(config, role, site, found=found)
