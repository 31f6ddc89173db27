"""What a deployment is made from."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from chiasm.cores import usable_cores
from chiasm.ec_transfer import ECConnectorFactory, ECTransferConfig, moves_from_memory
from chiasm.ec_transfer.stores import StoreAddress
from chiasm.errors import ConfigurationError
from chiasm.http.key_rules import check_key
from chiasm.http.shutdown import SHUTDOWN_TIMEOUT_SECONDS
from chiasm.launch import reserved
from chiasm.launch.layout import Layout, check_counts, even_shares
from chiasm.launch.process import INSTANCE_OPTIONS, PROXY_OPTIONS, Cpus, ServedModelName, vllm_flags
from chiasm.options import Option, flag, names_of
from chiasm.wire import Role

_FOLDER = "SharedStorageConnector"
_MEMORY = "SharedMemoryConnector"
_NIXL = "NixlConnector"
OF_EC = (
    "connector",
    "connector_module_path",
    "connector_extra_config",
    "shared_storage_path",
    "ec_max_bytes",
    "ec_receive_bytes",
)
"""What says how embeddings move. A store is left out, since it may be in the environment of all."""
OF_STORE = ("ec_store", "ec_store_read_bytes", "ec_store_queue_bytes")
"""What says where else embeddings are kept."""
OF_KV = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config", "kv_lease_seconds")
"""What says how KV moves."""
MAX_INSTANCES = 1024
"""Instances of one role."""


class EngineKind(enum.StrEnum):
    """What instances run."""

    CHIASM = "chiasm"
    """The built-in engine: ``chiasm instance``."""
    VLLM = "vllm"
    """``vllm serve`` of the same environment, with chiasm's connector in it."""


@dataclass(frozen=True)
class RoleConfig:
    """The instances of one role; all of them are alike."""

    count: Annotated[int | None, Option("Number of these instances.", min=0)] = 1
    """On each device in the layouts ``colocated`` and ``aggregated``. None: as many as the layout puts there."""
    threads: Annotated[
        int | None,
        Option(
            "CPU threads of each instance.", min=1, unset="all cores of a shared device, otherwise an even share of all"
        ),
    ] = None
    """Intra-op threads."""
    cpus: Cpus = ()
    devices: Annotated[
        tuple[str, ...],
        Option(
            "GPUs, divided evenly among these instances, for example 0,1.",
            metavar="GPUS",
            separator=",",
            unset="chosen by the engine",
        ),
    ] = ()
    """Numbers or UUIDs."""
    memory_share: Annotated[
        float | None,
        Option(
            "vLLM only: fraction of each GPU's memory for each instance.", min=0.01, max=1, unset="all that is free"
        ),
    ] = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of these instances, by name; they override those of ``DeploymentConfig.settings``."""
    vllm_flags: tuple[str, ...] = ()
    """More arguments of ``vllm serve``, after those of ``DeploymentConfig.vllm_flags``."""
    least: int | None = None
    """Fewest encoders that run: between it and ``count``, they are as many as the proxy desires. None: always ``count``."""

    def own_options(self, role: Role) -> list[str]:
        """Return the options that only these instances have, as a person writes them."""
        given = {
            "cpus": self.cpus,
            "devices": self.devices,
            "memory_share": self.memory_share,
            "args": self.settings or self.vllm_flags,
        }
        return [flag(f"{role}_{name}") for name, value in given.items() if value]


@dataclass(frozen=True)
class DeploymentConfig:
    """Instances of one model and the proxy in front of them, all on this machine.

    Raises ConfigurationError for what cannot work together.
    """

    model: str
    """A checkpoint's folder, the name of a shipped one, or a hub name."""
    roles: Mapping[Role, RoleConfig] = field(default_factory=dict)
    """Either all of them have a count, or none has one; then the layout decides which roles there are."""
    layout: Annotated[
        Layout,
        Option(
            "colocated: an encoder and a language model share each device; split: roles divide the devices; aggregated: "
            "instances on each device do everything; auto: colocated, unless you count or place roles, or the GPUs differ."
        ),
    ] = Layout.AUTO
    devices: Annotated[
        str,
        Option(
            "GPUs to use, for example 0,1; on a CPU sets of cores, each of which counts as a device, for example 0-3/4-7.",
            metavar="DEVICES",
            unset="all GPUs, or all cores",
        ),
    ] = ""
    engine: Annotated[
        EngineKind, Option("Engine of the instances: the built-in one, or `vllm serve` of the same environment.")
    ] = EngineKind.CHIASM
    host: str = "127.0.0.1"
    """Where the proxy listens; instances are reachable from this machine only."""
    port: int = 0
    """Port of the proxy; 0 takes a free one."""
    served_model_name: ServedModelName = None
    connector: Annotated[
        str | None,
        Option(
            "Connector that transfers embeddings.",
            metavar="NAME",
            unset="SharedMemoryConnector; SharedStorageConnector with --shared-storage-path and with --engine vllm",
        ),
    ] = None
    connector_module_path: str | None = None
    connector_extra_config: Mapping[str, Any] = field(default_factory=dict)
    """Settings that only the connector understands."""
    shared_storage_path: Path | None = None
    """Folder of the embeddings; None makes one if needed, in shared memory if there is room, and removes it at the end."""
    ec_max_bytes: int | None = None
    """Maximum size of the embeddings that are kept; None: 4 GiB, or less if there is less room."""
    ec_receive_bytes: int | None = None
    """Maximum size of the embeddings that are on their way to an instance; None: the connectors' default."""
    ec_store: str = field(default="", repr=False)
    """URL of the shared cache of embeddings beside the connector; empty: none."""
    ec_store_read_bytes: int | None = None
    ec_store_queue_bytes: int | None = None
    kv_connector: str | None = None
    """None: SharedMemoryConnector, and vLLM's own NixlConnector between vLLM instances."""
    kv_connector_module_path: str | None = None
    kv_connector_extra_config: Mapping[str, Any] = field(default_factory=dict)
    """Settings that only the KV connector understands."""
    kv_lease_seconds: float | None = None
    """How long a prefill instance holds KV that nobody claims; None: the connector's default."""
    deadline_seconds: float | None = None
    """Maximum duration of a request; None: 600 seconds."""
    shutdown_timeout_seconds: float = SHUTDOWN_TIMEOUT_SECONDS
    """Time for running requests to end when the deployment is asked to end."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of every instance, by name: ``{"max_model_len": 512}``."""
    proxy_settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of the proxy, by name."""
    vllm_flags: tuple[str, ...] = ()
    """More arguments of every ``vllm serve``."""
    admin_key: str | None = field(default=None, repr=False)
    """Bearer token that may change the proxy's instances."""
    admin_key_file: Path | None = None
    """File with such keys, one a line."""
    fleet_key_file: Path | None = None
    """File with the key by which proxy and instances know each other; None: CHIASM_FLEET_KEY, or a new key at each start."""
    proxy_cpus: tuple[int, ...] = ()
    """CPUs that the proxy runs on; empty: all."""

    def __post_init__(self) -> None:
        if self.admin_key is not None:
            check_key("--admin-key or CHIASM_ADMIN_KEY", self.admin_key)
        if self.ec_store:
            StoreAddress.parse(self.ec_store)
        if self.shared_storage_path is not None and self.moves_from_memory:
            raise ConfigurationError(
                f"--shared-storage-path: {self.ec_connector} uses no folder; leave it out, or take {_FOLDER}."
            )
        self._check_roles()
        self._check_devices()
        known = names_of(*INSTANCE_OPTIONS)
        _check_names(self.settings, known)
        reserved.check_instance("Settings of all instances", self.settings)
        reserved.check_vllm("--vllm-args", self.vllm_flags)
        for role, chosen in self.roles.items():
            _check_names(chosen.settings, known)
            reserved.check_instance(f"--{role}-args", chosen.settings)
            reserved.check_vllm(f"--{role}-args", chosen.vllm_flags)
        _check_names(self.proxy_settings, names_of(*PROXY_OPTIONS))
        reserved.check_proxy("--proxy-args", self.proxy_settings)
        if self.engine is EngineKind.VLLM:
            self._check_vllm()
            return
        if sharing := [role for role in self.roles if self.roles[role].memory_share is not None]:
            raise ConfigurationError(
                f"--{sharing[0]}-memory-share is for --engine vllm only; the built-in engine takes the size of its KV cache "
                "from --kv-cache-bytes."
            )
        if self.vllm_flags or any(role.vllm_flags for role in self.roles.values()):
            raise ConfigurationError(
                "--vllm-args is for --engine vllm only; the built-in engine has options of its own."
            )

    def _check_roles(self) -> None:
        if not self.is_counted:
            if any(role.count is not None for role in self.roles.values()):
                raise ConfigurationError("Give the number of instances of every role, or of none.")
            return
        if any(self.count(role) < 0 for role in self.roles):
            raise ConfigurationError("Instance counts must not be negative.")
        if any(self.count(role) > MAX_INSTANCES for role in self.roles):
            raise ConfigurationError(f"A deployment has at most {MAX_INSTANCES} instances of each role.")
        self._check_ranges()
        check_counts(self.layout, {role: self.count(role) for role in self.roles})
        whole, apart = self._counts(Role.PD, Role.AGGREGATED), self._counts(Role.PREFILL, Role.DECODE)
        if any(whole) and any(apart):
            raise ConfigurationError("--prefills/--decodes can't be combined with --pds/--aggregated.")
        if any(apart) and not all(apart):
            missing = "decode" if self.count(Role.PREFILL) else "prefill"
            raise ConfigurationError(
                f"Prefill and decode instances need each other; ask for at least one {missing} instance too."
            )
        if not any(whole) and not any(apart):
            raise ConfigurationError(
                "Nothing would answer: ask for at least one PD or aggregated instance, or a prefill and a decode instance."
            )
        if self.count(Role.ENCODER) and not self.exchanges_embeddings:
            raise ConfigurationError(
                "Nothing would use the encoders: ask for at least one PD instance, or a prefill and a decode instance."
            )

    def check_used(self, roles: Mapping[Role, RoleConfig]) -> None:
        """Raise ConfigurationError for options of instances that aren't there; ``roles`` has what was given for each role."""
        for role, chosen in roles.items():
            if not self.count(role) and (options := chosen.own_options(role)):
                name = "PD" if role is Role.PD else role
                raise ConfigurationError(
                    f"{', '.join(options)}: there are no {name} instances here; ask for some, or leave this out."
                )
        if not self.exchanges_embeddings and (options := self._given(OF_EC)):
            raise ConfigurationError(
                f"{', '.join(options)}: no embeddings go from instance to instance here; leave this out, or ask for PD or "
                "prefill instances."
            )
        if not self.count(Role.PREFILL) and (options := self._given(OF_KV)):
            raise ConfigurationError(
                f"{', '.join(options)}: only prefill and decode instances exchange KV; leave this out, or ask for --prefills "
                "and --decodes."
            )

    def _given(self, names: Sequence[str]) -> list[str]:
        """Return the options of these that were given, as a person writes them."""
        return [flag(name) for name in names if getattr(self, name) not in (None, {})]

    def _check_ranges(self) -> None:
        """Raise ConfigurationError for a least number of instances that can't be one."""
        for role, chosen in self.roles.items():
            if chosen.least is None:
                continue
            if role is not Role.ENCODER:
                raise ConfigurationError(f"Only encoders come and go by what is needed, and {role} instances don't.")
            if not 1 <= chosen.least <= self.count(role):
                raise ConfigurationError(
                    f"There can't be {chosen.least} to {self.count(role)} encoders; ask for a range such as 1..4."
                )

    def _check_vllm(self) -> None:
        """Raise ConfigurationError for connectors and settings that vLLM instances don't have."""
        ECConnectorFactory.check_name(
            ECTransferConfig(self.ec_connector, connector_module_path=self.connector_module_path)
        )
        is_nixl = self.kv_connector in (None, _NIXL) and self.kv_connector_module_path is None
        if not is_nixl or self.kv_connector_extra_config:
            raise ConfigurationError(
                f"--kv-connector: vLLM instances exchange KV through {_NIXL}; for another of vLLM's, or other settings, give "
                "--kv-transfer-config in --prefill-args and --decode-args."
            )
        for role in self.roles or Role:
            vllm_flags({**self.settings, **(self.roles[role].settings if self.roles else {})}, role)

    def _check_devices(self) -> None:
        """Raise ConfigurationError for roles that are placed where the layout or ``devices`` place all."""
        for role, chosen in self.roles.items():
            option = f"--{role}-devices" if chosen.devices else f"--{role}-cpus" if chosen.cpus else None
            if option is not None and self.devices:
                raise ConfigurationError(
                    f"--devices is for all instances and {option} for some; give only one of them."
                )
            if option is not None and self.layout in (Layout.COLOCATED, Layout.AGGREGATED):
                raise ConfigurationError(
                    f"--layout {self.layout} places instances itself, so {option} contradicts it; use --devices, or --layout "
                    "split."
                )

    @property
    def is_counted(self) -> bool:
        """Whether the roles and their numbers are known, so that no layout has to decide them."""
        return bool(self.roles) and all(role.count is not None for role in self.roles.values())

    def count(self, role: Role) -> int:
        """Return the number of instances of ``role``; 0 if a layout has yet to decide it."""
        return self.roles[role].count or 0 if role in self.roles else 0

    @property
    def least_encoders(self) -> int:
        """The fewest encoders that run; all of them unless their number changes."""
        least = self.roles[Role.ENCODER].least if Role.ENCODER in self.roles else None
        return self.count(Role.ENCODER) if least is None else least

    @property
    def scales(self) -> bool:
        """Whether encoders are started and drained by what is needed."""
        return self.least_encoders < self.count(Role.ENCODER)

    def threads(self, role: Role, index: int = 0) -> int:
        """Return the threads of an instance of ``role``: as configured, else an even share of its cores, at least one.

        Cores that are left over when all of them are shared out go to one instance each, language models first.
        """
        chosen = self.roles[role]
        if chosen.threads is not None:
            return chosen.threads
        if chosen.cpus:
            return max(1, even_shares(len(set(chosen.cpus)), self.count(role))[index])
        ordered = sorted(self.roles, key=lambda one: one is Role.ENCODER)
        before = sum(self._counts(*ordered[: ordered.index(role)]))
        return max(1, even_shares(usable_cores(), sum(self._counts(*ordered)))[before + index])

    @property
    def model_name(self) -> str:
        """The name by which clients ask for the model."""
        return self.served_model_name or model_name(self.model)

    @property
    def scheme(self) -> str:
        """What URLs of the proxy begin with."""
        return "http" if self.proxy_settings.get("ssl_certfile") is None else "https"

    @property
    def ec_connector(self) -> str:
        """What moves embeddings."""
        if self.connector is not None:
            return self.connector
        uses_folder = self.shared_storage_path is not None or self.engine is EngineKind.VLLM
        return _FOLDER if uses_folder else _MEMORY

    @property
    def makes_folder(self) -> bool:
        """Whether embeddings need a folder, and none is named."""
        return self.exchanges_embeddings and self.shared_storage_path is None and not self.moves_from_memory

    @property
    def moves_from_memory(self) -> bool:
        """Whether embeddings go from an encoder's memory to a language model's."""
        return moves_from_memory(self.ec_connector, self.connector_module_path)

    @property
    def exchanges_embeddings(self) -> bool:
        """Whether there is an instance whose embeddings come from another."""
        return any(self._counts(Role.PD, Role.PREFILL))

    def _counts(self, *roles: Role) -> list[int]:
        return [self.count(role) for role in roles]


def model_name(model: str) -> str:
    """Return what clients call a model: a checkpoint's folder by its own name, anything else as it was given."""
    path = Path(os.path.expanduser(model))
    return path.resolve().name if (path / "config.json").is_file() else model


def _check_names(settings: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(settings.keys() - known):
        raise ConfigurationError(f"There is no option {', '.join(map(flag, unknown))}.")
