"""Faults at the start of a deployment; tests/cli/test_serve.py tests its life, tests/integration its answers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from chiasm.errors import ConfigurationError
from chiasm.launch import Deployment, DeploymentConfig, RoleConfig
from chiasm.wire import Role


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder that looks like a checkpoint until it is read."""
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def test_a_missing_model_is_reported_before_anything_starts() -> None:
    with pytest.raises(ConfigurationError, match=r"(?i)no model '/nowhere'"):
        Deployment(DeploymentConfig("/nowhere"))


def test_a_port_in_use_is_reported_before_anything_starts(folder: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        deployment = Deployment(DeploymentConfig(folder, port=server.getsockname()[1]))
        with pytest.raises(ConfigurationError, match="in use"):
            deployment.start()
        assert deployment.processes == []


def test_a_setting_of_the_wrong_type_is_reported_before_anything_starts(folder: str) -> None:
    deployment = Deployment(DeploymentConfig(folder, settings={"kv_cache_bytes": "16MiB"}))
    with pytest.raises(ConfigurationError, match=r"Expected `int \| null`, got `str`.*kv_cache_bytes"):
        deployment.start()
    assert deployment.processes == []


def test_missing_cpus_are_refused(folder: str) -> None:
    with pytest.raises(ConfigurationError, match="CPU 4096 cannot be used"):
        Deployment(DeploymentConfig(folder, {Role.PD: RoleConfig(cpus=(4096,))}))


def test_an_instance_that_cannot_start_ends_the_start_with_its_error(folder: str) -> None:
    config = DeploymentConfig(folder, {Role.AGGREGATED: RoleConfig()}, settings={"device": "abacus"})
    with pytest.raises(ConfigurationError, match="abacus"), Deployment(config) as deployment:
        deployment.wait_ready(60)
    assert all(process.pid is None for process in deployment.processes)
