"""What a deployment is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chiasm.engine.config import Role
from chiasm.errors import ConfigurationError


@dataclass(frozen=True)
class RoleConfig:
    """The instances of one role; all of them are alike."""

    count: int = 1
    threads: int | None = None
    """Threads of one operator in each; None shares the cores out evenly."""
    cpus: tuple[int, ...] = ()
    """If not empty, the instances run on these CPUs only."""
    flags: tuple[str, ...] = ()
    """More arguments of ``chiasm instance``, after those of ``DeploymentConfig.instance_flags``."""


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
    kv_connector: str = "SharedMemoryConnector"
    kv_connector_module_path: str | None = None
    kv_lease_seconds: float | None = None
    """How long a prefill instance holds KV that nobody asks for; None: the connector's default."""
    instance_flags: tuple[str, ...] = ()
    """More arguments of ``chiasm instance``, for every instance."""
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

    def count(self, role: Role) -> int:
        """Instances of ``role``."""
        return self.roles[role].count if role in self.roles else 0

    @property
    def exchanges_embeddings(self) -> bool:
        """Whether there is an instance whose embeddings come from another."""
        return any(self._counts(Role.PD, Role.PREFILL))

    def _counts(self, *roles: Role) -> list[int]:
        return [self.count(role) for role in roles]
