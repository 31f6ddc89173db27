"""Instances against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiasm.doctor import fleet
from chiasm.doctor.observed import Observed, ObservedProxy
from chiasm.wire import Health, InstanceInfo, ProxyHealth
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
def test_a_fleet_that_fits(members: list[Observed]) -> None:
    for check in (fleet.health, fleet.composition, *fleet.CHECKS):
        assert set(verdicts(check(members))) <= {"ok", "skipped"}


def test_an_instance_in_trouble() -> None:
    found = problem(fleet.health([E, replace(PD, trouble="did not answer within 5 s")]))
    assert found.says == "pd http://10.0.0.2:8000 did not answer within 5 s"
    assert found.command == "curl -m 5 http://10.0.0.2:8000/health"


def test_a_password_in_an_address_is_not_shown() -> None:
    secret = replace(PD, url="http://me:secret@host:1", trouble="is ill")
    found = problem(fleet.health([secret]))
    assert "secret" not in f"{found.says} {found.command}"


def test_a_role_that_is_another() -> None:
    assert "its role is pd" in problem(fleet.roles([PD, replace(PD, role="encoder")])).says


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([E], "no pd or prefill"),
        ([E, P], "no decode"),
        ([D], "no prefill"),
    ],
)
def test_roles_that_need_others(members: list[Observed], says: str) -> None:
    assert says in problem(fleet.composition(members)).says


def test_without_an_encoder_text_alone_is_answered() -> None:
    assert "no encoder" in warning(fleet.composition([PD])).says


def test_vllm_without_middleware_says_not_what_it_is() -> None:
    plain = Observed("http://h:1", "pd", Health(model="m", engine="vllm 0.32.0", max_model_len=512))
    for check in (fleet.roles, fleet.model, fleet.ec_store):
        assert "skipped" in verdicts(check([E, plain]))
        assert "ok" not in verdicts(check([E, plain]))


def test_other_names() -> None:
    found = problem(fleet.model([E, instance("pd", 2, model="n")]))
    assert "m at encoder" in found.says
    assert "n at pd" in found.says


def test_another_dtype_is_named() -> None:
    found = problem(fleet.model([E, instance("pd", 2, fingerprint="a" * 64, dtype="float32")]))
    assert "float32 at pd http://10.0.0.2:8000" in found.says
    assert "bfloat16 at encoder" in found.says


def test_another_checkpoint_under_the_same_name() -> None:
    found = problem(fleet.model([E, instance("pd", 2, fingerprint="a" * 64)]))
    assert "different checkpoints under one name" in found.says
    assert "ok" not in verdicts(fleet.model([E, instance("pd", 2, fingerprint="a" * 64)]))


def test_another_length() -> None:
    assert "256 tokens at pd" in warning(fleet.context_length([PD, instance("pd", 3, max_model_len=256)])).says


def test_another_store() -> None:
    assert "different folders" in problem(fleet.ec_store([E, instance("pd", 2, ec_store="t" * 32)])).says


def test_a_store_that_nobody_names_is_not_called_ok() -> None:
    assert verdicts(fleet.ec_store([E, instance("pd", 2, ec_store="")])) == ["skipped"]


def test_another_kv_connector() -> None:
    other = instance("decode", 4, kv_connector="SharedMemoryConnector")
    assert "different KV connectors" in problem(fleet.kv_connector([P, other])).says


def test_kv_does_not_travel_between_engines() -> None:
    other = instance("decode", 4, engine="vllm 0.32.0")
    assert "different engines" in problem(fleet.kv_connector([P, other])).says


@pytest.mark.parametrize(
    ("version", "verdict"), [("0.32.1", "ok"), ("0.33.0", "ok"), ("0.31.0", "problem"), ("1.0", "problem")]
)
def test_versions_of_vllm(version: str, verdict: str) -> None:
    assert verdict in verdicts(fleet.versions([E, instance("pd", 2, engine=f"vllm {version}")]))


def test_other_versions_of_chiasm() -> None:
    assert "0.0.9 at pd" in warning(fleet.versions([E, instance("pd", 2, version="0.0.9")])).says


def test_kv_does_not_pass_between_versions_of_vllm() -> None:
    members = [instance("prefill", 3, engine="vllm 0.32.0"), instance("decode", 4, engine="vllm 0.33.0")]
    assert "vllm 0.33.0 at decode" in problem(fleet.kv_connector(members)).says


def test_what_instances_compute_on() -> None:
    assert "cpu: encoder http://10.0.0.1:8000" in next(fleet.devices([E, PD])).says
    found = warning(fleet.devices([E, PD, instance("pd", 3, device="cuda:0")]))
    assert "cuda at pd http://10.0.0.3:8000" in found.says


def test_an_encoder_on_another_kind_of_device_is_as_well() -> None:
    assert verdicts(fleet.devices([instance("encoder", device="cuda:0"), PD])) == ["ok"]


def on_one_host(*several: Observed) -> list[Observed]:
    return [replace(one, url=f"http://10.0.0.1:{8000 + index}") for index, one in enumerate(several)]


def test_threads_that_have_a_core_each() -> None:
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
def test_threads_that_share_a_core(members: list[Observed]) -> None:
    assert "wait for each other" in warning(fleet.threads(on_one_host(*members))).why


def test_threads_of_each_host_count_for_themselves() -> None:
    assert verdicts(fleet.threads([E, P, PD])) == ["ok", "ok", "ok"]


def test_threads_that_nobody_tells_are_not_called_ok() -> None:
    assert verdicts(fleet.threads([instance("pd", threads=None)])) == ["skipped"]
    assert verdicts(fleet.threads([instance("pd", device="cuda:0", threads=None)])) == []


@pytest.mark.parametrize(("ahead", "says"), [(90.0, "about 90 s ahead of"), (-60.0, "about 60 s behind")])
def test_a_clock_that_is_off(ahead: float, says: str) -> None:
    assert says in warning(fleet.clocks([E, instance("pd", 2, clock_seconds=ahead)])).says


def test_a_second_is_within_what_a_date_can_tell() -> None:
    assert verdicts(fleet.clocks([instance("pd", clock_seconds=-1.5)])) == ["ok"]


def test_what_a_proxy_makes_of_its_instances() -> None:
    listed = [
        InstanceInfo(url="http://a:1", role="pd", state="mismatched", reason="its fingerprint differs"),
        InstanceInfo(url="http://b:1", role="encoder", state="starting"),
    ]
    health = ProxyHealth(status="unavailable", instances=listed)
    results = list(fleet.proxy(ObservedProxy("http://p:1", health)))
    assert verdicts(results) == ["problem", "warning", "problem"]
    assert "its fingerprint differs" in results[0].says
    assert "unavailable" in results[2].says
