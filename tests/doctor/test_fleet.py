"""Instances compared with each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiasm.doctor import fleet
from chiasm.doctor.observed import Observed, ObservedProxy
from chiasm.wire import ECPlace, Health, InstanceInfo, ProxyHealth
from tests.doctor.results import problem, verdicts, warning

HEALTHY: dict[str, Any] = {
    "model": "m",
    "fingerprint": "f" * 64,
    "dtype": "bfloat16",
    "ec_store": "s" * 32,
    "version": "0.1.0",
    "max_model_len": 512,
    "device": "cpu",
    "threads": 1,
    "cpus": [0, 1],
}


def instance(role: str, number: int = 1, clock_seconds: float = 0.2, **said: Any) -> Observed:
    kv_connector = "NixlConnector" if role in ("prefill", "decode") else None
    health = Health(**(HEALTHY | {"role": role, "kv_connector": kv_connector} | said))
    return Observed(f"http://10.0.0.{number}:8000", role, health, clock_seconds=clock_seconds)


E, PD = instance("encoder", 1), instance("pd", 2)
P, D = instance("prefill", 3), instance("decode", 4)


@pytest.mark.parametrize("members", [[E, PD], [E, P, D], [instance("aggregated")]])
def test_a_fleet_that_fits_is_ok(members: list[Observed]) -> None:
    for check in (fleet.health, fleet.composition, *fleet.CHECKS):
        assert set(verdicts(check(members))) <= {"ok", "skipped"}


def test_an_instance_in_trouble_is_a_problem() -> None:
    found = problem(fleet.health([E, replace(PD, trouble="did not answer within 5 s")]))
    assert found.says == "pd http://10.0.0.2:8000 did not answer within 5 s"
    assert found.command == "curl -m 5 http://10.0.0.2:8000/health"


def test_a_password_in_an_address_is_not_shown() -> None:
    secret = replace(PD, url="http://me:secret@host:1", trouble="is ill")
    found = problem(fleet.health([secret]))
    assert "secret" not in f"{found.says} {found.command}"


def test_an_instance_used_in_another_role_is_a_problem() -> None:
    assert "its role is pd" in problem(fleet.roles([PD, replace(PD, role="encoder")])).says


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([E], "no pd or prefill"),
        ([E, P], "no decode"),
        ([D], "no prefill"),
    ],
)
def test_a_role_whose_counterpart_is_missing_is_a_problem(members: list[Observed], says: str) -> None:
    assert says in problem(fleet.composition(members)).says


def test_a_fleet_without_encoders_is_warned_about() -> None:
    assert "no encoder" in warning(fleet.composition([PD])).says


def test_checks_of_vllm_without_middleware_are_skipped() -> None:
    plain = Observed("http://h:1", "pd", Health(model="m", engine="vllm 0.32.0", max_model_len=512))
    for check in (fleet.roles, fleet.model, fleet.ec_store):
        assert "skipped" in verdicts(check([E, plain]))
        assert "ok" not in verdicts(check([E, plain]))


def test_different_model_names_are_a_problem() -> None:
    found = problem(fleet.model([E, instance("pd", 2, model="n")]))
    assert "m at encoder" in found.says
    assert "n at pd" in found.says


def test_different_dtypes_are_a_problem() -> None:
    found = problem(fleet.model([E, instance("pd", 2, fingerprint="a" * 64, dtype="float32")]))
    assert "float32 at pd http://10.0.0.2:8000" in found.says
    assert "bfloat16 at encoder" in found.says


def test_different_checkpoints_of_one_name_are_a_problem() -> None:
    found = problem(fleet.model([E, instance("pd", 2, fingerprint="a" * 64)]))
    assert "different checkpoints under one name" in found.says
    assert "ok" not in verdicts(fleet.model([E, instance("pd", 2, fingerprint="a" * 64)]))


def test_different_context_lengths_are_warned_about() -> None:
    assert "256 tokens at pd" in warning(fleet.context_length([PD, instance("pd", 3, max_model_len=256)])).says


def test_different_stores_are_a_problem() -> None:
    (found,) = fleet.ec_store([E, instance("pd", 2, ec_store="t" * 32)])
    assert "different folders" in problem([found]).says


@pytest.mark.parametrize("connector", ["", "SharedStorageConnector"])
def test_an_unreported_store_is_skipped(connector: str) -> None:
    assert verdicts(fleet.ec_store([E, instance("pd", 2, ec_store="", ec_connector=connector)])) == ["skipped"]


def from_memory(role: str, connector: str) -> Observed:
    place = ECPlace(host="10.0.0.1", port=9000, engine_id="e") if role == "encoder" else None
    return instance(role, ec_store="", ec_connector=connector, ec_place=place)


def test_one_connector_without_a_folder_is_ok() -> None:
    (found,) = fleet.ec_store([from_memory("encoder", "TcpConnector"), from_memory("pd", "TcpConnector")])
    assert (found.verdict, found.says) == ("ok", "2 instances move embeddings by TcpConnector from 10.0.0.1:9000")
    (found,) = fleet.ec_store([instance("pd", ec_store="", ec_connector="OfMyOwn")])
    assert (found.verdict, found.says) == ("ok", "1 instances move embeddings by OfMyOwn")


@pytest.mark.parametrize("of_pd", [from_memory("pd", "NixlConnector"), instance("pd")], ids=["memory", "folder"])
def test_different_connectors_are_a_problem(of_pd: Observed) -> None:
    found = problem(fleet.ec_store([from_memory("encoder", "TcpConnector"), of_pd]))
    assert "TcpConnector at encoder" in found.says
    assert "--connector" in found.do


def test_instances_that_cannot_read_from_a_shared_cache_are_warned_about() -> None:
    assert not list(fleet.shared_cache([E, PD]))
    reading = instance("pd", 5, reads_stored=True)
    assert verdicts(fleet.shared_cache([E, reading])) == ["ok"]
    found = warning(fleet.shared_cache([E, PD, reading]))
    assert "pd http://10.0.0.2:8000" in found.says
    assert "CHIASM_EC_STORE" in found.do  # instances of vLLM read from it too


def test_different_kv_connectors_are_a_problem() -> None:
    other = instance("decode", 4, kv_connector="SharedMemoryConnector")
    assert "different KV connectors" in problem(fleet.kv_connector([P, other])).says


def test_different_engines_of_prefill_and_decode_are_a_problem() -> None:
    other = instance("decode", 4, engine="vllm 0.32.0")
    assert "different engines" in problem(fleet.kv_connector([P, other])).says


@pytest.mark.parametrize(
    ("version", "verdict"), [("0.32.1", "ok"), ("0.33.0", "ok"), ("0.31.0", "problem"), ("1.0", "problem")]
)
def test_only_supported_versions_of_vllm_are_ok(version: str, verdict: str) -> None:
    assert verdict in verdicts(fleet.versions([E, instance("pd", 2, engine=f"vllm {version}")]))


def test_different_versions_of_chiasm_are_warned_about() -> None:
    assert "0.0.9 at pd" in warning(fleet.versions([E, instance("pd", 2, version="0.0.9")])).says


def test_different_versions_of_vllm_for_prefill_and_decode_are_a_problem() -> None:
    members = [instance("prefill", 3, engine="vllm 0.32.0"), instance("decode", 4, engine="vllm 0.33.0")]
    assert "vllm 0.33.0 at decode" in problem(fleet.kv_connector(members)).says


def test_different_kinds_of_devices_are_warned_about() -> None:
    assert "cpu: encoder http://10.0.0.1:8000" in next(fleet.devices([E, PD])).says
    found = warning(fleet.devices([E, PD, instance("pd", 3, device="cuda:0")]))
    assert "cuda at pd http://10.0.0.3:8000" in found.says


def test_an_encoder_may_compute_on_another_kind_of_device() -> None:
    assert verdicts(fleet.devices([instance("encoder", device="cuda:0"), PD])) == ["ok"]


def on_one_host(*several: Observed) -> list[Observed]:
    return [replace(one, url=f"http://10.0.0.1:{8000 + index}") for index, one in enumerate(several)]


def test_threads_with_a_core_each_are_ok() -> None:
    (found,) = fleet.threads(on_one_host(E, PD))
    assert (found.verdict, found.says) == ("ok", "2 threads of 2 instances on 2 cores at 10.0.0.1")
    pinned = [instance("encoder", cpus=[0]), instance("pd", cpus=[1])]
    assert verdicts(fleet.threads(on_one_host(*pinned))) == ["ok"]


@pytest.mark.parametrize(
    "members",
    [
        [E, PD, instance("pd", threads=2)],
        [instance("encoder", cpus=[0]), instance("pd", cpus=[0])],
    ],
)
def test_threads_that_share_a_core_are_warned_about(members: list[Observed]) -> None:
    assert "wait for each other" in warning(fleet.threads(on_one_host(*members))).why


def test_instances_that_share_cores_may_have_more_threads_than_there_are_cores() -> None:
    sharing = [instance(role, threads=2, shares_cores=True) for role in ("encoder", "pd")]
    assert verdicts(fleet.threads(on_one_host(*sharing))) == ["ok"]


def test_threads_are_counted_for_each_host() -> None:
    assert verdicts(fleet.threads([E, P, PD])) == ["ok", "ok", "ok"]


def test_unreported_threads_are_skipped() -> None:
    assert verdicts(fleet.threads([instance("pd", threads=None)])) == ["skipped"]
    assert verdicts(fleet.threads([instance("pd", device="cuda:0", threads=None)])) == []


@pytest.mark.parametrize(("ahead", "says"), [(90.0, "about 90 s ahead of"), (-60.0, "about 60 s behind")])
def test_a_wrong_clock_is_warned_about(ahead: float, says: str) -> None:
    assert says in warning(fleet.clocks([E, instance("pd", 2, clock_seconds=ahead)])).says


def test_a_second_is_within_the_precision_of_a_date() -> None:
    assert verdicts(fleet.clocks([instance("pd", clock_seconds=-1.5)])) == ["ok"]


def test_instances_that_the_proxy_does_not_use_are_reported() -> None:
    listed = [
        InstanceInfo(url="http://a:1", role="pd", state="mismatched", reason="its fingerprint differs"),
        InstanceInfo(url="http://b:1", role="encoder", state="starting"),
    ]
    health = ProxyHealth(status="unavailable", instances=listed)
    results = list(fleet.proxy(ObservedProxy("http://p:1", health)))
    assert verdicts(results) == ["problem", "warning", "problem"]
    assert "its fingerprint differs" in results[0].says
    assert "unavailable" in results[2].says
