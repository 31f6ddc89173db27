"""Who belongs to the fleet, from what sources and leases say. Nothing here has a clock or a network."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from chiasm.errors import ConflictError
from chiasm.proxy import membership as module
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.membership import FORGET_SECONDS, OPTIONS, Listed, Membership
from chiasm.wire import Health, InstanceState, Lease, Load, Role

URL = "http://10.0.0.5:8001"
OTHER = "http://10.0.0.6:8001"
LEASE = Lease(url=URL, role="encoder", incarnation="first", status="ok")


class Members:
    """A fleet and its membership."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.membership = Membership(self.fleet)

    def succeed(self, url: str, **health: Any) -> Instance:
        """Have an instance answer a probe."""
        instance = self.fleet.get(url)
        assert instance is not None
        known = {"model": "tiny", "role": str(instance.role)}
        self.fleet.succeed(instance, Health(**(known | health)))
        return instance

    def join(self, lease: Lease = LEASE, now: float = 0.0) -> Instance:
        """Take a lease, and have the instance answer a probe."""
        self.membership.renew(lease, now)
        return self.succeed(lease.url, incarnation=lease.incarnation)

    def look(self, start: float, end: float) -> None:
        """Look twice a second, as a proxy that runs does."""
        for half_seconds in range(round(2 * start), round(2 * end) + 1):
            self.membership.look(half_seconds / 2)

    @property
    def states(self) -> dict[str, str]:
        return {one.url: str(one.state) for one in self.fleet.instances}


@pytest.fixture
def members() -> Members:
    return Members()


# ---- lists -------------------------------------------------------------------------------------------------------------


def test_what_a_source_lists_is_added_and_what_it_lists_no_more_is_removed(members: Members) -> None:
    members.membership.note_list("file:x", [Listed(URL, Role.ENCODER), Listed(OTHER, Role.PD)])
    assert members.states.keys() == {URL, OTHER}
    assert members.succeed(URL).sources == ("file:x",)
    members.membership.note_list("file:x", [Listed(OTHER, Role.PD)])
    assert members.states.keys() == {OTHER}


def test_a_removed_instance_finishes_its_calls(members: Members) -> None:
    members.membership.note_list("file:x", [Listed(URL, Role.ENCODER)])
    instance = members.succeed(URL)
    with members.fleet.working(instance, 1):
        members.membership.note_list("file:x", [])
        assert members.states == {URL: "draining"}
    assert members.states == {}


def test_an_instance_stays_while_one_source_lists_it(members: Members) -> None:
    members.membership.note_list("file:x", [Listed(URL, Role.ENCODER)])
    members.membership.note_list("file:y", [Listed(URL, Role.ENCODER)])
    members.membership.note_list("file:x", [])
    assert members.succeed(URL).sources == ("file:y",)


def test_what_a_source_that_keeps_lists_no_more_stays_until_it_is_unhealthy(members: Members) -> None:
    def look_up(*urls: str) -> None:
        members.membership.note_list("dns:x:1", [Listed(url, Role.PD) for url in urls], keeps=True)

    look_up(URL, OTHER)
    one, other = members.succeed(URL), members.succeed(OTHER)
    look_up()
    assert members.states == {URL: "healthy", OTHER: "healthy"}
    look_up(OTHER)
    for instance in (one, other):
        members.fleet.fail(instance, "gone", 0.0)
    members.membership.look(1.0)
    assert members.states == {OTHER: "unhealthy"}


def test_what_is_about_to_end_gets_no_new_work(members: Members) -> None:
    members.membership.note_list("k8s:x", [Listed(URL, Role.PD)])
    members.succeed(URL)
    members.membership.note_list("k8s:x", [Listed(URL, Role.PD, is_ending=True)])
    assert members.states == {URL: "draining"}
    assert members.fleet.choose(Role.PD) is None
    members.membership.note_list("k8s:x", [Listed(URL, Role.PD)])
    assert members.states == {URL: "healthy"}


def test_what_an_administrator_has_removed_stays_away_until_the_source_lists_it_anew(members: Members) -> None:
    listed = [Listed(URL, Role.PD)]
    members.membership.note_list("file:x", listed)
    assert members.membership.remove(URL) is not None
    assert members.membership.remove(URL) is None
    members.membership.note_list("file:x", listed)
    assert members.states == {}
    members.membership.note_list("file:x", [])
    members.membership.note_list("file:x", listed)
    assert members.states == {URL: "starting"}


def test_an_administrator_can_add_again_what_was_removed(members: Members) -> None:
    members.membership.note_list(OPTIONS, [Listed(URL, Role.PD)])
    members.membership.remove(URL)
    assert members.membership.add(URL, Role.PD).sources == ("options", "admin")
    with pytest.raises(ConflictError, match="already an instance"):
        members.membership.add(URL, Role.PD)


def test_an_instance_with_another_role_waits_until_the_one_at_its_url_is_gone(members: Members) -> None:
    members.membership.note_list("file:x", [Listed(URL, Role.ENCODER)])
    instance = members.succeed(URL)
    with members.fleet.working(instance, 1):
        members.membership.note_list("file:x", [])
        members.membership.note_list("file:x", [Listed(URL, Role.PD)])
        assert instance.state == InstanceState.DRAINING
    members.membership.look(1.0)
    replaced = members.fleet.get(URL)
    assert replaced is not None
    assert replaced.role is Role.PD


def test_an_instance_gets_another_role_when_its_source_says_so(members: Members) -> None:
    members.membership.note_list("file:x", [Listed(URL, Role.ENCODER), Listed(OTHER, Role.PD)])
    members.succeed(URL)
    members.membership.note_list("file:x", [Listed(URL, Role.PREFILL), Listed(OTHER, Role.DECODE)])
    assert {one.url: one.role for one in members.fleet.instances} == {URL: Role.PREFILL, OTHER: Role.DECODE}


def test_an_administrator_can_add_what_was_removed_with_another_role(members: Members) -> None:
    members.membership.note_list(OPTIONS, [Listed(URL, Role.PD)])
    members.membership.remove(URL)
    assert members.membership.add(URL, Role.ENCODER).role is Role.ENCODER


def test_what_does_not_go_with_the_fleet_is_added_when_the_others_are_gone(members: Members) -> None:
    members.membership.note_list("file:x", [Listed(URL, Role.PD)])
    members.membership.note_list("file:y", [Listed(OTHER, Role.PREFILL)])
    assert members.states.keys() == {URL}
    members.membership.note_list("file:x", [])
    assert members.states.keys() == {OTHER}


def test_a_fleet_takes_a_bounded_number_of_instances(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INSTANCES", 3)
    members.membership.note_list("file:x", [Listed(f"http://a:{port}", Role.PD) for port in range(1, 10)])
    assert len(members.fleet.instances) == 3
    with pytest.raises(ConflictError, match="which is the limit"):
        members.membership.renew(LEASE, 0.0)


def test_one_process_under_two_urls_counts_once(members: Members) -> None:
    members.membership.note_list(OPTIONS, [Listed(URL, Role.PD), Listed(OTHER, Role.PD)])
    members.succeed(URL, incarnation="first")
    twin = members.succeed(OTHER, incarnation="first")
    assert members.states == {URL: "healthy", OTHER: "mismatched"}
    assert twin.reason == f"it is the same process as {URL}; name it by one URL"
    members.membership.remove(URL)
    assert members.states == {OTHER: "healthy"}


# ---- leases ------------------------------------------------------------------------------------------------------------


def test_a_lease_adds_an_instance_with_its_load(members: Members) -> None:
    instance = members.join(replace(LEASE, load=Load(outstanding_seconds=2.5, free_bytes=7)))
    assert (instance.state, instance.role, instance.sources) == (InstanceState.HEALTHY, Role.ENCODER, ("lease",))
    described = instance.describe(0.0)
    assert described.load == Load(outstanding_seconds=2.5, free_bytes=7)


def test_a_lapsed_lease_is_unhealthy_and_a_renewed_one_healthy_again(members: Members) -> None:
    instance = members.join()
    members.look(0, 10)
    assert members.states == {URL: "healthy"}
    members.look(10.5, 11)
    assert members.states == {URL: "unhealthy"}
    assert instance.reason == "its lease has lapsed: it was not renewed for 10 s"
    members.membership.renew(LEASE, 11.0)
    assert members.states == {URL: "healthy"}


def test_a_lapsed_lease_is_forgotten_after_ten_minutes(members: Members) -> None:
    members.join()
    members.look(0, FORGET_SECONDS)
    assert members.states == {URL: "unhealthy"}
    members.look(FORGET_SECONDS, FORGET_SECONDS + 1)
    assert members.states == {}


def test_time_in_which_the_proxy_itself_stood_still_lets_no_lease_lapse(members: Members) -> None:
    members.join()
    members.look(0, 2)
    members.look(60, 61)
    assert members.states == {URL: "healthy"}
    members.look(61.5, 70)
    assert members.states == {URL: "unhealthy"}


def test_a_lapsed_lease_does_not_count_where_something_else_lists_the_instance(members: Members) -> None:
    members.membership.note_list(OPTIONS, [Listed(URL, Role.ENCODER)])
    instance = members.join()
    members.look(0, 20)
    assert (instance.state, instance.sources) == (InstanceState.HEALTHY, ("options", "lease"))


def test_an_instance_that_says_that_it_drains_gets_no_new_work_whatever_its_probes_say(members: Members) -> None:
    instance = members.join()
    members.membership.renew(replace(LEASE, status="draining"), 1.0)
    members.succeed(URL, incarnation="first")
    assert instance.state == InstanceState.DRAINING


def test_an_instance_that_leaves_is_removed_when_its_last_call_has_ended(members: Members) -> None:
    instance = members.join()
    with members.fleet.working(instance, 1):
        members.membership.release(URL)
        assert members.states == {URL: "draining"}
    assert members.states == {}


def test_a_lease_does_not_count_while_another_process_answers_at_its_url(members: Members) -> None:
    instance = members.join()
    members.succeed(URL, incarnation="second")
    members.membership.look(1.0)
    assert members.states == {URL: "unhealthy"}
    assert instance.reason == "another process than the one that joined answers at its URL"
    members.membership.renew(replace(LEASE, incarnation="second"), 2.0)
    assert members.states == {URL: "healthy"}


def test_a_lease_for_the_url_of_an_instance_with_another_role_is_refused(members: Members) -> None:
    members.join()
    with pytest.raises(ConflictError, match="its role is encoder"):
        members.membership.renew(replace(LEASE, role="pd"), 1.0)


def test_a_process_that_takes_the_place_of_a_killed_one_may_have_another_role(members: Members) -> None:
    members.join()
    assert members.join(replace(LEASE, role="pd", incarnation="second"), 1.0).role is Role.PD
    assert members.states == {URL: "healthy"}


def test_a_lease_of_a_role_that_does_not_go_with_the_fleet_is_refused(members: Members) -> None:
    members.membership.note_list(OPTIONS, [Listed(OTHER, Role.PD)])
    with pytest.raises(ConflictError, match="can't be combined with prefill instances"):
        members.membership.renew(replace(LEASE, role="prefill"), 0.0)
    assert members.membership.lease_of(URL) is None


@pytest.mark.parametrize(
    "come", [lambda one: one.renew(LEASE, 0.0), lambda one: one.add(URL, Role.ENCODER)], ids=["lease", "administrator"]
)
def test_what_a_source_before_lists_with_a_role_that_does_not_go_with_the_fleet_is_refused(
    members: Members, come: Callable[[Membership], Instance]
) -> None:
    members.membership.note_list(OPTIONS, [Listed(OTHER, Role.PREFILL), Listed(URL, Role.PD)])
    with pytest.raises(ConflictError, match=r"another source lists comes first: .*can't be combined with pd instances"):
        come(members.membership)
    members.membership.note_list(OPTIONS, [Listed(OTHER, Role.PREFILL)])
    assert members.states.keys() == {OTHER}
    assert come(members.membership).role is Role.ENCODER


def test_an_instance_that_an_administrator_has_removed_joins_again_only_after_a_restart(members: Members) -> None:
    members.join()
    members.membership.remove(URL)
    with pytest.raises(ConflictError, match="An administrator has removed"):
        members.membership.renew(LEASE, 1.0)
    assert members.join(replace(LEASE, incarnation="second"), 2.0).state is InstanceState.HEALTHY


def test_an_instance_that_is_being_removed_can_join_again(members: Members) -> None:
    instance = members.join()
    with members.fleet.working(instance, 1):
        members.membership.release(URL)
        members.succeed(URL, incarnation="second")
        members.membership.renew(replace(LEASE, incarnation="second"), 1.0)
        assert members.states == {URL: "healthy"}
    assert members.states == {URL: "healthy"}


# ---- another worker ----------------------------------------------------------------------------------------------------


def test_a_membership_that_takes_over_what_another_one_knows_goes_on_as_that_would(members: Members) -> None:
    added, removed = "http://10.0.0.7:8001", "http://10.0.0.8:8001"
    listed = [Listed(removed, Role.PD)]
    members.membership.note_list("file:x", listed)
    members.membership.remove(removed)
    members.membership.add(added, Role.PD)
    members.join(now=1.0)
    members.join(replace(LEASE, url=OTHER), now=4.0)
    members.membership.remove(OTHER)

    other = Members()
    other.membership.take_over(members.membership.members(now=6.0), now=100.0)
    other.membership.note_list("file:x", listed)
    assert other.states.keys() == {URL, added}
    with pytest.raises(ConflictError, match="An administrator has removed"):
        other.membership.renew(replace(LEASE, url=OTHER), 100.0)
    other.succeed(URL, incarnation=LEASE.incarnation)
    other.look(100, 105)
    assert other.states[URL] == "healthy"
    other.look(105.5, 106)
    assert other.states[URL] == "unhealthy"


# ---- everything at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_fleet_becomes_what_is_said_of_it_in_any_order_of_events(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INSTANCES", 4)
    chance, members, calls, now = random.Random(seed), Members(), list[Instance](), 0.0
    fleet, membership, watched = members.fleet, members.membership, set[Instance]()
    fleet.on_add, fleet.on_remove = watched.add, watched.remove
    urls = [f"http://10.0.0.{number}:8001" for number in range(6)]
    for _ in range(400):
        url, role, now = chance.choice(urls), chance.choice([*Role]), now + chance.choice([0.0, 0.5, 3.0])
        instance = fleet.get(url)
        with contextlib.suppress(ConflictError):
            match chance.choice(["list", "add", "remove", "renew", "release", "look", "call", "end", "answer", "fail"]):
                case "list":
                    source, listed = chance.choice([OPTIONS, "file:x", "dns:x:1"]), chance.sample(urls, 3)
                    found = [Listed(one, chance.choice([*Role]), chance.random() < 0.2) for one in listed]
                    membership.note_list(source, found, keeps=source == "dns:x:1")
                case "add":
                    membership.add(url, role)
                case "remove":
                    membership.remove(url)
                case "renew":
                    membership.renew(Lease(url=url, role=role, incarnation=chance.choice("ab")), now)
                case "release":
                    membership.release(url)
                case "look":
                    membership.look(now)
                case "call" if instance is not None:
                    fleet.begin(instance, 1.0)
                    calls.append(instance)
                case "end" if calls:
                    fleet.end(calls.pop(0), 1.0)
                case "answer" if instance is not None:
                    members.succeed(url, incarnation=chance.choice("ab"))
                case "fail" if instance is not None:
                    fleet.fail(instance, "gone", now, says_draining=chance.random() < 0.3)
        assert watched == set(fleet.instances)
    for instance in calls:
        fleet.end(instance, 1.0)
    for _ in range(2):  # what made way for others is gone, and they are added
        membership.look(now)
    wanted = membership._wanted()
    assert all(one.role is wanted[one.url].role and not one.draining for one in fleet.instances)
    assert all(membership._refusal(url, wanted[url].role) for url in wanted if fleet.get(url) is None)
