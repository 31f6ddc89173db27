"""Deployments that are compared at equal resources: each may use all cores, or all GPUs, of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from chiasm.bench.goodput_options import AGGREGATED, COLOCATED, MOST_REPLICAS, REPLICAS, SPLIT
from chiasm.bench.measurement import SERVED_NAME
from chiasm.bench.topology import on_vllm
from chiasm.cores import usable_cores
from chiasm.errors import ConfigurationError
from chiasm.launch import DeploymentConfig, RoleConfig
from chiasm.launch.arrangement import Arrangement, arrange
from chiasm.launch.config import EngineKind
from chiasm.launch.devices import found_gpus
from chiasm.launch.layout import Layout
from chiasm.launch.vllm import installed
from chiasm.wire import Role

_FREE_PORT = 0
_VLLM_LIMITS = ("--max-model-len", "4096", "--max-num-seqs", "32")


@dataclass(frozen=True)
class Arm:
    """One of the deployments that are compared."""

    name: str
    config: DeploymentConfig

    @property
    def instances(self) -> int:
        """How many there are."""
        config = self._arrangement.config
        return sum(config.count(role) for role in config.roles)

    @property
    def on_gpus(self) -> bool:
        return any(one.devices for one in self._arrangement.placements.values())

    @property
    def description(self) -> str:
        """What it runs and where."""
        return self._arrangement.description

    @property
    def _arrangement(self) -> Arrangement:
        return arrange(self.config, None)


def choose(
    model: str, engine: EngineKind, names: Sequence[str] = (), more: Mapping[str, DeploymentConfig] | None = None
) -> list[Arm]:
    """Return the arms called ``names``, or all. ``more`` has other deployments, which get the model, and any free port.

    Raises ConfigurationError if there is no such arm, or nothing to compare on this machine.
    """
    found = standard(model, engine, _devices(engine)) | {
        name: replace(config, model=model, served_model_name=SERVED_NAME, port=_FREE_PORT)
        for name, config in (more or {}).items()
    }
    if missing := [name for name in names if name not in found]:
        raise ConfigurationError(
            f"There is no arm {missing[0]!r} on this machine; the arms are {', '.join(found)}, and --arm adds others."
        )
    return [_arm(name, config, engine) for name, config in found.items() if not names or name in names]


def reference(model: str, engine: EngineKind) -> Arm:
    """Return what sets the limits: one aggregated instance with all cores, or with as many GPUs as it can compute on."""
    devices = _devices(engine)
    role = RoleConfig(1, devices=_of_one_instance(engine, devices))
    return _arm(AGGREGATED, DeploymentConfig(model, {Role.AGGREGATED: role}, served_model_name=SERVED_NAME), engine)


def left_out(engine: EngineKind) -> str | None:
    """Say which standard deployment this machine cannot have, and why."""
    devices = _devices(engine)
    if _of_one_instance(engine, devices) == devices:
        return None
    return (
        f"{AGGREGATED} is left out, since an instance of the built-in engine computes on one GPU; the limits are those of one "
        f"on GPU {devices[0]}."
    )


def _arm(name: str, config: DeploymentConfig, engine: EngineKind) -> Arm:
    return Arm(name, on_vllm(config, _VLLM_LIMITS) if engine is EngineKind.VLLM else config)


def standard(model: str, engine: EngineKind, devices: Sequence[str]) -> dict[str, DeploymentConfig]:
    """Return the deployments that use all GPUs named in ``devices``, or all cores if it is empty, by name.

    Raises ConfigurationError if there is only one core.
    """
    roles = _on_gpus(engine, tuple(devices)) if devices else _on_cores(usable_cores())
    found = {name: DeploymentConfig(model, of, served_model_name=SERVED_NAME) for name, of in roles.items()}
    return found | {COLOCATED: DeploymentConfig(model, layout=Layout.COLOCATED, served_model_name=SERVED_NAME)}


def _on_cores(cores: int) -> dict[str, dict[Role, RoleConfig]]:
    if cores < 2:
        raise ConfigurationError(
            "This measurement divides the machine's cores among instances in several ways, and there is only one core here."
        )
    # Instances without a number of threads divide all cores.
    return {
        AGGREGATED: {Role.AGGREGATED: RoleConfig(1)},
        REPLICAS: {Role.AGGREGATED: RoleConfig(min(cores, MOST_REPLICAS))},
        SPLIT: {Role.ENCODER: RoleConfig(1), Role.PD: RoleConfig(1)},
    }


def _on_gpus(engine: EngineKind, devices: tuple[str, ...]) -> dict[str, dict[Role, RoleConfig]]:
    every = RoleConfig(len(devices), devices=devices)
    found: dict[str, dict[Role, RoleConfig]] = {}
    if _of_one_instance(engine, devices) == devices:
        found[AGGREGATED] = {Role.AGGREGATED: RoleConfig(1, devices=devices)}
    if len(devices) > 1:
        rest = RoleConfig(len(devices) - 1, devices=devices[1:])
        found[REPLICAS] = {Role.AGGREGATED: every}
        found[SPLIT] = {Role.ENCODER: RoleConfig(1, devices=devices[:1]), Role.PD: rest}
    return found


def _of_one_instance(engine: EngineKind, devices: tuple[str, ...]) -> tuple[str, ...]:
    """Return on which of the GPUs one instance can compute."""
    return devices if engine is EngineKind.VLLM else devices[:1]


def _devices(engine: EngineKind) -> tuple[str, ...]:
    """Return the GPUs that instances of the engine use by themselves."""
    if engine is EngineKind.VLLM:
        return () if installed().on_cpu else _names()
    import torch

    return _names() if torch.cuda.is_available() else ()


def _names() -> tuple[str, ...]:
    return tuple(gpu.name for gpu in found_gpus())
