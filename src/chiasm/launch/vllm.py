"""What ``vllm serve`` is told so that it becomes an instance of a deployment.

One instance is one ``vllm serve`` under a supervisor (``supervisor.py``), with chiasm's EC connector and middleware in it. The
flags that a person gives come last and so have the last word.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm import check_version
from chiasm.launch.commands import model_name, threads_of
from chiasm.launch.config import DeploymentConfig
from chiasm.launch.devices import Placement
from chiasm.launch.ports import HeldPort
from chiasm.wire import Role

CONNECTOR = "ChiasmECConnector"
CONNECTOR_MODULE = "chiasm.integrations.vllm.ec_connector"
MIDDLEWARE = "chiasm.integrations.vllm.middleware.ChiasmMiddleware"
KV_CONNECTOR = "NixlConnector"
KV_ROLES = (Role.PREFILL, Role.DECODE)
_EC_ROLES = {
    Role.ENCODER: "ec_producer",
    Role.PD: "ec_consumer",
    Role.PREFILL: "ec_consumer",
    Role.DECODE: "ec_consumer",
}
"""A decode instance asks for no embedding while it has P's KV. When it is short of blocks it computes a prompt again, and vLLM
without a connector would then encode images that it has not, which ends the engine."""
_RUN_WITHOUT_TOWER = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose language model takes embeddings in without the vision tower. Where there is DeepStack, vLLM looks for it in
the tower, and stops at the first embedding without one."""
_QUIET_PATHS = "/health,/metrics,/v1/models"
_KV_SIZES = (
    "--kv-cache-memory-bytes",
    "--gpu-memory-utilization",
    "--device-memory-utilization",
    "--num-gpu-blocks-override",
)
_KV_SIZE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
_MOST_KV_BYTES = 2 << 30
_ENCODER_KV_BYTES = 64 << 20
"""An encoder uses none; a number keeps vLLM from asking for nearly all of the machine's memory."""


@dataclass(frozen=True)
class Site:
    """What one instance is given by its machine."""

    address: HeldPort
    placement: Placement
    storage: Path | None
    """Where embeddings lie; None where none are exchanged."""
    ec_max_bytes: int
    side_channel: HeldPort | None
    """Where NIXL shakes hands; only of those that exchange KV."""
    turn: Path | None
    """The lock that orders the starts on a device that instances share."""


@dataclass(frozen=True)
class Installed:
    """The vLLM of this environment."""

    command: Path
    version: str

    @property
    def on_cpu(self) -> bool:
        """Whether it is built for machines without a GPU; vLLM itself tells it by this name."""
        return "cpu" in self.version


def installed(executable: str = sys.executable) -> Installed:
    """Raises ConfigurationError where there is no vLLM beside chiasm, or one that chiasm's connector isn't written for."""
    command = Path(executable).with_name("vllm")
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or not command.is_file():
        raise ConfigurationError(
            f"--engine vllm needs vLLM in the environment that chiasm runs in, and {command.parent.parent} has none; "
            "`make vllm` makes one with both, .venv-vllm, and a machine with a GPU may `pip install vllm` beside chiasm"
        )
    check_version(version)
    return Installed(command, version)


def instance_command(
    config: DeploymentConfig, folder: Path, role: Role, site: Site, *, found: Installed, kv_bytes: int
) -> list[str]:
    """The supervisor of one instance. ``kv_bytes`` is what an instance on CPU takes for KV unless it is told otherwise."""
    chosen = config.roles[role]
    command = [sys.executable, "-m", "chiasm.launch.supervisor", "--url", site.address.url]
    if chosen.cpus:
        command += ["--cpus", ",".join(map(str, chosen.cpus))]
    if site.turn is not None:
        command += ["--turn", str(site.turn)]
    command += ["--", str(found.command), "serve", str(folder)]
    command += ["--host", site.address.host, "--port", str(site.address.port)]
    command += ["--served-model-name", config.served_model_name or model_name(config.model)]
    command += ["--middleware", MIDDLEWARE, "--disable-access-log-for-endpoints", _QUIET_PATHS]
    command += _role_flags(config, folder, role, site)
    given = (*config.instance_flags, *chosen.flags)
    if found.on_cpu:
        command += ["--enforce-eager"]
        if not _sizes_kv(given):
            size = _ENCODER_KV_BYTES if role is Role.ENCODER else kv_bytes
            command += ["--kv-cache-memory-bytes", str(size)]
    if len(site.placement.devices) > 1:
        command += ["--tensor-parallel-size", str(len(site.placement.devices))]
    if site.placement.memory_share is not None:
        command += ["--gpu-memory-utilization", str(site.placement.memory_share)]
    return [*command, *given]


def instance_environment(
    config: DeploymentConfig, role: Role, site: Site, *, found: Installed, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of one instance; what a person has set stays, but for where it runs."""
    chosen = {**environment}
    chosen.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder by now
    chosen.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Of all ranks: they go through sets of modalities, and have to do it in the same order.
    chosen.setdefault("PYTHONHASHSEED", str(secrets.randbelow(1 << 32)))
    if found.on_cpu:
        # vLLM would bind the threads of every instance to the same cores.
        chosen.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        chosen.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        chosen.setdefault("OMP_NUM_THREADS", str(threads_of(config.roles, role)))
    elif config.roles[role].threads is not None:
        chosen.setdefault("OMP_NUM_THREADS", str(config.roles[role].threads))
    if site.placement.devices:
        chosen["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers are nvidia-smi's
        chosen["CUDA_VISIBLE_DEVICES"] = ",".join(site.placement.devices)
    if site.side_channel is not None:
        chosen["VLLM_NIXL_SIDE_CHANNEL_HOST"] = site.side_channel.host
        chosen["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(site.side_channel.port)
    return chosen


def default_kv_bytes(config: DeploymentConfig, available_bytes: int) -> int:
    """For each language model on CPU: together they take a quarter of the memory that is free."""
    language = sum(config.count(role) for role in config.roles if role is not Role.ENCODER)
    return max(_ENCODER_KV_BYTES, min(_MOST_KV_BYTES, available_bytes // 4 // max(1, language)))


def attention_heads(folder: Path) -> int | None:
    """The greatest number that divides the heads of the language model and of the vision tower; None if it isn't told."""
    config = _config_of(folder)
    text, vision = _section(config, "text_config", "llm_config"), _section(config, "vision_config")
    heads: list[Any] = [text.get("num_attention_heads") or config.get("num_attention_heads")]
    heads += [vision.get("num_heads") or vision.get("num_attention_heads") or 0]
    return math.gcd(*heads) if all(isinstance(count, int) for count in heads) and heads[0] else None


def _role_flags(config: DeploymentConfig, folder: Path, role: Role, site: Site) -> list[str]:
    flags: list[str] = []
    if role in _EC_ROLES and site.storage is not None:
        flags += ["--ec-transfer-config", json.dumps(_ec_transfer(config, role, site.storage, site.ec_max_bytes))]
    if role in KV_ROLES:
        flags += ["--kv-transfer-config", json.dumps(_kv_transfer(config, role))]
    if role is Role.ENCODER:
        flags += ["--no-enable-prefix-caching"]  # it has no KV
    elif role is not Role.AGGREGATED:
        flags += ["--skip-mm-profiling"]  # it never encodes
        if _config_of(folder).get("model_type") in _RUN_WITHOUT_TOWER:
            # With no image allowed vLLM loads no vision tower; embeddings are let in all the same.
            flags += ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0}), "--enable-mm-embeds"]
    return flags


def _ec_transfer(config: DeploymentConfig, role: Role, storage: Path, max_bytes: int) -> dict[str, Any]:
    extra: dict[str, Any] = {"shared_storage_path": str(storage), "max_bytes": max_bytes}
    if config.deadline_seconds is not None:
        extra["wait_seconds"] = config.deadline_seconds
    return {
        "ec_connector": CONNECTOR,
        "ec_connector_module_path": CONNECTOR_MODULE,
        "ec_role": _EC_ROLES[role],
        "ec_connector_extra_config": extra,
    }


def _kv_transfer(config: DeploymentConfig, role: Role) -> dict[str, Any]:
    transfer: dict[str, Any] = {"kv_connector": KV_CONNECTOR}
    transfer["kv_role"] = "kv_producer" if role is Role.PREFILL else "kv_consumer"
    if config.kv_lease_seconds is not None:
        transfer["kv_connector_extra_config"] = {"kv_lease_duration": math.ceil(config.kv_lease_seconds)}
    return transfer


def _sizes_kv(flags: Sequence[str]) -> bool:
    """Whether a person has said how much memory KV takes."""
    named = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    return not named.isdisjoint(_KV_SIZES) or bool(os.environ.get(_KV_SIZE_VARIABLE))


def _config_of(folder: Path) -> Mapping[str, Any]:
    """Of the checkpoint; vLLM itself says what is wrong with one that cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return next((config[name] for name in names if isinstance(config.get(name), dict)), {})
