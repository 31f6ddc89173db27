"""What a holder offers, and to whom, without sockets."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chiasm.ec_transfer.entry_file import EntryHeader
from chiasm.ec_transfer.offers import NoRoom, OfferTable, TooManyWanted
from chiasm.ec_transfer.peer_messages import MAX_WANTED, Gone, Here

from .instance import identifier_of

A, B = 1, 2
ROOM = 10


class Memory:
    """Memory of which only the size counts."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = self.free_bytes = num_bytes
        self.pieces: dict[int, int] = {}
        self.used: set[int] = set()
        self._numbers = iter(range(1 << 30))

    def allocate(self, num_bytes: int) -> int | None:
        if num_bytes > self.free_bytes:
            return None
        self.free_bytes -= num_bytes
        number = next(self._numbers)
        self.pieces[number] = num_bytes
        return number

    def free(self, piece: int) -> None:
        self.free_bytes += self.pieces.pop(piece)

    def table(self) -> OfferTable[int]:
        return OfferTable(self.num_bytes, self.allocate, self.range_of, self.free, self.used.__contains__)

    def range_of(self, piece: int) -> tuple[int, int]:
        return piece, piece + self.pieces[piece]


class Line(Memory):
    """Memory whose pieces are in one piece each: first fit."""

    def gaps(self, pieces: Iterable[int]) -> list[tuple[int, int]]:
        """Begin and size of what is beside these pieces."""
        begins = sorted([*pieces, self.num_bytes])
        ends = [0, *(begin + self.pieces[begin] for begin in begins[:-1])]
        return [(end, begin - end) for end, begin in zip(ends, begins, strict=True)]

    def allocate(self, num_bytes: int) -> int | None:
        begin = next((begin for begin, size in self.gaps(self.pieces) if size >= num_bytes), None)
        if begin is not None:
            self.pieces[begin] = num_bytes
        return begin

    def free(self, piece: int) -> None:
        del self.pieces[piece]


def header(name: str) -> EntryHeader:
    return EntryHeader(name, "5eed", "U8", (1,), "")


def publish(table: OfferTable[int], name: str, size: int = 1) -> None:
    if table.reserve(name, size) is not None:
        table.publish(name, header(name))


def told(table: OfferTable[int]) -> list[tuple[int, str, bool]]:
    """Reader, name and grant of each Here."""
    return [(reader, m.identifier, m.granted) for reader, m in table.take_notices() if isinstance(m, Here)]


def test_who_wants_an_entry_is_told_when_it_is_published() -> None:
    table = Memory(ROOM).table()
    table.want(A, "x", 0)
    assert told(table) == []
    publish(table, "x")
    assert told(table) == [(A, "x", False)]


def test_an_entry_that_fits_the_readers_room_is_granted_at_once() -> None:
    table = Memory(ROOM).table()
    publish(table, "x", 4)
    table.want(A, "x", 4)
    table.want(B, "x", 3)
    assert told(table) == [(A, "x", True), (B, "x", False)]


def test_the_least_recently_used_entry_goes_first_and_who_knows_of_it_is_told() -> None:
    table = Memory(2).table()
    publish(table, "x")
    publish(table, "y")
    table.want(A, "x", 0)  # which counts as use
    table.want(B, "y", 0)
    assert table.has("x")
    table.take_notices()
    publish(table, "z")
    assert [notice for notice in table.take_notices() if isinstance(notice.message, Gone)] == [(B, Gone("y"))]
    table.grant(B, "y")
    assert table.take_notices() == [(B, Gone("y"))]


def test_what_is_granted_stays_until_it_is_given_back() -> None:
    table = Memory(1).table()
    publish(table, "x")
    table.want(A, "x", 1)
    with pytest.raises(NoRoom):
        table.reserve("y", 1)
    table.forget(A, "x")
    assert table.reserve("y", 1) is not None


def test_what_a_reader_uses_in_place_isnt_evicted() -> None:
    memory = Memory(2)
    table = memory.table()
    publish(table, "x")
    publish(table, "y")
    memory.used.update(memory.pieces)
    with pytest.raises(NoRoom):
        table.reserve("z", 1)
    assert table.has("x")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_entry_finds_room_in_one_piece_exactly_if_what_is_idle_takes_it(data: st.DataObject) -> None:
    memory = Line(40)
    table = memory.table()
    for number in range(data.draw(st.integers(1, 40))):
        size = data.draw(st.sampled_from([1, 1, 1, 2, 5, 9]))
        memory.used.clear()
        if memory.pieces:
            memory.used.update(data.draw(st.sets(st.sampled_from(sorted(memory.pieces)), max_size=4)))
        fits = any(gap >= size for _, gap in memory.gaps(memory.used))
        taken = sum(memory.pieces.values())
        try:
            publish(table, str(number), size)
        except NoRoom:
            assert not fits
            assert taken - sum(memory.pieces.values()) < size + 9  # and most of what is there stays
        else:
            assert fits
        assert memory.used <= set(memory.pieces)
        for name in data.draw(st.lists(st.integers(0, number), max_size=3)):
            table.has(str(name))


def test_what_readers_use_in_place_is_not_looked_at_again_for_each_new_entry() -> None:
    memory = Memory(200)
    looked_at = []
    table = OfferTable(
        memory.num_bytes,
        memory.allocate,
        memory.range_of,
        memory.free,
        lambda piece: looked_at.append(piece) or piece in memory.used,  # type: ignore[func-returns-value]
    )
    for number in range(200):
        publish(table, f"old{number}")
    memory.used.update(range(100))  # the least recently used
    for number in range(100):
        publish(table, f"new{number}")
    assert len(looked_at) == 200


def test_a_reader_that_leaves_gives_everything_back() -> None:
    memory = Memory(1)
    table = memory.table()
    publish(table, "x")
    table.want(A, "x", 1)
    table.want(A, "y", 1)
    table.leave(A)
    assert not table.is_granted(A)
    assert table.reserve("z", 1) is not None


def test_what_was_rejected_is_offered_no_more_and_freed_when_nobody_reads_it() -> None:
    memory = Memory(1)
    table = memory.table()
    publish(table, "x")
    table.want(A, "x", 1)
    table.want(B, "x", 1)
    table.disown(A, "x")
    assert not table.has("x")
    assert memory.free_bytes == 0
    table.forget(B, "x")
    assert memory.free_bytes == 1


def test_what_was_rejected_stays_for_who_reads_it_and_asks_for_it_again() -> None:
    memory = Memory(1)
    table = memory.table()
    publish(table, "x")
    table.want(B, "x", 1)
    table.disown(A, "x")
    table.grant(B, "x")
    assert memory.free_bytes == 0
    table.forget(B, "x")
    assert memory.free_bytes == 1


def test_what_was_rejected_is_freed_with_its_reader_also_if_the_reader_was_told_of_another_one() -> None:
    memory = Memory(2)
    table = memory.table()
    publish(table, "x")
    table.want(B, "x", 1)
    table.disown(A, "x")
    publish(table, "x")
    table.want(B, "x", 0)
    table.remove("x")
    table.leave(B)
    assert memory.free_bytes == 2


def test_whether_a_reader_reads_anything_follows_its_grants() -> None:
    table = Memory(ROOM).table()
    publish(table, "x")
    table.want(A, "x", 1)
    table.want(A, "x", 1)
    assert table.is_granted(A)
    assert not table.is_granted(B)
    table.forget(A, "x")
    assert not table.is_granted(A)
    table.want(A, "x", 1)
    table.leave(A)
    assert not table.is_granted(A)


def test_a_reader_may_not_want_without_bound() -> None:
    table = Memory(1).table()
    for number in range(MAX_WANTED):
        table.want(A, str(number), 0)
    with pytest.raises(TooManyWanted):
        table.want(A, "one more", 0)


NAMES = st.sampled_from([identifier_of(number) for number in range(5)])
READERS = st.sampled_from([A, B])


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, memory is bounded, what is granted stays, and nothing is left over."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(ROOM)
        self.table = self.memory.table()
        self.granted: dict[tuple[int, str], int] = {}
        """The piece of each grant."""
        self.writing: list[str] = []

    @rule(name=NAMES, size=st.integers(1, 6))
    def reserve(self, name: str, size: int) -> None:
        try:
            if self.table.reserve(name, size) is not None:
                self.writing.append(name)
        except NoRoom:
            pass

    @precondition(lambda self: self.writing)
    @rule(succeeds=st.booleans())
    def finish_writing(self, succeeds: bool) -> None:
        name = self.writing.pop(0)
        if succeeds:
            self.table.publish(name, header(name))
        else:
            self.table.abandon(name)

    @rule(reader=READERS, name=NAMES, room=st.integers(0, 6))
    def want(self, reader: int, name: str, room: int) -> None:
        self.table.want(reader, name, room)

    @rule(reader=READERS, name=NAMES)
    def take(self, reader: int, name: str) -> None:
        self.table.grant(reader, name)

    @rule(reader=READERS, name=NAMES, bad=st.booleans())
    def forget(self, reader: int, name: str, bad: bool) -> None:
        self.granted.pop((reader, name), None)
        if bad:
            self.table.disown(reader, name)
        else:
            self.table.forget(reader, name)

    @rule(reader=READERS)
    def leave(self, reader: int) -> None:
        self.granted = {key: piece for key, piece in self.granted.items() if key[0] != reader}
        self.table.leave(reader)

    @invariant()
    def what_is_granted_stays(self) -> None:
        for reader, message in self.table.take_notices():
            if isinstance(message, Here) and message.granted:
                self.granted[reader, message.identifier] = message.offset
        assert set(self.granted.values()) <= set(self.memory.pieces)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert 0 <= self.memory.free_bytes <= ROOM

    def teardown(self) -> None:
        for name in self.writing:
            self.table.abandon(name)
        for reader in (A, B):
            self.table.leave(reader)
        for number in range(5):
            self.table.remove(identifier_of(number))
        assert self.memory.free_bytes == ROOM
        assert len(self.table) == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
