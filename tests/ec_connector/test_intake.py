"""What is wanted comes into bounded memory in one order, wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chiasm.ec_transfer.intake import Intake, Stage, Wanted


def intake(max_bytes: int = 2, max_count: int = 9) -> Intake[Wanted[str], str]:
    return Intake(Wanted, lambda wanted: None, max_bytes=max_bytes, max_count=max_count)


def bring(entries: Intake[Wanted[str], str], num_bytes: int = 1) -> list[str]:
    """Bring in all that waits and finds room, and return it."""
    brought = []
    for wanted in entries.in_order(Stage.WAITING):
        if entries.reserve(wanted, num_bytes):
            entries.come(wanted, num_bytes)
            entries.arrive(wanted, wanted.identifier)
            brought.append(wanted.identifier)
    return brought


def test_what_the_oldest_request_wants_comes_first() -> None:
    entries = intake()
    for number, name in enumerate("abc"):
        entries.want(str(number), name, 4, is_needed=True)
    assert bring(entries) == ["a", "b"]
    entries.finish("0", ["a"])
    assert bring(entries) == ["c"]


def test_what_was_asked_for_last_takes_the_room_of_what_was_not() -> None:
    entries = intake()
    for name in "abc":
        entries.want("request", name, 4, is_needed=True)
    assert bring(entries) == ["a", "b"]
    assert not entries.ask("c")
    assert bring(entries) == ["c"]
    assert [entries.ready(name) for name in "abc"] == ["a", None, "c"]


def test_what_is_needed_first_stays_although_what_is_needed_later_is_missing() -> None:
    entries = intake(max_count=1)
    for name in "ab":
        entries.want("request", name, 4, is_needed=True)
    assert bring(entries) == ["a"]
    for _ in range(2):
        assert [entries.ask(name) for name in "ab"] == [True, False]
        entries.end_round()
        assert bring(entries) == []


def test_what_is_asked_for_twice_in_a_round_keeps_its_first_place() -> None:
    entries = intake(max_count=1)
    for name in "abc":
        entries.want("request", name, 4, is_needed=True)
    for name in "cabc":
        entries.ask(name)
    assert [wanted.identifier for wanted in entries.in_order(Stage.WAITING)] == ["c", "a", "b"]


def test_what_the_engine_was_told_to_be_ready_stays_until_its_round_ends() -> None:
    entries = intake(max_count=1)
    for name in "ab":
        entries.want("request", name, 4, is_needed=True)
    assert bring(entries) == ["a"]
    assert not entries.ask("b")
    assert entries.ask("a")
    assert bring(entries) == []
    entries.end_round()
    assert bring(entries) == ["b"]


def test_what_is_taken_comes_again_when_it_is_asked_for_and_not_before() -> None:
    entries = intake()
    entries.want("one", "a", 4, is_needed=True)
    bring(entries)
    assert entries.take("a") == "a"
    entries.want("two", "a", 4, is_needed=True)
    assert bring(entries) == []
    assert not entries.ask("a")
    assert bring(entries) == ["a"]


def test_one_that_is_larger_than_the_memory_comes_when_it_is_alone() -> None:
    entries = intake(max_bytes=2)
    for name in "ab":
        entries.want("request", name, 4, is_needed=True)
    assert bring(entries, num_bytes=3) == ["a"]
    entries.take("a")
    assert bring(entries, num_bytes=3) == ["b"]


def visits_of_planning(waiting: int) -> int:
    """How often an entry is looked at to give room to each of so many that wait, in order."""
    visits = 0

    class Entries(Intake[Wanted[str], str]):
        def __iter__(self) -> Iterator[Wanted[str]]:
            nonlocal visits
            for wanted in super().__iter__():
                visits += 1
                yield wanted

    entries = Entries(Wanted, lambda wanted: None, max_bytes=waiting)
    for number in range(waiting):
        entries.want(str(number), str(number), 4, is_needed=True)
    assert all(entries.reserve(wanted, 1) for wanted in entries.in_order(Stage.WAITING))
    return visits


def test_room_for_all_that_waits_is_planned_in_one_pass() -> None:
    assert visits_of_planning(256) == 256


SIZES = {"a": 1, "b": 2, "c": 3, "d": 2}
MAX_BYTES, MAX_COUNT = 4, 2


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: memory is bounded, promises are kept, and what is asked for first comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = intake(MAX_BYTES, MAX_COUNT)
        self.promised: set[str] = set()

    @rule(request=st.sampled_from("xyz"), name=st.sampled_from("abcd"), is_needed=st.booleans())
    def want(self, request: str, name: str, is_needed: bool) -> None:
        self.entries.want(request, name, 4, is_needed=is_needed)

    @rule(request=st.sampled_from("xyz"), names=st.sets(st.sampled_from("abcd")))
    def finish(self, request: str, names: set[str]) -> None:
        self.promised -= {wanted.identifier for wanted in self.entries.finish(request, names)}

    @rule(name=st.sampled_from("abcd"))
    def ask(self, name: str) -> None:
        if self.entries.ask(name):
            self.promised.add(name)

    @rule(name=st.sampled_from("abcd"))
    def take(self, name: str) -> None:
        self.entries.take(name)
        self.promised.discard(name)

    @rule()
    def end_round(self) -> None:
        self.entries.end_round()
        self.promised.clear()

    @rule()
    def begin(self) -> None:
        for wanted in self.entries.in_order(Stage.WAITING):
            if self.entries.reserve(wanted, SIZES[wanted.identifier]):
                self.entries.come(wanted, SIZES[wanted.identifier])

    @rule(succeeds=st.booleans())
    def end_first(self, succeeds: bool) -> None:
        for wanted in self.entries.in_order(Stage.COMING)[:1]:
            if succeeds:
                self.entries.arrive(wanted, wanted.identifier)
            else:
                self.entries.fail(wanted)

    @invariant()
    def memory_is_bounded(self) -> None:
        held = [wanted for wanted in self.entries if wanted.held_bytes]
        assert len(held) <= MAX_COUNT
        assert self.entries.held_bytes == sum(wanted.held_bytes for wanted in held) <= MAX_BYTES

    @invariant()
    def promises_are_kept(self) -> None:
        assert all(self.entries.ready(name) == name for name in self.promised)

    def teardown(self) -> None:
        """Whatever else is wanted, what is asked for comes, one after another."""
        for name in [wanted.identifier for wanted in self.entries]:
            self.entries.end_round()
            for wanted in self.entries.in_order(Stage.COMING):
                self.entries.arrive(wanted, wanted.identifier)
            if not self.entries.ask(name) and self.entries.get(name) is not None:
                self.begin()
                for wanted in self.entries.in_order(Stage.COMING):
                    self.entries.arrive(wanted, wanted.identifier)
                assert self.entries.ready(name) == name


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
