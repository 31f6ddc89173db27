"""What one process of a deployment is made from, and what settings become for each engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from chiasm.ec_transfer import ECConnectorFactory, ECTransferConfig, ECTransferRole
from chiasm.ec_transfer.extra_config import EXTRA_CONFIGS, PeerConfig, SharedStorageConfig
from chiasm.engine.config import EngineConfig
from chiasm.errors import ConfigurationError
from chiasm.http.config import HttpConfig
from chiasm.http.log_format import LOG_FORMATS, TEXT
from chiasm.kv_transfer import KVConnectorFactory, KVTransferConfig, KVTransferRole
from chiasm.media import MediaConfig
from chiasm.options import Option, fields_from, flag, names_of
from chiasm.proxy import ProxyConfig
from chiasm.server import ServerConfig
from chiasm.wire import Role

LOG_LEVELS = ("debug", "info", "warning", "error")
KV_ROLES = {Role.PREFILL: KVTransferRole.PRODUCER, Role.DECODE: KVTransferRole.CONSUMER}
_OF_DECODE = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config")
"""The options about KV that a decode instance shares with its prefill instances."""

_SEE_IMAGES = (Role.ENCODER, Role.AGGREGATED)
_VLLM_FLAGS = {
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_seqs": "--max-num-seqs",
    "max_queued_requests": "--max-num-queued-reqs",
    "block_size": "--block-size",
}
"""vLLM's flags for settings that mean the same to every instance of vLLM."""
_VLLM_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_NOT_VLLM = {
    "device": "vLLM computes on what it is built for; name GPUs with --encoder-devices, --pd-devices and the like",
    "encoder_cache_bytes": "vLLM counts that cache in tokens, as many as --max-num-batched-tokens",
}

Cpus = Annotated[tuple[int, ...], Option("CPUs to run on, for example 0,2-3.", metavar="CPUS", unset="all")]
ServedModelName = Annotated[
    str | None, Option("Name by which clients ask for the model.", metavar="NAME", unset="the folder's or hub name")
]


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """What instances and proxies have in common."""

    cpus: Cpus = ()
    log_level: Annotated[str, Option("Lowest level of messages to log on standard error.", choices=LOG_LEVELS)] = "info"
    log_format: Annotated[
        str, Option("Whether lines of the log are for people, or one JSON object each.", choices=LOG_FORMATS)
    ] = TEXT


@dataclass(frozen=True, kw_only=True)
class InstanceProcess(ProcessConfig):
    """One instance of the built-in engine."""

    engine: EngineConfig
    server: ServerConfig
    served_model_name: ServedModelName = None


@dataclass(frozen=True, kw_only=True)
class ProxyProcess(ProcessConfig):
    """One proxy."""

    proxy: ProxyConfig
    workers: Annotated[
        int, Option("Processes that serve the port together; each is a proxy with all limits.", min=1, max=64)
    ] = 1


EC_OPTIONS = (ECTransferConfig, SharedStorageConfig, PeerConfig)
"""The dataclasses whose options say how embeddings are exchanged."""
INSTANCE_OPTIONS = (
    EngineConfig,
    *EC_OPTIONS,
    KVTransferConfig,
    ServerConfig,
    HttpConfig,
    MediaConfig,
    InstanceProcess,
)
"""The dataclasses whose options are those of one instance."""
PROXY_OPTIONS = (ProxyConfig, HttpConfig, MediaConfig, ProxyProcess)
_Process = TypeVar("_Process", bound=ProcessConfig)


def instance_process(folder: Path, role: Role, settings: Mapping[str, Any]) -> InstanceProcess:
    """Return the process of one instance. Raises ConfigurationError for settings that the role doesn't use."""
    return InstanceProcess(
        engine=EngineConfig(
            folder,
            role,
            ec=ec_config(role, settings),
            kv=kv_config(role, settings),
            media=_media(settings),
            **fields_from(settings, EngineConfig),
        ),
        server=ServerConfig(media=_media(settings), http=_http(settings), **fields_from(settings, ServerConfig)),
        **fields_from(settings, InstanceProcess),
    )


def proxy_process(settings: Mapping[str, Any]) -> ProxyProcess:
    """Return the process of a proxy. Raises ConfigurationError as :class:`ProxyConfig` does."""
    return ProxyProcess(
        proxy=ProxyConfig(media=_media(settings), http=_http(settings), **fields_from(settings, ProxyConfig)),
        **fields_from(settings, ProxyProcess),
    )


def _media(settings: Mapping[str, Any]) -> MediaConfig:
    return MediaConfig(**fields_from(settings, MediaConfig))


def _http(settings: Mapping[str, Any]) -> HttpConfig:
    return HttpConfig(**fields_from(settings, HttpConfig))


def ec_config(role: Role, settings: Mapping[str, Any]) -> ECTransferConfig | None:
    """Return how an instance exchanges embeddings; None for decode, and for aggregated without any such setting.

    Raises ConfigurationError for settings that the role or the connector doesn't use, and for those that it lacks.
    """
    unused = ("ec_store",) if role in (Role.DECODE, Role.AGGREGATED) else ()  # it may be in the environment of all
    names = _flags(settings, *EC_OPTIONS, without=unused)
    if role is Role.DECODE and names:
        raise ConfigurationError(f"A decode instance uses no embeddings, its prefill instance does; leave out {names}.")
    if role is Role.DECODE or (role is Role.AGGREGATED and not names):
        return None
    transfer_role = ECTransferRole.PRODUCER if role is Role.ENCODER else ECTransferRole.CONSUMER
    given = fields_from({name: settings[name] for name in settings if name not in unused}, ECTransferConfig)
    config = ECTransferConfig(role=transfer_role, **given)
    config = replace(config, connector_extra_config=extra_config(config, settings))
    ECConnectorFactory.check(config)
    return config


def extra_config(config: ECTransferConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the connector's own settings: those in ``config``, and the options of chiasm's own connectors, as JSON has them.

    Raises ConfigurationError for options of another connector.
    """
    own = EXTRA_CONFIGS.get(config.connector) if config.connector_module_path is None else None
    extra = dict(config.connector_extra_config)
    for kind in (SharedStorageConfig, PeerConfig):
        names = _flags(settings, kind)
        if names and own not in (None, kind):
            raise ConfigurationError(f"{names}: {config.connector} has no such setting; leave it out.")
        extra |= msgspec.to_builtins(fields_from(settings, kind), enc_hook=str)
    return extra


def kv_config(role: Role, settings: Mapping[str, Any]) -> KVTransferConfig | None:
    """Return how an instance exchanges KV; None unless it is a prefill or a decode instance.

    Raises ConfigurationError for settings that the role doesn't use.
    """
    if role not in KV_ROLES:
        if names := _flags(settings, KVTransferConfig):
            raise ConfigurationError(f"{names}: only prefill and decode instances exchange KV, and this one is {role}.")
        return None
    if role is Role.DECODE and (names := _flags(settings, KVTransferConfig, without=_OF_DECODE)):
        raise ConfigurationError(f"{names}: only prefill instances offer KV; give it to them.")
    config = KVTransferConfig(role=KV_ROLES[role], **fields_from(settings, KVTransferConfig))
    KVConnectorFactory.check(config)
    return config


def _flags(settings: Mapping[str, Any], *configs: type, without: tuple[str, ...] = ()) -> str:
    """Return the settings that are options of these dataclasses, as a person writes them."""
    names = names_of(*configs).difference(without)
    return ", ".join(flag(name) for name in settings if name in names)


def vllm_flags(settings: Mapping[str, Any], role: Role) -> list[str]:
    """Return vLLM's flags for settings of an instance of ``role``.

    Settings about media have none: the proxy fetches for all, and vLLM sees only ``data:`` URLs. Raises ConfigurationError for
    settings that mean nothing to vLLM.
    """
    flags: list[str] = []
    for name, value in settings.items():
        if name == "dtype" and value not in _VLLM_DTYPES:
            raise ConfigurationError(f"Unknown dtype {value!r}; vLLM has {', '.join(_VLLM_DTYPES)}.")
        if name in _VLLM_FLAGS:
            flags += [_VLLM_FLAGS[name], str(value)]
        elif name == "log_level":
            flags += ["--log-level", value.upper(), "--uvicorn-log-level", value]
        elif name == "max_items":
            flags += ["--limit-mm-per-prompt", json.dumps({"image": value})] if role in _SEE_IMAGES else []
        elif name == "kv_cache_bytes":
            flags += ["--kv-cache-memory-bytes", str(value)] if role is not Role.ENCODER else []
        elif name not in names_of(MediaConfig) and (name, value) != ("device", "auto"):
            why = f": {_NOT_VLLM[name]}" if name in _NOT_VLLM else ""
            raise ConfigurationError(f"{flag(name)} means nothing to vLLM{why}.")
    return flags


def to_json(process: ProcessConfig) -> str:
    """Return the configuration as one line of JSON. Raises ConfigurationError if a setting has the wrong type."""
    text = msgspec.json.encode(process, enc_hook=str)
    try:
        from_json(text, type(process))
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"A setting has the wrong type: {error}.") from None
    return text.decode()


def from_json(text: bytes, kind: type[_Process]) -> _Process:
    """Return the configuration that ``to_json`` wrote. Raises msgspec.MsgspecError for anything else."""
    return msgspec.json.decode(text, type=kind, dec_hook=lambda wanted, value: wanted(value))  # Path is not JSON's
