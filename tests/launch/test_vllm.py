"""Command line and environment of `vllm serve` for each role. These tests need no vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chiasm.errors import ConfigurationError
from chiasm.integrations.vllm.settings import Settings, store_url
from chiasm.launch import DeploymentConfig, EngineKind, RoleConfig, vllm
from chiasm.launch.devices import Placement
from chiasm.launch.ports import HeldPort
from chiasm.launch.vllm import Installed, Site
from chiasm.wire import Role

CPU = Installed(Path("/env/bin/vllm"), "0.32.0+cpu")
GPU = Installed(Path("/env/bin/vllm"), "0.33.0")
FOLDER = Path("/models/qwen")
EACH = {role: RoleConfig() for role in (Role.ENCODER, Role.PD)}
APART = {role: RoleConfig() for role in (Role.ENCODER, Role.PREFILL, Role.DECODE)}


@pytest.fixture
def address() -> HeldPort:
    held = HeldPort("127.0.0.1")
    held.release()
    return held


@pytest.fixture
def site(address: HeldPort, tmp_path: Path) -> Site:
    return Site(address, Placement(), tmp_path, 1 << 20, None, None)


def _config(roles: dict[Role, RoleConfig] = EACH, **settings: Any) -> DeploymentConfig:
    return DeploymentConfig("/models/qwen", roles, engine=EngineKind.VLLM, **settings)


def _command(config: DeploymentConfig, role: Role, site: Site, found: Installed = GPU) -> list[str]:
    return vllm.instance_command(config, FOLDER, role, site, found=found, kv_bytes=1 << 30)


def _value(command: Sequence[str], flag: str) -> str:
    """The last value of a flag, which is the one that counts."""
    return command[len(command) - command[::-1].index(flag)]


def test_a_supervisor_starts_vllm_on_a_port_of_its_own(site: Site) -> None:
    command = _command(_config(), Role.PD, site)
    assert command[:5] == [sys.executable, "-m", "chiasm.launch.supervisor", "--url", site.address.url]
    after = command[command.index("--") + 1 :]
    assert after[:3] == ["/env/bin/vllm", "serve", str(FOLDER)]
    assert _value(after, "--host") == "127.0.0.1"
    assert _value(after, "--port") == str(site.address.port)
    assert _value(after, "--middleware") == "chiasm.integrations.vllm.middleware.ChiasmMiddleware"


@pytest.mark.parametrize(
    ("roles", "role", "ec_role"),
    [
        (EACH, Role.ENCODER, "ec_producer"),
        (EACH, Role.PD, "ec_consumer"),
        (APART, Role.PREFILL, "ec_consumer"),
        (APART, Role.DECODE, "ec_consumer"),
    ],
)
def test_embeddings_go_through_chiasms_connector(
    roles: dict[Role, RoleConfig], role: Role, ec_role: str, site: Site, tmp_path: Path
) -> None:
    command = _command(_config(roles, deadline_seconds=30.0), role, site)
    assert json.loads(_value(command, "--ec-transfer-config")) == {
        "ec_connector": "ChiasmECConnector",
        "ec_connector_module_path": "chiasm.integrations.vllm.ec_connector",
        "ec_role": ec_role,
        "ec_connector_extra_config": {"shared_storage_path": str(tmp_path), "max_bytes": 1 << 20, "wait_seconds": 30.0},
    }


@pytest.mark.parametrize("role", APART)
def test_a_connector_from_memory_to_memory_gets_both_halves_in_one_process(role: Role, site: Site) -> None:
    config = _config(APART, connector="TcpConnector", ec_receive_bytes=1 << 22)
    command = _command(config, role, replace(site, storage=None))
    extra = json.loads(_value(command, "--ec-transfer-config"))["ec_connector_extra_config"]
    assert extra == {"connector": "TcpConnector", "max_bytes": 1 << 20, "receive_bytes": 1 << 22}
    Settings.read(extra)
    assert _value(command, "--distributed-executor-backend") == vllm.ONE_PROCESS


def test_on_several_devices_it_has_a_process_for_each_with_any_connector(site: Site) -> None:
    wide = replace(site, placement=replace(site.placement, devices=("0", "1")), storage=None)
    command = _command(_config(connector="TcpConnector"), Role.PD, wide)
    assert _value(command, "--tensor-parallel-size") == "2"
    assert "--distributed-executor-backend" not in command


def test_a_connector_that_a_user_wrote_is_named_with_its_module_and_gets_its_settings(site: Site) -> None:
    own: dict[str, Any] = {"connector": "MinimalConnector", "connector_module_path": "tests.integrations.vllm.minimal"}
    command = _command(_config(**own, connector_extra_config={"depth": 3}), Role.PD, site)
    extra = json.loads(_value(command, "--ec-transfer-config"))["ec_connector_extra_config"]
    assert {**own, "depth": 3}.items() <= extra.items()
    assert "--distributed-executor-backend" not in command


@pytest.mark.parametrize("role", APART)
def test_the_url_of_the_shared_cache_is_in_the_environment_alone(role: Role, site: Site) -> None:
    """On the command line others would see its password, and vLLM would log it."""
    config = _config(APART, ec_store="redis://:secret@cache/0", ec_store_read_bytes=1 << 24)
    command = _command(config, role, site)
    assert "secret" not in " ".join(command)
    extra = json.loads(_value(command, "--ec-transfer-config"))["ec_connector_extra_config"]
    assert extra["store_read_bytes"] == 1 << 24
    environment = vllm.instance_environment(config, role, site, found=GPU, environment={"CHIASM_EC_STORE": "redis://x"})
    assert store_url(environment) == "redis://:secret@cache/0"
    environment = vllm.instance_environment(
        _config(APART), role, site, found=GPU, environment={"CHIASM_EC_STORE": "redis://x"}
    )
    assert store_url(environment) == ""


@pytest.mark.parametrize(("role", "kv_role"), [(Role.PREFILL, "kv_producer"), (Role.DECODE, "kv_consumer")])
def test_kv_goes_through_vllms_own_connector(role: Role, kv_role: str, site: Site) -> None:
    command = _command(_config(APART, kv_lease_seconds=4.5), role, site)
    assert json.loads(_value(command, "--kv-transfer-config")) == {
        "kv_connector": "NixlConnector",
        "kv_role": kv_role,
        "kv_connector_extra_config": {"kv_lease_duration": 5},
    }


def test_an_aggregated_instance_exchanges_nothing(site: Site) -> None:
    aggregated = _command(_config({Role.AGGREGATED: RoleConfig()}), Role.AGGREGATED, site)
    assert not {"--ec-transfer-config", "--kv-transfer-config", "--limit-mm-per-prompt"} & set(aggregated)


@pytest.mark.parametrize("role", [Role.PD, Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize(("model_type", "has_tower"), [("qwen2_5_vl", False), ("qwen3_vl", True), ("unheard_of", True)])
def test_an_instance_that_never_encodes_loads_no_tower_if_vllm_allows_it(
    role: Role, model_type: str, has_tower: bool, site: Site, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = _config({Role.ENCODER: RoleConfig(), Role.PD: RoleConfig()} if role is Role.PD else APART)
    command = vllm.instance_command(config, tmp_path, role, site, found=GPU, kv_bytes=1)
    assert "--skip-mm-profiling" in command
    assert ("--enable-mm-embeds" in command) is not has_tower
    if not has_tower:
        assert json.loads(_value(command, "--limit-mm-per-prompt")) == {"image": 0, "video": 0}


def test_flags_of_a_person_come_last_so_that_they_win(site: Site) -> None:
    roles = {**EACH, Role.PD: RoleConfig(vllm_flags=("--limit-mm-per-prompt", "{}", "--seed", "2"))}
    command = _command(_config(roles, vllm_flags=("--seed", "1")), Role.PD, site)
    assert _value(command, "--limit-mm-per-prompt") == "{}"
    assert command[-6:] == ["--seed", "1", "--limit-mm-per-prompt", "{}", "--seed", "2"]


def test_settings_come_before_the_flags_of_a_person(site: Site) -> None:
    command = _command(_config(settings={"max_num_seqs": 4}, vllm_flags=("--max-num-seqs", "5")), Role.PD, site)
    assert command[-4:] == ["--max-num-seqs", "4", "--max-num-seqs", "5"]


def test_it_sees_only_its_devices_and_splits_the_model_over_them(site: Site, tmp_path: Path) -> None:
    placed = Site(site.address, Placement(("2", "3"), 0.4, True), tmp_path, 1, None, tmp_path / "turn-2")
    command = _command(_config(), Role.PD, placed)
    assert _value(command, "--tensor-parallel-size") == "2"
    assert _value(command, "--gpu-memory-utilization") == "0.4"
    assert _value(command, "--turn") == str(tmp_path / "turn-2")
    environment = vllm.instance_environment(_config(), Role.PD, placed, found=GPU, environment={})
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "OMP_NUM_THREADS" not in environment
    assert int(environment["PYTHONHASHSEED"]) < 1 << 32


def test_on_cpu_it_runs_eagerly_with_kv_of_a_known_size(site: Site) -> None:
    pd, encoder = (_command(_config(), role, site, CPU) for role in (Role.PD, Role.ENCODER))
    assert "--enforce-eager" in pd
    assert _value(pd, "--kv-cache-memory-bytes") == str(1 << 30)
    assert int(_value(encoder, "--kv-cache-memory-bytes")) < 1 << 30
    assert not {"--enforce-eager", "--kv-cache-memory-bytes"} & set(_command(_config(), Role.PD, site, GPU))


@pytest.mark.parametrize("flags", [("--kv-cache-memory-bytes", "5"), ("--gpu_memory_utilization=0.3",)])
def test_a_kv_size_that_a_person_has_set_is_kept(flags: tuple[str, ...], site: Site) -> None:
    command = _command(_config(vllm_flags=flags), Role.PD, site, CPU)
    assert str(1 << 30) not in command


def test_on_cpu_instances_share_the_cores_unless_the_environment_says_otherwise(site: Site) -> None:
    config = _config()
    site = replace(site, placement=Placement(threads=3, cpus=(0, 1), nice=5))
    environment = vllm.instance_environment(config, Role.PD, site, found=CPU, environment={})
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["OMP_NUM_THREADS"] == "3"
    command = _command(config, Role.PD, site, CPU)
    assert (_value(command, "--cpus"), _value(command, "--nice")) == ("0,1", "5")
    own = {"VLLM_CPU_OMP_THREADS_BIND": "0-1", "OMP_NUM_THREADS": "5", "HF_HUB_OFFLINE": "0"}
    assert vllm.instance_environment(config, Role.PD, site, found=CPU, environment=own).items() >= own.items()


def test_an_instance_that_exchanges_kv_has_a_port_for_the_handshake(
    site: Site, address: HeldPort, tmp_path: Path
) -> None:
    with_channel = Site(site.address, Placement(), tmp_path, 1, address, None)
    environment = vllm.instance_environment(_config(APART), Role.PREFILL, with_channel, found=GPU, environment={})
    assert environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
    assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(address.port)


def test_language_models_on_cpu_leave_most_of_the_memory(tmp_path: Path) -> None:
    assert vllm.default_kv_bytes(_config(), 64 << 30) == 2 << 30
    assert vllm.default_kv_bytes(_config(), 4 << 30) == 1 << 30
    assert vllm.default_kv_bytes(_config(APART), 4 << 30) == 512 << 20
    assert vllm.default_kv_bytes(_config(), 0) > 0


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 16, "vision_config": {"num_heads": 12}}, 4),
        ({"text_config": {"num_attention_heads": 28}, "vision_config": {"num_attention_heads": 16}}, 4),
        ({"num_attention_heads": 32}, 32),
        ({"vision_config": {"num_heads": 16}}, None),
        ({"num_attention_heads": "many"}, None),
    ],
)
def test_a_model_can_be_split_by_divisors_of_all_its_heads(
    config: dict[str, object], heads: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vllm.attention_heads(tmp_path) == heads


def test_a_checkpoint_without_a_config_is_not_split(tmp_path: Path) -> None:
    assert vllm.attention_heads(tmp_path) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"connector": "Other"}, "There is no EC connector 'Other'"),
        ({"connector_module_path": "mine"}, "There is no Python module 'mine'"),
        ({"kv_connector": "SharedMemoryConnector"}, "--kv-connector: vLLM instances exchange KV through NixlConnector"),
        ({"kv_connector": "NixlConnector", "kv_connector_module_path": "mine"}, "--kv-connector: "),
        (
            {"kv_connector_extra_config": {"kv_lease_duration": 5}},
            "--kv-connector: .* or other settings, give --kv-tran",
        ),
    ],
)
def test_connectors_that_vllm_does_not_have_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _config(**({"roles": EACH} | settings))


def test_the_built_in_engine_takes_no_share_of_memory() -> None:
    with pytest.raises(ConfigurationError, match=r"--pd-memory-share is for --engine vllm only; .* --kv-cache-bytes"):
        DeploymentConfig("demo", {Role.PD: RoleConfig(memory_share=0.5)})


def test_an_environment_without_vllm_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"needs vLLM in chiasm's environment, .* has none; `make vllm` makes an environment"
    ):
        vllm.installed(str(tmp_path / "bin" / "python"))


@pytest.mark.parametrize(
    ("flags", "of_role", "environment", "keys"),
    [
        ("", "", "", ()),
        ("--api-key K", "", "", ("K",)),
        ("--api-key=K --max-num-seqs 3", "", "", ("K",)),
        ("--api_key K L --max-num-seqs 3 x", "", "", ("K", "L")),
        ("--api-key K --api-key L", "", "", ("L",)),
        ("", "--api-key K", "", ("K",)),
        ("--api-key K", "--api-key L K", "", ("K",)),
        ("", "", "E", ("E",)),
        ("--api-key K", "", "E", ("K",)),
    ],
)
def test_the_proxy_knows_the_keys_that_all_instances_accept(
    flags: str, of_role: str, environment: str, keys: tuple[str, ...]
) -> None:
    roles = {Role.ENCODER: RoleConfig(), Role.PD: RoleConfig(vllm_flags=tuple(of_role.split()))}
    config = _config(roles, vllm_flags=tuple(flags.split()))
    assert vllm.api_keys(config, {"VLLM_API_KEY": environment}) == keys


def test_an_empty_key_of_an_instance_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="key of a vLLM instance is empty"):
        vllm.api_keys(_config(vllm_flags=("--api-key", "")), {})


def test_instances_without_a_key_in_common_are_refused() -> None:
    roles = {role: RoleConfig(vllm_flags=("--api-key", role)) for role in (Role.ENCODER, Role.PD)}
    with pytest.raises(ConfigurationError, match="no key in common"):
        vllm.api_keys(_config(roles), {})
