"""What a deployment starts, and with how many threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chiasm.errors import ConfigurationError
from chiasm.http.config import HttpConfig
from chiasm.http.key_ring import read_keys
from chiasm.launch import DeploymentConfig, EngineKind, RoleConfig, config
from chiasm.launch.config import model_name
from chiasm.launch.devices import Placement
from chiasm.launch.plan import ProcessPlan, Surroundings, plan_instances, plan_proxy
from chiasm.launch.ports import HeldPort
from chiasm.launch.process import InstanceProcess, ProxyProcess, from_json
from chiasm.wire import Role

ONE_EACH = {Role.ENCODER: RoleConfig(), Role.PD: RoleConfig()}
APART = {Role.ENCODER: RoleConfig(), Role.PREFILL: RoleConfig(), Role.DECODE: RoleConfig()}


@pytest.fixture
def address() -> HeldPort:
    held = HeldPort("127.0.0.1")
    held.release()
    return held


def _plans(
    wanted: DeploymentConfig, storage: Path | None = Path("/ec"), placement: Placement | None = None
) -> list[ProcessPlan]:
    held: list[HeldPort] = []
    placements = {(role, 0): placement or Placement() for role in wanted.roles}
    surroundings = Surroundings(storage, 1 << 20, Path("/scratch"))
    try:
        return plan_instances(wanted, Path("/models/m"), placements, surroundings, held)
    finally:
        for one in held:
            one.release()


def _instances(wanted: DeploymentConfig, storage: Path | None = Path("/ec")) -> dict[Role, InstanceProcess]:
    plans = _plans(wanted, storage)
    return {plan.role: from_json(plan.configuration.encode(), InstanceProcess) for plan in plans if plan.role}


def _proxy(wanted: DeploymentConfig, address: HeldPort, urls: Sequence[tuple[Role, str]]) -> ProxyProcess:
    return from_json(plan_proxy(wanted, address, urls).configuration.encode(), ProxyProcess)


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
    monkeypatch.setattr(config, "usable_cores", lambda: usable)
    assert DeploymentConfig("demo", roles).threads(Role.ENCODER) == threads


def test_cores_that_are_left_over_go_to_language_models_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "usable_cores", lambda: 7)
    wanted = DeploymentConfig("demo", {Role.ENCODER: RoleConfig(2), Role.PD: RoleConfig(2)})
    assert [wanted.threads(Role.ENCODER, index) for index in (0, 1)] == [2, 1]
    assert [wanted.threads(Role.PD, index) for index in (0, 1)] == [2, 2]


def test_cores_of_a_role_that_are_left_over_go_to_its_first_instances() -> None:
    wanted = DeploymentConfig("demo", {Role.ENCODER: RoleConfig(1), Role.PD: RoleConfig(2, cpus=(2, 4, 5, 6, 7))})
    assert [wanted.threads(Role.PD, index) for index in (0, 1)] == [3, 2]


def test_an_instance_gets_everything_that_its_role_needs() -> None:
    roles = {Role.ENCODER: RoleConfig(settings={"max_items": 4}), Role.PD: RoleConfig()}
    settings = {"dtype": "bfloat16", "max_items": 5, "max_image_pixels": 9}
    wanted = DeploymentConfig("demo", roles, settings=settings, deadline_seconds=7, connector="SharedStorageConnector")
    (plan, _) = _plans(wanted, placement=Placement(threads=3, cpus=(0, 2)))
    encoder = from_json(plan.configuration.encode(), InstanceProcess)
    assert encoder.engine.model == Path("/models/m")
    assert encoder.engine.role is Role.ENCODER
    assert (encoder.server.host, encoder.server.port) == ("127.0.0.1", plan.address.port)
    assert (encoder.served_model_name, encoder.engine.threads, encoder.cpus) == ("demo", 3, (0, 2))
    assert encoder.engine.ec is not None
    assert (encoder.engine.ec.connector_extra_config, encoder.engine.ec.max_bytes) == (
        {"shared_storage_path": "/ec"},
        1 << 20,
    )
    assert (encoder.engine.dtype, encoder.engine.max_items) == ("bfloat16", 4)
    assert encoder.server.media.max_image_pixels == 9
    assert encoder.server.deadline_seconds == 7


def test_an_aggregated_instance_exchanges_no_embeddings() -> None:
    wanted = DeploymentConfig("demo", {Role.AGGREGATED: RoleConfig()})
    assert not wanted.exchanges_embeddings
    assert _instances(wanted, None)[Role.AGGREGATED].engine.ec is None


def test_prefill_and_decode_get_the_settings_of_a_kv_connector() -> None:
    module = "tests.kv_connector.gated_connector"
    wanted = DeploymentConfig(
        "demo", APART, kv_connector="Mine", kv_connector_module_path=module, kv_connector_extra_config={"depth": 3}
    )
    for role in (Role.PREFILL, Role.DECODE):
        kv = _instances(wanted)[role].engine.kv
        assert kv is not None
        assert kv.connector_extra_config == {"depth": 3}


def test_prefill_exchanges_embeddings_and_kv_and_decode_only_kv() -> None:
    wanted = DeploymentConfig(
        "demo", APART, kv_connector="NixlConnector", kv_lease_seconds=5, connector="SharedStorageConnector"
    )
    assert wanted.exchanges_embeddings
    of = {role: process.engine for role, process in _instances(wanted).items()}
    prefill_ec, prefill_kv, decode_kv = of[Role.PREFILL].ec, of[Role.PREFILL].kv, of[Role.DECODE].kv
    assert prefill_ec is not None
    assert prefill_ec.connector_extra_config == {"shared_storage_path": "/ec"}
    assert prefill_kv is not None
    assert (prefill_kv.connector, prefill_kv.lease_seconds) == ("NixlConnector", 5)
    assert decode_kv is not None
    assert decode_kv.connector == "NixlConnector"
    assert of[Role.DECODE].ec is None
    assert of[Role.ENCODER].kv is None


@pytest.mark.parametrize(("uuids", "visible"), [((), "1"), (("GPU-bb",), "GPU-bb")])
def test_an_instance_sees_only_its_device(uuids: tuple[str, ...], visible: str) -> None:
    wanted = DeploymentConfig("demo", {Role.AGGREGATED: RoleConfig()})
    (plan,) = _plans(wanted, placement=Placement(("1",), uuids=uuids))
    assert from_json(plan.configuration.encode(), InstanceProcess).engine.device == "cuda:0"
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == visible
    assert plan.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_instances_on_the_same_cores_share_a_file_and_encoders_give_way() -> None:
    (plan, _) = _plans(DeploymentConfig("demo", ONE_EACH), placement=Placement(core_share="cores-1", nice=5))
    engine = from_json(plan.configuration.encode(), InstanceProcess).engine
    assert (engine.core_share, engine.nice) == (Path("/scratch/cores-1"), 5)


def test_an_encoder_gives_way_on_a_gpu_if_mps_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    wanted = DeploymentConfig("demo", {Role.AGGREGATED: RoleConfig()})
    on_gpu = Placement(("0",), nice=5)
    assert "CUDA_MPS_CLIENT_PRIORITY" not in _plans(wanted, placement=on_gpu)[0].environment
    (tmp_path / "control").touch()
    assert _plans(wanted, placement=on_gpu)[0].environment["CUDA_MPS_CLIENT_PRIORITY"] == "1"
    assert "CUDA_MPS_CLIENT_PRIORITY" not in _plans(wanted, placement=replace(on_gpu, nice=0))[0].environment


def test_the_proxy_gets_the_url_of_every_instance(address: HeldPort) -> None:
    urls = [(Role.ENCODER, "http://a"), (Role.ENCODER, "http://b"), (Role.PD, "http://c")]
    proxy = _proxy(DeploymentConfig("demo", proxy_settings={"max_items": 3}), address, urls).proxy
    assert (proxy.encoders, proxy.pds, proxy.port) == (("http://a", "http://b"), ("http://c",), address.port)
    assert proxy.max_items == 3
    proxy = _proxy(DeploymentConfig("demo"), address, [(Role.PREFILL, "http://d"), (Role.DECODE, "http://e")]).proxy
    assert (proxy.prefills, proxy.decodes) == (("http://d",), ("http://e",))


def test_the_proxy_watches_a_file_for_instances_that_come_and_go(address: HeldPort) -> None:
    wanted = DeploymentConfig("demo", proxy_settings={"discover": ("dns:more:8000",)})
    plan = plan_proxy(wanted, address, [(Role.PD, "http://c")], listed_in=Path("/run/list.json"))
    proxy = from_json(plan.configuration.encode(), ProxyProcess).proxy
    assert (proxy.encoders, proxy.discover) == ((), ("file:/run/list.json", "dns:more:8000"))


def test_the_admin_key_is_on_no_command_line(address: HeldPort) -> None:
    wanted = DeploymentConfig("demo", admin_key="secret" * 3)
    plan = plan_proxy(wanted, address, [(Role.PD, "http://c")])
    assert from_json(plan.configuration.encode(), ProxyProcess).proxy.admin_key == "secret" * 3
    assert "secret" not in " ".join(plan.command)
    assert "secret" not in repr(wanted)
    assert "secret" not in repr(plan)


def test_the_key_by_which_serve_asks_its_proxy_is_on_no_command_line(address: HeldPort) -> None:
    plan = plan_proxy(DeploymentConfig("demo"), address, [(Role.PD, "http://c")], supervisor_key="supervisor")
    assert from_json(plan.configuration.encode(), ProxyProcess).proxy.supervisor_key == "supervisor"
    assert "supervisor" not in f"{plan.command} {plan.environment} {plan!r}"


def test_the_proxy_in_front_of_keyed_vllm_has_the_key_unless_it_has_its_own(address: HeldPort) -> None:
    wanted = DeploymentConfig("demo", ONE_EACH, engine=EngineKind.VLLM, vllm_flags=("--api-key", "K"))
    assert [one.key for one in read_keys(_proxy(wanted, address, [(Role.PD, "http://c")]).proxy.http)] == ["K"]
    own = replace(wanted, proxy_settings={"api_key": ("P" * 16,)})
    assert _proxy(own, address, [(Role.PD, "http://c")]).proxy.http == HttpConfig(api_key=("P" * 16,))


def test_a_model_has_the_name_of_its_folder_or_its_given_name(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").touch()
    assert model_name(str(tmp_path / "mine")) == "mine"
    assert model_name("Qwen/Qwen3-VL-2B-Instruct") == "Qwen/Qwen3-VL-2B-Instruct"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({Role.ENCODER: RoleConfig()}, "Nothing would answer"),
        ({Role.ENCODER: RoleConfig(), Role.AGGREGATED: RoleConfig()}, "Nothing would use the encoders"),
        ({Role.PREFILL: RoleConfig()}, "at least one decode instance"),
        ({Role.DECODE: RoleConfig(), Role.PREFILL: RoleConfig(0)}, "at least one prefill instance"),
        ({Role.PREFILL: RoleConfig(), Role.DECODE: RoleConfig(), Role.PD: RoleConfig()}, "can't be combined"),
        ({Role.PREFILL: RoleConfig(), Role.DECODE: RoleConfig(), Role.AGGREGATED: RoleConfig()}, "can't be combined"),
        ({Role.PD: RoleConfig(-1)}, "must not be negative"),
        ({Role.ENCODER: RoleConfig(1_000_000, least=1), Role.PD: RoleConfig(1)}, "at most 1024 instances of each role"),
        ({Role.ENCODER: RoleConfig(), Role.PD: RoleConfig(None)}, "of every role, or of none"),
    ],
)
def test_a_deployment_that_could_not_answer_is_refused(roles: Mapping[Role, RoleConfig], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DeploymentConfig("demo", roles)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"settings": {"max_sequences": 4}}, "There is no option --max-sequences"),
        ({"roles": {Role.PD: RoleConfig(settings={"x": 4})}}, "There is no option --x"),
        ({"proxy_settings": {"dtype": "float32"}}, "There is no option --dtype"),
        ({"roles": {Role.PD: RoleConfig(settings={"port": 4})}}, "--pd-args: --port is not for single processes"),
        ({"roles": {Role.PD: RoleConfig(settings={"host": "a"})}}, "--pd-args: --host is not for single processes"),
        (
            {"roles": {Role.PD: RoleConfig(settings={"shared_storage_path": Path("/a")})}},
            "--pd-args: --shared-storage-path .* for all instances",
        ),
        ({"settings": {"served_model_name": "a"}}, "Settings of all instances: --served-model-name"),
        ({"proxy_settings": {"port": 4}}, "--proxy-args: --port is not for single processes"),
        ({"proxy_settings": {"pd": ("http://a",)}}, "--proxy-args: --pd is not for single processes"),
        (
            {"engine": EngineKind.VLLM, "roles": {Role.PD: RoleConfig(vllm_flags=("--served_model_name=a",))}},
            "--pd-args: --served-model-name is not for single processes",
        ),
        ({"engine": EngineKind.VLLM, "settings": {"dtype": "abacus"}}, "Unknown dtype 'abacus'; vLLM has"),
        ({"vllm_flags": ("--seed", "1")}, "--vllm-args is for --engine vllm only"),
        ({"roles": {Role.PD: RoleConfig(vllm_flags=("--seed", "1"))}}, "--vllm-args is for --engine vllm only"),
        ({"engine": EngineKind.VLLM, "settings": {"device": "cpu"}}, "--device means nothing to vLLM"),
    ],
)
def test_settings_that_no_process_has_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DeploymentConfig("demo", **wrong)
