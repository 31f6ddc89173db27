"""The command lines of a deployment's processes: what a person would type to start each by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from chiasm.cores import usable_cores
from chiasm.launch.config import DeploymentConfig, RoleConfig
from chiasm.launch.devices import Placement
from chiasm.launch.ports import HeldPort
from chiasm.wire import Role

_CHIASM = (sys.executable, "-m", "chiasm")
_EC_ROLES = (Role.ENCODER, Role.PD, Role.PREFILL)
_KV_ROLES = (Role.PREFILL, Role.DECODE)
_ANYWHERE = Placement()
PROBE_INTERVAL_SECONDS = 0.25
"""Of a proxy whose instances are all on this machine: an instance that comes or goes is noticed at once."""


def instance_command(
    config: DeploymentConfig,
    folder: Path,
    role: Role,
    address: HeldPort,
    storage: Path | None,
    ec_max_bytes: int,
    placement: Placement = _ANYWHERE,
) -> list[str]:
    """``chiasm instance`` for one instance. ``storage`` is None where no embeddings are exchanged."""
    chosen = config.roles[role]
    command = [*_CHIASM, "instance", str(folder), "--role", role, "--end-with-stdin"]
    command += ["--host", address.host, "--port", str(address.port)]
    command += ["--served-model-name", config.served_model_name or model_name(config.model)]
    command += ["--threads", str(threads_of(config.roles, role))]
    command += _cpus(chosen.cpus)
    if placement.devices:
        command += ["--device", f"cuda:{placement.devices[0]}"]
    if role in _EC_ROLES and storage is not None:
        command += ["--connector", config.connector]
        if config.connector_module_path:
            command += ["--connector-module-path", config.connector_module_path]
        command += ["--shared-storage-path", str(storage), "--ec-max-bytes", str(ec_max_bytes)]
    if role in _KV_ROLES:
        if config.kv_connector:
            command += ["--kv-connector", config.kv_connector]
        if config.kv_connector_module_path:
            command += ["--kv-connector-module-path", config.kv_connector_module_path]
        if role is Role.PREFILL and config.kv_lease_seconds is not None:
            command += ["--kv-lease-seconds", str(config.kv_lease_seconds)]
    return [*command, *_deadline(config), *config.instance_flags, *chosen.flags]


def proxy_command(config: DeploymentConfig, address: HeldPort, urls: Sequence[tuple[Role, str]]) -> list[str]:
    """``chiasm proxy`` in front of the instances at ``urls``."""
    command = [*_CHIASM, "proxy", "--end-with-stdin", "--host", address.host, "--port", str(address.port)]
    for role, url in urls:
        command += [f"--{role}", url]
    command += ["--probe-interval-seconds", str(PROBE_INTERVAL_SECONDS)]
    return [*command, *_cpus(config.proxy_cpus), *_deadline(config), *config.proxy_flags]


def model_name(model: str) -> str:
    """What clients call a model: a checkpoint's folder by its own name, anything else as it was given."""
    path = Path(model).expanduser()
    return path.resolve().name if (path / "config.json").is_file() else model


def threads_of(roles: Mapping[Role, RoleConfig], role: Role) -> int:
    """Threads of each instance of ``role``: what is configured, else an even share of its cores, at least one."""
    chosen = roles[role]
    if chosen.threads is not None:
        return chosen.threads
    if chosen.cpus:
        return max(1, len(set(chosen.cpus)) // chosen.count)
    return max(1, usable_cores() // sum(one.count for one in roles.values()))


def proxy_environment(config: DeploymentConfig) -> dict[str, str]:
    """The environment of the proxy; a command line would show the key to everybody on the machine."""
    return {**os.environ, **({"CHIASM_ADMIN_KEY": config.admin_key} if config.admin_key else {})}


def _deadline(config: DeploymentConfig) -> list[str]:
    return ["--deadline-seconds", str(config.deadline_seconds)] if config.deadline_seconds is not None else []


def _cpus(cpus: Sequence[int]) -> list[str]:
    return ["--cpus", ",".join(map(str, cpus))] if cpus else []
