"""What settings become for each engine and role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chiasm.ec_transfer import ECTransferConfig, ECTransferRole
from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVTransferConfig, KVTransferRole
from chiasm.launch.process import (
    InstanceProcess,
    ProxyProcess,
    ec_config,
    from_json,
    instance_process,
    kv_config,
    proxy_process,
    to_json,
    vllm_flags,
)
from chiasm.wire import Role


def _pairs(settings: dict[str, Any], role: Role = Role.PD) -> dict[str, str]:
    flags = vllm_flags(settings, role)
    return dict(zip(flags[::2], flags[1::2], strict=True))


# ---- the built-in engine -----------------------------------------------------------------------------------------------


def test_the_configuration_of_a_process_survives_json(tmp_path: Path) -> None:
    settings = {
        "shared_storage_path": tmp_path,
        "allowed_media_domains": ("a.example", "b.example"),
        "cpus": (0, 1),
        "kv_lease_seconds": 5,
        "allowed_local_media_path": tmp_path,
    }
    instance = instance_process(tmp_path, Role.PREFILL, settings)
    assert from_json(to_json(instance).encode(), InstanceProcess) == instance
    proxy = proxy_process({"pd": ("http://a:1",), "admin_key": "k" * 16, "log_level": "debug"})
    assert from_json(to_json(proxy).encode(), ProxyProcess) == proxy
    assert "\n" not in to_json(proxy)


def test_a_prefill_instance_consumes_embeddings_and_produces_kv(tmp_path: Path) -> None:
    ec = ec_config(Role.PREFILL, {"shared_storage_path": tmp_path, "ec_max_bytes": 7})
    kv = kv_config(Role.PREFILL, {"kv_lease_seconds": 5, "kv_host": "prefill-0.example", "kv_port": 7000})
    extra = {"shared_storage_path": str(tmp_path)}
    assert ec == ECTransferConfig(role=ECTransferRole.CONSUMER, connector_extra_config=extra, max_bytes=7)
    assert kv == KVTransferConfig(role=KVTransferRole.PRODUCER, host="prefill-0.example", port=7000, lease_seconds=5)


def test_a_decode_instance_consumes_only_kv() -> None:
    assert ec_config(Role.DECODE, {}) is None
    kv = kv_config(Role.DECODE, {"kv_connector": "NixlConnector"})
    assert kv == KVTransferConfig(connector="NixlConnector", role=KVTransferRole.CONSUMER)


@pytest.mark.parametrize("role", [Role.ENCODER, Role.PD, Role.AGGREGATED])
def test_other_instances_exchange_no_kv(role: Role) -> None:
    assert kv_config(role, {}) is None
    with pytest.raises(ConfigurationError, match=f"--kv-connector, --kv-host: .* is {role}"):
        kv_config(role, {"kv_connector": "X", "kv_host": "x"})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"kv_port": 7000}, "--kv-port"),
        ({"kv_lease_seconds": 3, "kv_host": "x"}, "--kv-lease-seconds, --kv-host"),
    ],
)
def test_a_decode_instance_refuses_what_only_prefill_instances_offer(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{names}: only prefill instances offer KV"):
        kv_config(Role.DECODE, settings)


def test_a_decode_instance_refuses_a_store_of_embeddings() -> None:
    with pytest.raises(ConfigurationError, match="leave out --connector, --ec-max-bytes"):
        ec_config(Role.DECODE, {"connector": "X", "ec_max_bytes": 1})


@pytest.mark.parametrize("role", [Role.ENCODER, Role.PD, Role.PREFILL])
def test_a_store_of_embeddings_is_needed(role: Role) -> None:
    with pytest.raises(ConfigurationError, match=r"needs shared_storage_path \(--shared-storage-path\)"):
        ec_config(role, {})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shared_storage_path": "/s", "ec_port": 7000}, "--ec-port: SharedStorageConnector has no such setting"),
        (
            {"connector": "TcpConnector", "shared_storage_path": "/s"},
            "--shared-storage-path: TcpConnector has no such setting",
        ),
        ({"connector": "TcpConnector", "connector_extra_config": {"hots": "a"}}, "TcpConnector has no setting 'hots'"),
    ],
)
def test_a_setting_of_another_connector_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ec_config(Role.ENCODER, settings)


def test_a_connector_of_another_module_gets_all_settings_as_json_has_them(tmp_path: Path) -> None:
    own: dict[str, Any] = {"connector": "Mine", "connector_module_path": "tests.engine.connectors"}
    own |= {"connector_extra_config": {"depth": 3}, "shared_storage_path": tmp_path, "ec_host": "a"}
    ec = ec_config(Role.ENCODER, own)
    assert ec is not None
    assert ec.connector_extra_config == {"depth": 3, "shared_storage_path": str(tmp_path), "host": "a"}


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_kv_connector_of_another_module_gets_its_own_settings(role: Role) -> None:
    own = {"kv_connector": "Mine", "kv_connector_module_path": "tests.kv_connector.gated_connector"}
    kv = kv_config(role, {**own, "kv_connector_extra_config": {"depth": 3}})
    assert kv is not None
    assert kv.connector_extra_config == {"depth": 3}


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_chiasms_kv_connectors_have_no_settings_of_their_own(role: Role) -> None:
    with pytest.raises(ConfigurationError, match=r"^TcpConnector has no settings of its own; leave out depth, host"):
        kv_config(role, {"kv_connector": "TcpConnector", "kv_connector_extra_config": {"host": "a", "depth": 3}})


# ---- vLLM --------------------------------------------------------------------------------------------------------------


def test_settings_that_vllm_knows_become_its_flags() -> None:
    settings = {
        "dtype": "float16",
        "device": "auto",
        "max_model_len": 4096,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 9,
        "max_queued_requests": 7,
        "block_size": 32,
        "log_level": "warning",
    }
    assert _pairs(settings) == {
        "--log-level": "WARNING",
        "--uvicorn-log-level": "warning",
        "--dtype": "float16",
        "--max-model-len": "4096",
        "--max-num-batched-tokens": "1024",
        "--max-num-seqs": "9",
        "--max-num-queued-reqs": "7",
        "--block-size": "32",
    }


def test_roles_that_see_images_limit_them_and_roles_with_kv_size_it() -> None:
    of_roles = {role: _pairs({"max_items": 3, "kv_cache_bytes": 1 << 30}, role) for role in Role}
    seeing = {role for role, given in of_roles.items() if "--limit-mm-per-prompt" in given}
    assert seeing == {Role.ENCODER, Role.AGGREGATED}
    assert json.loads(of_roles[Role.ENCODER]["--limit-mm-per-prompt"]) == {"image": 3}
    holding = {role for role, given in of_roles.items() if given.get("--kv-cache-memory-bytes") == str(1 << 30)}
    assert holding == set(Role) - {Role.ENCODER}


def test_vllm_gets_no_flags_about_media_because_the_proxy_fetches_them(tmp_path: Path) -> None:
    assert vllm_flags({"allowed_local_media_path": tmp_path, "max_media_bytes": 1}, Role.ENCODER) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:1"}, "--device means nothing to vLLM: .*--encoder-devices"),
        ({"encoder_cache_bytes": 1}, "--encoder-cache-bytes means nothing to vLLM: .*--max-num-batched-tokens"),
        ({"max_body_bytes": 1}, "--max-body-bytes means nothing to vLLM"),
    ],
)
def test_settings_that_vllm_does_not_have_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        vllm_flags(settings, Role.PD)
