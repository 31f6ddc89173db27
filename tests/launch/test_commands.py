"""What a deployment starts, and with how many threads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from chiasm.errors import ConfigurationError
from chiasm.launch import DeploymentConfig, RoleConfig, commands
from chiasm.launch.commands import (
    instance_command,
    model_name,
    proxy_command,
    proxy_environment,
    threads_of,
)
from chiasm.launch.ports import HeldPort
from chiasm.wire import Role

ONE_EACH = {Role.ENCODER: RoleConfig(), Role.PD: RoleConfig()}


@pytest.fixture
def address() -> HeldPort:
    held = HeldPort("127.0.0.1")
    held.release()
    return held


@pytest.mark.parametrize(
    ("usable", "roles", "threads"),
    [
        (2, ONE_EACH, 1),
        (8, ONE_EACH, 4),
        (8, {Role.ENCODER: RoleConfig(3), Role.PD: RoleConfig(1)}, 2),
        (2, {Role.ENCODER: RoleConfig(3), Role.PD: RoleConfig(1)}, 1),
        (8, {Role.ENCODER: RoleConfig(threads=7), Role.PD: RoleConfig()}, 7),
        (8, {Role.ENCODER: RoleConfig(2, cpus=(0, 1, 2, 3)), Role.PD: RoleConfig()}, 2),
        (8, {Role.ENCODER: RoleConfig(cpus=(5,)), Role.PD: RoleConfig()}, 1),
    ],
)
def test_instances_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, usable: int, roles: Mapping[Role, RoleConfig], threads: int
) -> None:
    monkeypatch.setattr(commands, "usable_cores", lambda: usable)
    assert threads_of(roles, Role.ENCODER) == threads


def test_an_instance_is_told_all_that_its_role_needs(address: HeldPort, tmp_path: Path) -> None:
    config = DeploymentConfig(
        "demo",
        {Role.ENCODER: RoleConfig(threads=3, cpus=(0, 2), flags=("--max-items", "4")), Role.PD: RoleConfig()},
        instance_flags=("--dtype", "bfloat16"),
    )
    command = instance_command(config, tmp_path, Role.ENCODER, address, tmp_path / "ec", 1 << 20)
    text = " ".join(command)
    assert f"instance {tmp_path} --role encoder" in text
    assert f"--host 127.0.0.1 --port {address.port}" in text
    assert "--served-model-name demo --threads 3 --cpus 0,2" in text
    assert f"--shared-storage-path {tmp_path / 'ec'} --ec-max-bytes {1 << 20}" in text
    assert command[-4:] == ["--dtype", "bfloat16", "--max-items", "4"]


def test_an_aggregated_instance_exchanges_no_embeddings(address: HeldPort, tmp_path: Path) -> None:
    config = DeploymentConfig("demo", {Role.AGGREGATED: RoleConfig()})
    assert not config.exchanges_embeddings
    assert "--connector" not in instance_command(config, tmp_path, Role.AGGREGATED, address, None, 0)


def test_prefill_is_told_of_embeddings_and_kv_and_decode_of_kv_alone(address: HeldPort, tmp_path: Path) -> None:
    roles = {Role.ENCODER: RoleConfig(), Role.PREFILL: RoleConfig(), Role.DECODE: RoleConfig()}
    config = DeploymentConfig("demo", roles, kv_connector="NixlConnector", kv_lease_seconds=5)
    assert config.exchanges_embeddings
    prefill, decode, encoder = (
        " ".join(instance_command(config, tmp_path, role, address, tmp_path / "ec", 1))
        for role in (Role.PREFILL, Role.DECODE, Role.ENCODER)
    )
    assert "--role prefill" in prefill
    assert f"--shared-storage-path {tmp_path / 'ec'}" in prefill
    assert "--kv-connector NixlConnector --kv-lease-seconds 5" in prefill
    assert "--kv-connector NixlConnector" in decode
    assert "--connector" not in decode
    assert "--kv-lease-seconds" not in decode
    assert "--kv-connector" not in encoder


def test_the_proxy_is_told_every_instance(address: HeldPort) -> None:
    urls = [(Role.ENCODER, "http://a"), (Role.ENCODER, "http://b"), (Role.PD, "http://c")]
    text = " ".join(proxy_command(DeploymentConfig("demo"), address, urls))
    assert "--encoder http://a --encoder http://b --pd http://c" in text
    urls = [(Role.PREFILL, "http://d"), (Role.DECODE, "http://e")]
    assert "--prefill http://d --decode http://e" in " ".join(proxy_command(DeploymentConfig("demo"), address, urls))


def test_the_admin_key_is_on_no_command_line(address: HeldPort) -> None:
    config = DeploymentConfig("demo", admin_key="secret")
    assert proxy_environment(config)["CHIASM_ADMIN_KEY"] == "secret"
    assert "secret" not in " ".join(proxy_command(config, address, []))
    assert "secret" not in repr(config)


def test_a_model_is_called_by_its_folders_name_or_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").touch()
    assert model_name(str(tmp_path / "mine")) == "mine"
    assert model_name("Qwen/Qwen3-VL-2B-Instruct") == "Qwen/Qwen3-VL-2B-Instruct"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({}, "nothing would answer"),
        ({Role.ENCODER: RoleConfig()}, "nothing would answer"),
        ({Role.ENCODER: RoleConfig(), Role.AGGREGATED: RoleConfig()}, "need at least one pd"),
        ({Role.PREFILL: RoleConfig()}, "at least one decode instance"),
        ({Role.DECODE: RoleConfig(), Role.PREFILL: RoleConfig(0)}, "at least one prefill instance"),
        ({Role.PREFILL: RoleConfig(), Role.DECODE: RoleConfig(), Role.PD: RoleConfig()}, "not beside them"),
        ({Role.PREFILL: RoleConfig(), Role.DECODE: RoleConfig(), Role.AGGREGATED: RoleConfig()}, "not beside them"),
        ({Role.PD: RoleConfig(-1)}, "fewer than no"),
    ],
)
def test_a_deployment_that_could_not_answer_is_refused(roles: Mapping[Role, RoleConfig], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DeploymentConfig("demo", roles)
