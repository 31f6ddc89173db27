"""Deployments that are compared at equal resources."""

from __future__ import annotations

from chiasm.bench.arms import choose
from chiasm.launch import DeploymentConfig, Layout
from chiasm.launch.config import EngineKind


def test_deployments_that_a_person_adds_take_free_ports_so_that_they_can_run_beside_each_other() -> None:
    more = {name: DeploymentConfig("any", layout=Layout.COLOCATED, port=8000) for name in ("one", "two")}
    arms = choose("model", EngineKind.CHIASM, ("one", "two"), more)
    assert [(arm.name, arm.config.port) for arm in arms] == [("one", 0), ("two", 0)]
