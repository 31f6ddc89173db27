"""Deployments that are compared at equal resources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chiasm.bench import arms as arms_module
from chiasm.bench.arms import Arm, choose, left_out, reference
from chiasm.errors import ConfigurationError
from chiasm.launch import DeploymentConfig, Layout, arrangement, config, vllm
from chiasm.launch.arrangement import arrange
from chiasm.launch.config import EngineKind
from chiasm.launch.devices import Placements
from chiasm.launch.gpus import Gpu
from chiasm.launch.vllm import Installed

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this a machine with so many cores and GPUs."""

    def make(cores: int = 4, gpus: int = 0) -> None:
        found = tuple(Gpu(str(number), "NVIDIA H100", 80 << 30, f"GPU-{number}") for number in range(gpus))
        build = "" if gpus else "+cpu"
        for module in (arms_module, arrangement, config):
            monkeypatch.setattr(module, "usable_cores", lambda: cores)
        for module in (arms_module, arrangement):
            monkeypatch.setattr(module, "found_gpus", lambda: found)
        for module in (arms_module, vllm):
            monkeypatch.setattr(module, "installed", lambda: Installed(Path("vllm"), f"0.32.0{build}"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr("importlib.metadata.version", lambda name: f"2.9.0{build}")

    return make


def _placements(arm: Arm) -> Placements:
    return arrange(arm.config, None).placements


def test_deployments_that_a_person_adds_take_free_ports_so_that_they_can_run_beside_each_other() -> None:
    more = {name: DeploymentConfig("any", layout=Layout.COLOCATED, port=8000) for name in ("one", "two")}
    arms = choose("model", EngineKind.CHIASM, ("one", "two"), more)
    assert [(arm.name, arm.config.port) for arm in arms] == [("one", 0), ("two", 0)]


@pytest.mark.parametrize("engine", EngineKind)
@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
def test_every_deployment_can_be_started_and_uses_all_gpus(machine: Machine, engine: EngineKind, gpus: int) -> None:
    machine(gpus=gpus)
    for arm in choose("model", engine):
        assert arm.instances > 0
        assert {name for one in _placements(arm).values() for name in one.devices} == set(map(str, range(gpus))), (
            arm.name
        )


@pytest.mark.parametrize(("engine", "gpus"), [(EngineKind.CHIASM, 2), (EngineKind.CHIASM, 4)])
def test_the_built_in_engine_has_no_aggregated_instance_on_several_gpus(
    machine: Machine, engine: EngineKind, gpus: int
) -> None:
    machine(gpus=gpus)
    assert [arm.name for arm in choose("model", engine)] == ["replicas", "split", "colocated"]
    with pytest.raises(ConfigurationError, match="no arm 'aggregated' on this machine; the arms are replicas, split"):
        choose("model", engine, ("aggregated",))
    assert "aggregated is left out" in (left_out(engine) or "")
    (placement,) = _placements(reference("model", engine)).values()
    assert placement.devices == ("0",)


@pytest.mark.parametrize(
    ("engine", "gpus"),
    [(EngineKind.CHIASM, 0), (EngineKind.CHIASM, 1), *((EngineKind.VLLM, gpus) for gpus in (0, 1, 2))],
)
def test_otherwise_the_limits_are_those_of_the_aggregated_deployment(
    machine: Machine, engine: EngineKind, gpus: int
) -> None:
    machine(gpus=gpus)
    assert left_out(engine) is None
    (aggregated,) = choose("model", engine, ("aggregated",))
    assert reference("model", engine) == aggregated


@pytest.mark.parametrize("engine", EngineKind)
@pytest.mark.parametrize("cores", [2, 3, 5, 6, 7, 9])
def test_every_deployment_uses_all_cores(machine: Machine, engine: EngineKind, cores: int) -> None:
    machine(cores)
    arms = {arm.name: _placements(arm) for arm in choose("model", engine)}
    for name in ("aggregated", "replicas", "split"):
        assert sum(one.threads or 0 for one in arms[name].values()) == cores, name
    assert {one.threads for one in arms["colocated"].values()} == {cores}
    of_replicas = [one.threads or 0 for one in arms["replicas"].values()]
    assert max(of_replicas) - min(of_replicas) <= 1


def test_one_core_has_nothing_to_compare(machine: Machine) -> None:
    machine(1)
    with pytest.raises(ConfigurationError, match="there is only one core here"):
        choose("model", EngineKind.CHIASM)
