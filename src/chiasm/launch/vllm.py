"""Command line and environment that make ``vllm serve`` an instance of a deployment.

One instance is one ``vllm serve`` under a supervisor (``supervisor.py``), with chiasm's EC connector and middleware in it.
Settings that vLLM knows under other names are translated; the flags that a person gives come last, so that they win.
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

from chiasm.ec_transfer import ECTransferConfig
from chiasm.ec_transfer.stores.address import URL_VARIABLE
from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, install_command
from chiasm.integrations.vllm import check_version
from chiasm.launch.config import DeploymentConfig
from chiasm.launch.devices import Placement
from chiasm.launch.ports import HeldPort
from chiasm.launch.process import KV_ROLES, vllm_flags
from chiasm.models.checkpoint import config_if_readable
from chiasm.wire import Role

CONNECTOR = "ChiasmECConnector"
CONNECTOR_MODULE = "chiasm.integrations.vllm.ec_connector"
MIDDLEWARE = "chiasm.integrations.vllm.middleware.ChiasmMiddleware"
KV_CONNECTOR = "NixlConnector"
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""In which connectors from memory to memory copy nothing more. It is vLLM's own choice on one GPU; on a CPU it takes two
processes, also if it is asked for this one by its short name."""
_EC_ROLES = {
    Role.ENCODER: "ec_producer",
    Role.PD: "ec_consumer",
    Role.PREFILL: "ec_consumer",
    Role.DECODE: "ec_consumer",
}
"""Decode instances need embeddings when they are short of KV blocks and compute a prompt again. Without a connector vLLM would
then encode images that it doesn't have, which ends the engine."""
_EC_SETTINGS = {
    "ec_receive_bytes": "receive_bytes",
    "ec_store_read_bytes": "store_read_bytes",
    "ec_store_queue_bytes": "store_queue_bytes",
}
"""The settings of chiasm's connector in vLLM, by the option."""
_RUN_WITHOUT_TOWER = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose language model accepts embeddings without the vision tower. Models with DeepStack are not among them: vLLM
looks for it in the tower, and stops at the first embedding if there is no tower."""
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
"""An encoder uses no KV cache, but without a size vLLM asks for nearly all of the machine's memory."""


@dataclass(frozen=True)
class Site:
    """What the machine gives one instance."""

    address: HeldPort
    placement: Placement
    storage: Path | None
    """Folder of the embeddings; None if none are exchanged, or not through a folder."""
    ec_max_bytes: int
    side_channel: HeldPort | None
    """Port of NIXL's handshake; None for instances that exchange no KV."""
    turn: Path | None
    """The lock that orders the starts on a device that instances share."""


@dataclass(frozen=True)
class Installed:
    """The vLLM of this environment."""

    command: Path
    version: str

    @property
    def on_cpu(self) -> bool:
        """Whether it is built for machines without a GPU; vLLM itself recognizes it by its version."""
        return "cpu" in self.version


def installed(executable: str = sys.executable) -> Installed:
    """Return the vLLM beside chiasm. Raises ConfigurationError if there is none, or one that isn't supported."""
    command = Path(executable).with_name("vllm")
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or not command.is_file():
        raise ConfigurationError(
            f"--engine vllm needs vLLM in chiasm's environment, and {command.parent.parent} has none; `make vllm` makes an "
            f"environment with both, .venv-vllm, and on a machine with a GPU you can run {install_command(Extra.VLLM)} in a "
            "clone of chiasm."
        )
    check_version(version)
    return Installed(command, version)


def instance_command(
    config: DeploymentConfig, folder: Path, role: Role, site: Site, *, found: Installed, kv_bytes: int
) -> list[str]:
    """Return the supervisor's command for one instance. ``kv_bytes``: size of its KV cache on CPU unless a person has set it.

    Raises ConfigurationError for settings that vLLM doesn't have.
    """
    chosen = config.roles[role]
    command = [sys.executable, "-m", "chiasm.launch.supervisor", "--url", site.address.url]
    command += ["--shutdown-timeout-seconds", f"{config.shutdown_timeout_seconds:g}"]
    if site.placement.cpus:
        command += ["--cpus", ",".join(map(str, site.placement.cpus))]
    if site.placement.nice:
        command += ["--nice", str(site.placement.nice)]
    if site.turn is not None:
        command += ["--turn", str(site.turn)]
    command += ["--", str(found.command), "serve", str(folder)]
    command += ["--host", site.address.host, "--port", str(site.address.port)]
    command += ["--served-model-name", config.model_name]
    command += ["--shutdown-timeout", str(math.ceil(config.shutdown_timeout_seconds))]
    command += ["--middleware", MIDDLEWARE, "--disable-access-log-for-endpoints", _QUIET_PATHS]
    command += _role_flags(config, folder, role, site)
    settings = {**config.settings, **chosen.settings}
    given = (*vllm_flags(settings, role), *config.vllm_flags, *chosen.vllm_flags)
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
    """Return the environment of one instance; what a person has set stays, except for devices and ports."""
    chosen = {**environment}
    chosen.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder by now
    chosen.setdefault("VLLM_NO_USAGE_STATS", "1")
    # The same for all ranks: they iterate over sets of modalities, and deadlock unless they do it in the same order.
    chosen.setdefault("PYTHONHASHSEED", str(secrets.randbelow(1 << 32)))
    if found.on_cpu:
        # vLLM would bind the threads of every instance to the same cores.
        chosen.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        chosen.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        chosen.setdefault("OMP_NUM_THREADS", str(site.placement.threads or 1))
    elif config.roles[role].threads is not None:
        chosen.setdefault("OMP_NUM_THREADS", str(config.roles[role].threads))
    chosen.pop(URL_VARIABLE, None)
    if config.ec_store:  # on the command line others would see its password, and vLLM would log it
        chosen[URL_VARIABLE] = config.ec_store
    if site.placement.devices:
        chosen["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the numbers are nvidia-smi's
        chosen["CUDA_VISIBLE_DEVICES"] = ",".join(site.placement.devices)
    if site.side_channel is not None:
        chosen["VLLM_NIXL_SIDE_CHANNEL_HOST"] = site.side_channel.host
        chosen["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(site.side_channel.port)
    return chosen


def api_keys(config: DeploymentConfig, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the API keys that all instances accept, as their flags or vLLM's variable say; empty if none needs one.

    Raises ConfigurationError if no key is accepted by all that need one: a request goes to several of them.
    """
    common: tuple[str, ...] = ()
    from_environment = [environment.get("VLLM_API_KEY", "")]
    for role in config.roles.values():
        given = _keys_in((*config.vllm_flags, *role.vllm_flags))
        if not all(given):  # vLLM would take it as no key
            raise ConfigurationError("--api-key: a key of a vLLM instance is empty; give one, or leave the option out.")
        keys = [key for key in given or from_environment if key]
        if not keys:
            continue
        common = tuple(key for key in common or keys if key in keys)
        if not common:
            raise ConfigurationError(
                "--api-key: the vLLM instances have no key in common; give all roles the same one."
            )
    return common


def _keys_in(flags: Sequence[str]) -> list[str]:
    """Return the values of vLLM's last ``--api-key``, which takes several."""
    keys: list[str] = []
    is_key = False
    for flag in flags:
        name, has_value, value = flag.partition("=")
        if name.replace("_", "-") == "--api-key":
            keys, is_key = ([value] if has_value else []), not has_value
        elif flag.startswith("-"):
            is_key = False
        elif is_key:
            keys.append(flag)
    return keys


def default_kv_bytes(config: DeploymentConfig, available_bytes: int) -> int:
    """Return the KV cache of each language model on CPU; together they take a quarter of the free memory."""
    language = sum(config.count(role) for role in config.roles if role is not Role.ENCODER)
    return max(_ENCODER_KV_BYTES, min(_MOST_KV_BYTES, available_bytes // 4 // max(1, language)))


def attention_heads(folder: Path) -> int | None:
    """Return the greatest common divisor of the heads of language model and vision tower; None if they aren't known."""
    config = config_if_readable(folder)
    text, vision = _section(config, "text_config", "llm_config"), _section(config, "vision_config")
    heads: list[Any] = [text.get("num_attention_heads") or config.get("num_attention_heads")]
    heads += [vision.get("num_heads") or vision.get("num_attention_heads") or 0]
    return math.gcd(*heads) if all(isinstance(count, int) for count in heads) and heads[0] else None


def _role_flags(config: DeploymentConfig, folder: Path, role: Role, site: Site) -> list[str]:
    flags: list[str] = []
    if role in _EC_ROLES and config.exchanges_embeddings:
        flags += ["--ec-transfer-config", json.dumps(_ec_transfer(config, role, site))]
        if config.moves_from_memory and len(site.placement.devices) <= 1:
            flags += ["--distributed-executor-backend", ONE_PROCESS]
    if role in KV_ROLES:
        flags += ["--kv-transfer-config", json.dumps(_kv_transfer(config, role))]
    if role is Role.ENCODER:
        flags += ["--no-enable-prefix-caching"]  # it has no KV
    elif role is not Role.AGGREGATED:
        flags += ["--skip-mm-profiling"]  # it never encodes
        if config_if_readable(folder).get("model_type") in _RUN_WITHOUT_TOWER:
            # With no image allowed vLLM loads no vision tower; embeddings are let in all the same.
            flags += ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0}), "--enable-mm-embeds"]
    return flags


def _ec_transfer(config: DeploymentConfig, role: Role, site: Site) -> dict[str, Any]:
    extra: dict[str, Any] = {**config.connector_extra_config}
    if config.ec_connector != ECTransferConfig.connector or config.connector_module_path is not None:
        extra["connector"] = config.ec_connector
    if config.connector_module_path is not None:
        extra["connector_module_path"] = config.connector_module_path
    if site.storage is not None and not config.moves_from_memory:
        extra["shared_storage_path"] = str(site.storage)
    extra["max_bytes"] = site.ec_max_bytes
    extra |= {name: value for option, name in _EC_SETTINGS.items() if (value := getattr(config, option)) is not None}
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
    """Return whether a person has set the size of the KV cache."""
    named = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    return not named.isdisjoint(_KV_SIZES) or bool(os.environ.get(_KV_SIZE_VARIABLE))


def _section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return next((config[name] for name in names if isinstance(config.get(name), dict)), {})
