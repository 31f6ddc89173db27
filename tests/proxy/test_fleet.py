"""States of instances, agreement on what they serve, choice of the next one. No clock, no I/O."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
from msgspec.structs import replace

from chiasm.proxy.agreement import difference
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.wire import Health, InstanceState, Role

HEALTH = Health(model="tiny", fingerprint="f" * 64, ec_store="store")


def add(fleet: Fleet, name: str, configured: Role = Role.PD, /, **health: Any) -> Instance:
    instance = fleet.add(f"http://{name}", configured)
    fleet.succeed(instance, replace(HEALTH, **({"role": configured.value} | health)))
    return instance


def test_an_instance_starts_becomes_healthy_fails_and_recovers() -> None:
    fleet = Fleet()
    instance = fleet.add("http://a", Role.PD)
    assert (instance.state, instance.reason) == (InstanceState.STARTING, "not probed yet")
    fleet.fail(instance, "refused", 0.0)
    assert (instance.state, instance.reason) == (InstanceState.STARTING, "refused")
    fleet.succeed(instance, replace(HEALTH, role="pd"))
    assert (instance.state, instance.reason) == (InstanceState.HEALTHY, None)
    fleet.fail(instance, "refused", 0.0)
    assert (instance.state, instance.reason) == (InstanceState.UNHEALTHY, "refused")
    assert fleet.models == []
    fleet.succeed(instance, replace(HEALTH, role="pd"))
    assert instance.state == InstanceState.HEALTHY
    assert fleet.models == ["tiny"]


def test_an_instance_is_expected_while_it_starts_and_for_a_while_after_it_was_lost() -> None:
    fleet = Fleet()
    instance = fleet.add("http://a", Role.PD)
    assert fleet.expects(Role.PD, 1e6)
    add(fleet, "a")
    assert not fleet.expects(Role.PD, 1e6)  # it is there
    fleet.fail(instance, "refused", 100.0)
    fleet.fail(instance, "refused again", 150.0)
    assert fleet.expects(Role.PD, 159.0)
    assert not fleet.expects(Role.PD, 161.0)
    fleet.fail(instance, "loads its model", 160.0, says_starting=True)
    assert fleet.expects(Role.PD, 1e6)
    fleet.remove(instance)
    assert not fleet.expects(Role.PD, 159.0)


def test_an_instance_is_expected_for_a_while_after_it_has_drained_however_long_that_took() -> None:
    fleet = Fleet()
    instance = add(fleet, "a")
    fleet.fail(instance, "draining", 100.0, says_draining=True)
    fleet.fail(instance, "draining", 1000.0, says_draining=True)
    assert not fleet.expects(Role.PD, 1000.0)
    fleet.fail(instance, "refused", 1001.0)
    assert fleet.expects(Role.PD, 1002.0)


def test_listeners_hear_of_each_change_once_whichever_report_is_the_cause() -> None:
    fleet, told = Fleet(), list[tuple[str, str]]()
    fleet.listeners.append(lambda instance: told.append((instance.url[-1], instance.state)))
    old = add(fleet, "a")
    add(fleet, "b", model="new")
    assert told == [("a", "healthy"), ("b", "mismatched")]
    fleet.fail(old, "gone", 0.0)
    fleet.fail(old, "still gone", 1.0)
    assert told[2:] == [("a", "unhealthy"), ("b", "healthy")]
    add(fleet, "b", model="new")
    assert len(told) == 4


@pytest.mark.parametrize(
    ("roles", "of_text", "of_images"),
    [
        ([Role.PD, Role.ENCODER], None, None),
        ([Role.PD], None, Role.ENCODER),
        ([Role.AGGREGATED], None, None),
        ([Role.ENCODER], Role.PD, Role.PD),
        ([Role.PREFILL, Role.DECODE], None, Role.ENCODER),
        ([Role.PREFILL, Role.ENCODER], Role.DECODE, Role.DECODE),
    ],
)
def test_what_a_fleet_lacks(roles: list[Role], of_text: Role | None, of_images: Role | None) -> None:
    fleet = Fleet()
    for role in roles:
        add(fleet, role, role)
    assert fleet.lacking(has_images=False) == of_text
    assert fleet.lacking(has_images=True) == of_images


def test_another_role_than_configured_is_mismatched() -> None:
    fleet = Fleet()
    instance = add(fleet, "a", Role.ENCODER, role="pd")
    assert instance.state == InstanceState.MISMATCHED
    assert "role is pd" in str(instance.reason)


def test_another_model_fingerprint_or_store_is_mismatched() -> None:
    fleet = Fleet()
    pd = add(fleet, "pd")
    assert add(fleet, "a", Role.ENCODER, model="other").state == InstanceState.MISMATCHED
    assert add(fleet, "b", Role.ENCODER, fingerprint="e" * 64).state == InstanceState.MISMATCHED
    assert add(fleet, "c", Role.ENCODER, ec_store="elsewhere").state == InstanceState.MISMATCHED
    assert add(fleet, "d", Role.ENCODER).state == InstanceState.HEALTHY
    assert pd.state == InstanceState.HEALTHY
    assert fleet.choose(Role.ENCODER) is fleet.get("http://d")


PEER = {"ec_connector": "TcpConnector", "ec_store": ""}


def test_all_that_move_embeddings_need_the_same_connector() -> None:
    fleet = Fleet()
    add(fleet, "pd", **PEER)
    add(fleet, "d", Role.DECODE, ec_store="")
    assert add(fleet, "a", Role.ENCODER, **PEER).state is InstanceState.HEALTHY
    other = add(fleet, "b", Role.ENCODER, ec_connector="NixlConnector", ec_store="")
    assert other.reason == "it moves embeddings with NixlConnector, but the fleet with TcpConnector"
    old = add(fleet, "c", Role.ENCODER)  # of a version that doesn't name it
    assert old.reason == "it moves embeddings with SharedStorageConnector, but the fleet with TcpConnector"


def test_a_fleet_moves_to_another_connector_with_its_last_instance() -> None:
    fleet = Fleet()
    pd, encoder = add(fleet, "pd"), add(fleet, "e", Role.ENCODER)
    add(fleet, "e", Role.ENCODER, **PEER)
    assert encoder.state is InstanceState.MISMATCHED
    add(fleet, "pd", **PEER)
    assert (pd.state, encoder.state) == (InstanceState.HEALTHY, InstanceState.HEALTHY)


def test_prefill_and_decode_need_the_same_connector() -> None:
    fleet = Fleet()
    add(fleet, "p", Role.PREFILL, kv_connector="SharedMemoryConnector")
    assert (
        add(fleet, "d", Role.DECODE, kv_connector="SharedMemoryConnector", ec_store="").state is InstanceState.HEALTHY
    )
    other = add(fleet, "o", Role.DECODE, kv_connector="NixlConnector")
    assert other.state == InstanceState.MISMATCHED
    assert (
        str(other.reason)
        == "it moves KV with NixlConnector of chiasm, but the fleet with SharedMemoryConnector of chiasm"
    )
    assert add(fleet, "e", Role.ENCODER).state == InstanceState.HEALTHY


def test_prefill_and_decode_must_report_their_role() -> None:
    fleet = Fleet()
    for role in (Role.PREFILL, Role.DECODE):
        instance = add(fleet, role, role, role="")
        assert instance.state == InstanceState.MISMATCHED
        assert "chiasm's own instances" in str(instance.reason)


def test_pds_cannot_be_combined_with_prefill_and_decode() -> None:
    fleet = Fleet()
    assert not any(fleet.misfit(role) for role in Role)
    pd = add(fleet, "pd")
    add(fleet, "e", Role.ENCODER)
    assert not fleet.hands_over
    for role in (Role.PREFILL, Role.DECODE):
        assert f"can't be combined with {role} instances" in str(fleet.misfit(role))
    assert not fleet.misfit(Role.AGGREGATED)
    assert not fleet.misfit(Role.ENCODER)
    with fleet.working(pd, 1):
        fleet.remove(pd)
        assert not fleet.misfit(Role.PREFILL)
        add(fleet, "p", Role.PREFILL)
        assert fleet.hands_over
        assert "prefill" in str(fleet.misfit(Role.PD))


def test_text_needs_both_prefill_and_decode() -> None:
    fleet = Fleet()
    assert (fleet.missing, fleet.models) == (Role.PD, [])
    d = add(fleet, "d", Role.DECODE)
    assert (fleet.missing, fleet.models) == (Role.PREFILL, [])
    p = add(fleet, "p", Role.PREFILL)
    assert fleet.missing is None
    assert fleet.models == ["tiny"]
    fleet.fail(d, "gone", 0.0)
    assert fleet.missing == Role.DECODE
    fleet.fail(p, "gone", 0.0)
    assert fleet.missing == Role.PREFILL


def test_a_decode_instance_is_chosen_by_sequences_and_blocks() -> None:
    fleet = Fleet()
    known: dict[str, Any] = {"max_num_seqs": 4, "kv_blocks_total": 100}
    one = add(fleet, "1", Role.DECODE, kv_blocks_free=100, **known)
    two = add(fleet, "2", Role.DECODE, kv_blocks_free=60, **known)
    assert (one.load, two.load) == (0.0, 0.4)
    with fleet.working(one, 1):
        assert one.load == 0.25
        assert fleet.choose(Role.DECODE) is one
        with fleet.working(one, 1):
            assert fleet.choose(Role.DECODE) is two


@pytest.mark.parametrize("few", [{"kv_blocks_free": 0, "max_num_seqs": 4}, {"kv_blocks_free": 100, "max_num_seqs": 1}])
def test_a_decode_instance_without_room_comes_last(few: dict[str, Any]) -> None:
    fleet = Fleet()
    full = add(fleet, "1", Role.DECODE, kv_blocks_total=100, **few)
    busy = add(fleet, "2", Role.DECODE, kv_blocks_total=100, kv_blocks_free=1, max_num_seqs=4)
    with fleet.working(full, 1), fleet.working(busy, 1), fleet.working(busy, 1), fleet.working(busy, 1):
        assert fleet.choose(Role.DECODE) is busy
        assert fleet.choose(Role.DECODE, exclude={busy}) is full


def test_a_decode_instance_that_reports_no_limits_is_chosen_by_its_calls() -> None:
    fleet = Fleet()
    one, two = add(fleet, "1", Role.DECODE), add(fleet, "2", Role.DECODE)
    with fleet.working(one, 1):
        assert fleet.choose(Role.DECODE) is two


def test_fields_that_an_instance_does_not_report_fit_anything() -> None:
    fleet = Fleet()
    vllm = add(fleet, "v", role="", fingerprint="", ec_store="")
    assert len(fleet.fingerprint) == 64
    encoder = add(fleet, "e", Role.ENCODER)
    assert (vllm.state, encoder.state) == (InstanceState.HEALTHY, InstanceState.HEALTHY)
    assert fleet.fingerprint == HEALTH.fingerprint
    assert add(fleet, "f", Role.ENCODER, fingerprint="e" * 64).state == InstanceState.MISMATCHED


def test_pds_decide_and_encoders_follow() -> None:
    fleet = Fleet()
    encoder = fleet.add("http://e", Role.ENCODER)
    pd = fleet.add("http://p", Role.PD)
    fleet.succeed(encoder, replace(HEALTH, role="encoder", fingerprint="e" * 64))
    fleet.fail(encoder, "gone", 0.0)
    fleet.succeed(pd, replace(HEALTH, role="pd"))
    fleet.succeed(encoder, replace(HEALTH, role="encoder", fingerprint="e" * 64))
    assert (pd.state, encoder.state) == (InstanceState.HEALTHY, InstanceState.MISMATCHED)


def test_an_encoder_that_came_first_does_not_keep_pds_out() -> None:
    fleet = Fleet()
    wrong = add(fleet, "w", Role.ENCODER, fingerprint="e" * 64)
    right = add(fleet, "e", Role.ENCODER)
    assert (wrong.state, right.state) == (InstanceState.HEALTHY, InstanceState.MISMATCHED)
    pd = add(fleet, "p")
    assert (wrong.state, right.state, pd.state) == (
        InstanceState.MISMATCHED,
        InstanceState.HEALTHY,
        InstanceState.HEALTHY,
    )


def test_a_wrong_pd_does_not_take_over_while_the_right_one_is_away() -> None:
    fleet = Fleet()
    encoder, right = add(fleet, "e", Role.ENCODER), add(fleet, "r")
    wrong = add(fleet, "w", fingerprint="e" * 64)
    fleet.fail(right, "busy", 0.0)
    assert (encoder.state, wrong.state) == (InstanceState.HEALTHY, InstanceState.MISMATCHED)
    fleet.succeed(right, replace(HEALTH, role="pd"))
    assert right.state == InstanceState.HEALTHY


def test_a_fleet_moves_to_another_model_when_no_instance_serves_the_old_one() -> None:
    fleet = Fleet()
    pd, encoder = add(fleet, "p"), add(fleet, "e", Role.ENCODER)
    new = replace(HEALTH, fingerprint="e" * 64)
    fleet.succeed(encoder, replace(new, role="encoder"))
    assert (pd.state, encoder.state) == (InstanceState.HEALTHY, InstanceState.MISMATCHED)
    fleet.fail(pd, "restarts", 0.0)
    assert encoder.state == InstanceState.HEALTHY
    fleet.succeed(pd, replace(new, role="pd"))
    assert (pd.state, encoder.state) == (InstanceState.HEALTHY, InstanceState.HEALTHY)
    assert fleet.fingerprint == "e" * 64


@pytest.mark.parametrize("order", list(permutations(("pd", "a", "b"))))
def test_recreating_the_store_excludes_no_instance(order: tuple[str, ...]) -> None:
    fleet = Fleet()
    roles = {"pd": Role.PD, "a": Role.ENCODER, "b": Role.ENCODER}
    instances = [add(fleet, name, role) for name, role in roles.items()]
    for store in ("anew", "once more"):
        for name in order:
            add(fleet, name, roles[name], ec_store=store)
            assert [one.state for one in instances] == [InstanceState.HEALTHY] * 3
    assert add(fleet, "late", Role.ENCODER).state == InstanceState.MISMATCHED


@pytest.mark.parametrize("order", list(permutations("epd")))
def test_recreating_the_store_excludes_no_instance_where_decode_uses_none(order: tuple[str, ...]) -> None:
    fleet = Fleet()
    kv = {"kv_connector": "SharedMemoryConnector"}
    said: dict[str, tuple[Role, dict[str, Any]]] = {
        "p": (Role.PREFILL, kv),
        "d": (Role.DECODE, kv | {"ec_store": ""}),
        "e": (Role.ENCODER, {}),
    }
    instances = [add(fleet, name, role, **health) for name, (role, health) in said.items()]
    for store in ("anew", "once more"):
        for name in order:
            role, health = said[name]
            add(fleet, name, role, **({"ec_store": store} | health))
            assert [one.state for one in instances] == [InstanceState.HEALTHY] * 3


def test_an_instance_that_moves_to_another_store_alone_is_mismatched_once_the_others_were_probed_again() -> None:
    fleet = Fleet()
    pd = add(fleet, "pd")
    moved = add(fleet, "a", Role.ENCODER)
    add(fleet, "b", Role.ENCODER)
    add(fleet, "a", Role.ENCODER, ec_store="elsewhere")
    add(fleet, "b", Role.ENCODER)
    add(fleet, "a", Role.ENCODER, ec_store="elsewhere")
    assert (moved.state, moved.reason) == (InstanceState.HEALTHY, None)
    add(fleet, "pd")
    assert moved.state == InstanceState.MISMATCHED
    assert "store" in str(moved.reason)
    assert pd.state == InstanceState.HEALTHY


def test_an_instance_that_comes_back_with_another_store_is_mismatched_at_once() -> None:
    fleet = Fleet()
    add(fleet, "pd")
    encoder = add(fleet, "a", Role.ENCODER)
    fleet.fail(encoder, "refused", 0.0)
    add(fleet, "a", Role.ENCODER, ec_store="elsewhere")
    assert encoder.state == InstanceState.MISMATCHED


def test_a_moved_store_excuses_no_other_difference() -> None:
    fleet = Fleet()
    add(fleet, "pd")
    encoder = add(fleet, "a", Role.ENCODER)
    add(fleet, "a", Role.ENCODER, ec_store="anew", fingerprint="e" * 64)
    assert encoder.state == InstanceState.MISMATCHED


def test_the_agreement_outlives_a_moment_without_instances() -> None:
    fleet = Fleet()
    pd = add(fleet, "p")
    fleet.fail(pd, "busy", 0.0)
    assert fleet.fingerprint == HEALTH.fingerprint


def test_the_instance_with_the_least_work_is_chosen_and_equals_take_turns() -> None:
    fleet = Fleet()
    one, two = add(fleet, "1"), add(fleet, "2")
    with fleet.working(one, 10):
        assert fleet.choose(Role.PD) is two
        with fleet.working(two, 20):
            assert fleet.choose(Role.PD) is one
            assert fleet.choose(Role.PD, exclude={one}) is two
    assert (one.outstanding, one.in_flight) == (0, 0)
    turns = []
    for _ in range(4):
        chosen = fleet.choose(Role.PD)
        assert chosen is not None
        with fleet.working(chosen, 1):
            turns.append(chosen)
    assert turns[0] is not turns[1]
    assert turns[:2] == turns[2:]
    assert fleet.choose(Role.ENCODER) is None
    assert fleet.choose(Role.PD, model="other") is None


def test_removal_waits_for_the_last_call() -> None:
    fleet = Fleet()
    removed: list[Instance] = []
    fleet.on_remove = removed.append
    instance = add(fleet, "a")
    with fleet.working(instance, 1):
        fleet.remove(instance)
        assert instance.state == InstanceState.DRAINING
        assert fleet.choose(Role.PD) is None
        assert not removed
    assert removed == [instance]
    assert not fleet.instances


def test_a_draining_instance_can_be_added_again() -> None:
    fleet = Fleet()
    instance = add(fleet, "a")
    with fleet.working(instance, 1):
        fleet.remove(instance)
        assert fleet.add("http://a", Role.PD) is instance
        assert instance.state == InstanceState.HEALTHY
    assert fleet.instances == [instance]


def test_the_lowest_limit_of_images_applies() -> None:
    fleet = Fleet()
    assert fleet.max_items is None
    add(fleet, "a", max_items=4)
    add(fleet, "b", max_items=2)
    add(fleet, "c", max_items=None)
    assert fleet.max_items == 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({}, None),
        ({"model": "other"}, "it serves other, but the fleet serves tiny"),
        ({"fingerprint": "e" * 64, "dtype": "bfloat16"}, "its dtype is bfloat16, but the fleet's is float32"),
        ({"fingerprint": "e" * 64}, "its fingerprint (model or processor) differs from the fleet's"),
        (
            {"fingerprint": "e" * 64, "dtype": ""},
            "its fingerprint (model, processor or dtype) differs from the fleet's",
        ),
        ({"ec_store": "elsewhere"}, "it exchanges embeddings through another store than the fleet"),
        ({"kv_connector": "B"}, "it moves KV with B of chiasm, but the fleet with A of chiasm"),
        ({"engine": "vllm 1"}, "it moves KV with A of vllm 1, but the fleet with A of chiasm"),
        ({"fingerprint": "", "ec_store": "", "kv_connector": None}, None),
        ({"role": "encoder", "version": "2", "max_items": 1}, None),
    ],
)
def test_two_instances_differ_in_what_they_both_report(said: dict[str, Any], reason: str | None) -> None:
    health = replace(HEALTH, dtype="float32", kv_connector="A")
    assert difference(health, replace(health, **said)) == reason
