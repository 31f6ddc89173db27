"""Faults at the start of a deployment; tests/cli/test_serve.py tests its life, tests/integration its answers."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from chiasm.errors import ConfigurationError
from chiasm.launch import (
    Deployment,
    DeploymentConfig,
    Layout,
    ProcessState,
    ProcessStatus,
    RoleConfig,
    arrangement,
    fork_server,
)
from chiasm.launch.gpus import Gpu
from chiasm.wire import Role
from tests.fleet import FORKS
from tests.launch.waiting import command_line, eventually

SMALL = {"kv_cache_bytes": 16 << 20, "max_model_len": 512}


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"settings": {"dtype": "abacus"}}, "Unknown dtype 'abacus'"),
        ({"settings": {"device": "abacus"}}, "Unknown device 'abacus'"),
        ({"connector": "Abacus"}, "There is no EC connector 'Abacus'"),
        ({"connector": "Abacus", "connector_module_path": "no.such"}, "There is no Python module 'no.such'"),
        ({"kv_connector": "Abacus"}, "There is no KV connector 'Abacus'"),
    ],
)
def test_wrong_names_are_refused_before_anything_starts(folder: str, wrong: dict[str, Any], message: str) -> None:
    roles = {role: RoleConfig() for role in (Role.ENCODER, Role.PREFILL, Role.DECODE)}
    deployment = Deployment(DeploymentConfig(folder, roles, **wrong))
    with pytest.raises(ConfigurationError, match=message):
        deployment.start()
    assert deployment.processes == []


def test_instances_that_do_not_fit_together_end_the_start_with_the_proxys_reason() -> None:
    roles = {
        Role.ENCODER: RoleConfig(settings={"dtype": "float32"}),
        Role.PD: RoleConfig(settings={"dtype": "bfloat16"}),
    }
    with (
        pytest.raises(ConfigurationError, match="encoder-0 doesn't fit the other instances: its dtype is float32"),
        Deployment(DeploymentConfig("demo", roles, settings=SMALL), forks=FORKS) as deployment,
    ):
        deployment.wait_ready(180)


def test_an_instance_that_cannot_start_ends_the_start_with_its_error(folder: str) -> None:
    config = DeploymentConfig(folder, {Role.AGGREGATED: RoleConfig()}, settings={"device": "cuda:9"})
    with pytest.raises(ConfigurationError, match="cuda:9"), Deployment(config) as deployment:
        deployment.wait_ready(180)
    assert all(process.pid is None for process in deployment.processes)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two invented GPUs."""
    monkeypatch.setattr(arrangement, "found_gpus", lambda: (Gpu("0"), Gpu("1")))


@pytest.mark.usefixtures("two_gpus")
def test_instances_on_other_gpus_serve_without_one_that_cannot_be_started() -> None:
    on_cpu = {"device": "cpu"}  # where they compute in truth
    roles = {Role.AGGREGATED: RoleConfig(2, threads=1, devices=("0", "1"), settings=on_cpu)}
    lines: list[str] = []
    config = DeploymentConfig("demo", roles, settings=SMALL)
    with contextlib.ExitStack() as stack:

        def take_the_port_of_the_second(status: ProcessStatus) -> None:
            """Before it starts."""
            if (status.name, status.state) == ("aggregated-1", ProcessState.STARTING):
                address = urlsplit(status.url)
                stack.enter_context(socket.create_server((address.hostname or "", address.port or 0)))

        deployment = Deployment(
            config,
            forks=FORKS,
            on_change=take_the_port_of_the_second,
            on_line=lambda name, text: lines.append(f"{name} {text}"),
        )
        with deployment:
            deployment.wait_ready(180)
    assert [
        line for line in lines if line.startswith("aggregated-1 is lost with GPU 1, and the others serve without it")
    ]


@pytest.mark.usefixtures("two_gpus")
def test_a_start_fails_with_the_name_of_the_gpu_if_no_instance_can_be_started(folder: str) -> None:
    roles = {Role.AGGREGATED: RoleConfig(2, devices=("0", "1"))}
    with (
        pytest.raises(ConfigurationError, match=r"aggregated-0 on GPU 0: "),
        Deployment(DeploymentConfig(folder, roles, settings={"kv_cache_bytes": 1}), forks=FORKS) as deployment,
    ):
        deployment.wait_ready(180)


def test_a_start_that_is_called_off_does_not_wait_for_what_instances_import() -> None:
    lines: list[str] = []
    others = psutil.Process().children()

    def forking() -> list[psutil.Process]:
        """The process that imports, and then forks."""
        return [
            one for one in psutil.Process().children() if one not in others and fork_server.COMMAND in command_line(one)
        ]

    config = DeploymentConfig("demo", {Role.PD: RoleConfig(2)}, shutdown_timeout_seconds=20, settings=SMALL)
    with Deployment(config, on_line=lambda name, text: lines.append(f"{name} {text}")) as deployment:
        assert eventually(forking)
        forking()[0].suspend()
        deployment.drain(lambda: False)
        assert {process.state for process in deployment.processes} == {ProcessState.STOPPED}
    assert not [line for line in lines if "cannot be started" in line]


def test_the_file_of_shared_cores_is_removed_at_the_end() -> None:
    roles = {Role.ENCODER: RoleConfig(), Role.PD: RoleConfig()}
    config = DeploymentConfig("demo", roles, layout=Layout.COLOCATED, settings=SMALL)
    with Deployment(config, forks=FORKS) as deployment:
        deployment.wait_ready(180)
        scratch = deployment.scratch
        assert scratch is not None
        assert [file.name for file in scratch.iterdir()] == ["cores-0"]
    assert not scratch.exists()
