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
        if not self.count(Role.PD) and not self.count(Role.AGGREGATED):
            raise ConfigurationError("nothing would answer: a deployment needs at least one pd or aggregated instance")
        if self.count(Role.ENCODER) and not self.count(Role.PD):
            raise ConfigurationError("nothing would use the encoders: they need at least one pd instance")

    def count(self, role: Role) -> int:
        """Instances of ``role``."""
        return self.roles[role].count if role in self.roles else 0

    @property
    def exchanges_embeddings(self) -> bool:
        """Whether there is an instance whose embeddings come from another."""
        return self.count(Role.PD) > 0
