"""What a deployment is made from."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chiasm.errors import ConfigurationError
from chiasm.wire import Role


class EngineKind(enum.StrEnum):
    """What instances run."""

    CHIASM = "chiasm"
    """The built-in engine: ``chiasm instance``."""
    VLLM = "vllm"
    """``vllm serve`` of the same environment, with chiasm's connector in it."""


@dataclass(frozen=True)
class RoleConfig:
    """The instances of one role; all of them are alike."""

    count: int = 1
    threads: int | None = None
    """Threads of one operator in each; None shares the cores out evenly."""
    cpus: tuple[int, ...] = ()
    """If not empty, the instances run on these CPUs only."""
    devices: tuple[str, ...] = ()
    """GPUs, by number or UUID, dealt to the instances in this order; empty: what the engine chooses."""
    memory_share: float | None = None
    """Of each device's memory, for one instance; None: all of it, or a share where instances share a device. vLLM only."""
    flags: tuple[str, ...] = ()
    """More arguments of ``chiasm instance`` or ``vllm serve``, after those of ``DeploymentConfig.instance_flags``."""


def _one_encoder_one_pd() -> Mapping[Role, RoleConfig]:
    return {Role.ENCODER: RoleConfig(), Role.PD: RoleConfig()}


@dataclass(frozen=True)
class DeploymentConfig:
    """Instances of one model and the proxy in front of them, all on this machine.

    Raises ConfigurationError for what cannot work together.
    """

    model: str
    """A checkpoint's folder, the name of a shipped one, or a hub name."""
    roles: Mapping[Role, RoleConfig] = field(default_factory=_one_encoder_one_pd)
    engine: EngineKind = EngineKind.CHIASM
    host: str = "127.0.0.1"
    """Where the proxy listens; instances are reachable from this machine only."""
    port: int = 0
    """Of the proxy; 0 takes a free one."""
    served_model_name: str | None = None
    """None: the name of the folder, or the shipped or hub name that was given."""
    connector: str = "SharedStorageConnector"
    connector_module_path: str | None = None
    shared_storage_path: Path | None = None
    """Where embeddings lie; None makes a folder, in shared memory where there is room, and removes it at the end."""
    ec_max_bytes: int | None = None
    """Bound of the embeddings there; None: 4 GiB, or less where there is less room."""
    kv_connector: str | None = None
    """None: SharedMemoryConnector, and vLLM's own NixlConnector between vLLM instances."""
    kv_connector_module_path: str | None = None
    kv_lease_seconds: float | None = None
    """How long a prefill instance holds KV that nobody asks for; None: the connector's default."""
    deadline_seconds: float | None = None
    """The longest that a request may take; None: 600 seconds."""
    instance_flags: tuple[str, ...] = ()
    """More arguments of ``chiasm instance`` or ``vllm serve``, for every instance."""
    proxy_flags: tuple[str, ...] = ()
    """More arguments of ``chiasm proxy``."""
    admin_key: str | None = field(default=None, repr=False)
    """Lets whoever sends it as Bearer token change the proxy's instances."""
    proxy_cpus: tuple[int, ...] = ()
    """If not empty, the proxy runs on these CPUs only."""

    def __post_init__(self) -> None:
        if any(role.count < 0 for role in self.roles.values()):
            raise ConfigurationError("a deployment cannot have fewer than no instances of a role")
        whole, apart = self._counts(Role.PD, Role.AGGREGATED), self._counts(Role.PREFILL, Role.DECODE)
        if any(whole) and any(apart):
            raise ConfigurationError(
                "prefill and decode instances stand in place of pd and aggregated instances, not beside them; "
                "leave out the ones or the others"
            )
        if any(apart) and not all(apart):
            missing = "decode" if self.count(Role.PREFILL) else "prefill"
            raise ConfigurationError(
                f"prefill and decode instances need each other; ask for at least one {missing} instance too"
            )
        if not any(whole) and not any(apart):
            raise ConfigurationError(
                "nothing would answer: a deployment needs at least one pd or aggregated instance, or a prefill and a decode "
                "instance"
            )
        if self.count(Role.ENCODER) and not self.exchanges_embeddings:
            raise ConfigurationError(
                "nothing would use the encoders: they need at least one pd instance, or a prefill and a decode instance"
            )
        if self.engine is EngineKind.VLLM:
            self._check_vllm()
        elif sharing := [role for role in self.roles if self.roles[role].memory_share is not None]:
            raise ConfigurationError(
                f"--{sharing[0]}-memory-share is vLLM's: the built-in engine is told how much its KV cache takes, "
                "--kv-cache-bytes"
            )

    def _check_vllm(self) -> None:
        """vLLM instances exchange embeddings through chiasm's connector in vLLM, and KV through vLLM's own."""
        if self.connector != "SharedStorageConnector" or self.connector_module_path is not None:
            raise ConfigurationError(
                "--connector: vLLM instances exchange embeddings through SharedStorageConnector; for a connector of vLLM's, "
                "give --ec-transfer-config in --encoder-args and --pd-args"
            )
        if self.kv_connector not in (None, "NixlConnector") or self.kv_connector_module_path is not None:
            raise ConfigurationError(
                "--kv-connector: vLLM instances exchange KV through NixlConnector; for another of vLLM's, give "
                "--kv-transfer-config in --prefill-args and --decode-args"
            )

    def count(self, role: Role) -> int:
        """Instances of ``role``."""
        return self.roles[role].count if role in self.roles else 0

    @property
    def exchanges_embeddings(self) -> bool:
        """Whether there is an instance whose embeddings come from another."""
        return any(self._counts(Role.PD, Role.PREFILL))

    def _counts(self, *roles: Role) -> list[int]:
        return [self.count(role) for role in roles]
