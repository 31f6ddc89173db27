"""The arena against a model, and in the presence of readers that have locked parts of it."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chiasm.transfer.arena import ALIGNMENT, Arena, Piece
from chiasm.transfer.memory_file import MemoryFile

PAGES = 32


def lock(descriptor: int, kind: int, begin: int, size: int) -> None:
    """What a reader does, with a descriptor of its own."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", kind, 0, begin, size, 0))


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(PAGES * ALIGNMENT, "chiasm-test")
    yield arena
    arena.close()


@pytest.fixture
def reader(arena: Arena) -> Iterator[int]:
    descriptor = os.open(f"/proc/self/fd/{arena.file.descriptor}", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def allocate(arena: Arena, pages: int) -> Piece:
    piece = arena.allocate(pages * ALIGNMENT)
    assert piece is not None
    return piece


class ArenaAgainstModel(RuleBasedStateMachine):
    """The model is a list of the pages, each free, of a piece, or locked by a reader."""

    @initialize()
    def start(self) -> None:
        self.arena = Arena(PAGES * ALIGNMENT, "chiasm-test")
        self.reader = os.open(f"/proc/self/fd/{self.arena.file.descriptor}", os.O_RDONLY)
        self.pieces: dict[Piece, int] = {}
        self.locks: dict[int, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            os.close(self.reader)
            self.arena.close()

    def pages_of(self, piece: Piece) -> range:
        begin = piece.offset // ALIGNMENT
        return range(begin, begin + piece.size_bytes // ALIGNMENT)

    def taken(self) -> set[int]:
        return {page for piece in self.pieces for page in self.pages_of(piece)} | self.locked()

    def locked(self) -> set[int]:
        return {page for begin, size in self.locks.items() for page in range(begin, begin + size)}

    def first_fit(self, size: int) -> int | None:
        taken = self.taken()
        fits = (begin for begin in range(PAGES - size + 1) if taken.isdisjoint(range(begin, begin + size)))
        return next(fits, None)

    @rule(num_bytes=st.integers(1, 20 * ALIGNMENT))
    def allocate(self, num_bytes: int) -> None:
        expected = self.first_fit(-(-num_bytes // ALIGNMENT))
        piece = self.arena.allocate(num_bytes)
        assert (piece and piece.offset) == (None if expected is None else expected * ALIGNMENT)
        if piece is not None:
            piece.publish()
            piece.buffer[:] = bytes([len(self.pieces) % 256]) * num_bytes
            self.pieces[piece] = 1

    @rule(sizes=st.lists(st.integers(1, 12 * ALIGNMENT), min_size=1, max_size=4))
    def allocate_all_or_nothing(self, sizes: list[int]) -> None:
        before = self.arena.used_bytes
        pieces = self.arena.allocate_all(sizes)
        if pieces is None:
            assert self.arena.used_bytes == before
        for piece in pieces or []:
            piece.publish()
            assert self.taken().isdisjoint(self.pages_of(piece))
            self.pieces[piece] = 1

    @precondition(lambda self: self.pieces)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        piece = data.draw(st.sampled_from(list(self.pieces)))
        piece.hold()
        self.pieces[piece] += 1

    @precondition(lambda self: self.pieces)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        piece = data.draw(st.sampled_from(list(self.pieces)))
        piece.release()
        self.pieces[piece] -= 1
        if not self.pieces[piece]:
            del self.pieces[piece]

    @precondition(lambda self: self.pieces and not self.locks)
    @rule(data=st.data())
    def a_reader_keeps_what_is_released(self, data: st.DataObject) -> None:
        piece = data.draw(st.sampled_from(list(self.pieces)))
        lock(self.reader, fcntl.F_RDLCK, piece.offset, piece.num_bytes)
        for _ in range(self.pieces.pop(piece)):
            piece.release()
        self.locks[piece.offset // ALIGNMENT] = piece.size_bytes // ALIGNMENT

    @precondition(lambda self: self.locks)
    @rule()
    def the_reader_lets_go(self) -> None:
        for begin, size in self.locks.items():
            lock(self.reader, fcntl.F_UNLCK, begin * ALIGNMENT, size * ALIGNMENT)
        self.locks.clear()

    @invariant()
    def what_is_used_is_counted(self) -> None:
        if hasattr(self, "arena"):
            assert self.arena.used_bytes == sum(piece.size_bytes for piece in self.pieces)


TestArenaAgainstModel: Any = ArenaAgainstModel.TestCase
TestArenaAgainstModel.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_piece_may_take_the_whole_arena_and_one_byte_more_never_fits(arena: Arena) -> None:
    piece = allocate(arena, PAGES)
    assert arena.allocate(1) is None
    piece.release()
    assert arena.allocate(PAGES * ALIGNMENT + 1) is None
    assert allocate(arena, PAGES).offset == 0


def test_what_was_freed_last_at_the_low_end_is_used_again(arena: Arena) -> None:
    """So memory stays as it is, however many pieces come and go."""
    blocks: list[int] = []
    for _ in range(1000):
        pieces = [allocate(arena, 3), allocate(arena, 2)]
        assert [piece.offset for piece in pieces] == [0, 3 * ALIGNMENT]
        for piece in pieces:
            piece.buffer[:] = bytes(piece.num_bytes)
            piece.release()
        blocks.append(os.fstat(arena.file.descriptor).st_blocks)
    assert len(set(blocks)) == 1


def test_nobody_can_lock_what_is_being_written(arena: Arena, reader: int) -> None:
    piece = allocate(arena, 2)
    with pytest.raises(BlockingIOError):
        lock(reader, fcntl.F_RDLCK, piece.offset, 1)
    piece.publish()
    lock(reader, fcntl.F_RDLCK, piece.offset, piece.num_bytes)


def test_what_a_reader_has_locked_is_not_used_again_until_it_is_let_go(arena: Arena, reader: int) -> None:
    first, second = allocate(arena, 4), allocate(arena, 4)
    for piece in (first, second):
        piece.publish()
    lock(reader, fcntl.F_RDLCK, first.offset + ALIGNMENT, 10)  # one page of it
    first.release()
    second.release()
    assert allocate(arena, 1).offset == 0
    assert allocate(arena, 3).offset == 2 * ALIGNMENT
    lock(reader, fcntl.F_UNLCK, 0, 0)
    assert allocate(arena, 1).offset == ALIGNMENT


def test_the_locks_of_a_reader_end_with_its_descriptor(arena: Arena) -> None:
    piece = allocate(arena, PAGES)
    piece.publish()
    reader = os.open(f"/proc/self/fd/{arena.file.descriptor}", os.O_RDONLY)
    lock(reader, fcntl.F_RDLCK, 0, 0)  # to the end of the file
    piece.release()
    assert arena.allocate(1) is None
    os.close(reader)
    assert arena.allocate(1) is not None


def test_a_piece_can_be_released_by_a_finalizer_inside_the_arena(arena: Arena) -> None:
    """The garbage collector may run one while the thread is in the arena, which then must not wait for itself."""

    class Tensor:
        pass

    tensor, piece = Tensor(), allocate(arena, PAGES)
    weakref.finalize(tensor, piece.release)
    with arena._lock:
        del tensor
    assert arena.used_bytes == 0


def test_every_release_is_told() -> None:
    told: list[bool] = []
    arena = Arena(ALIGNMENT, "chiasm-test", released=lambda: told.append(True))
    piece = allocate(arena, 1)
    piece.hold()
    piece.release()
    piece.release()
    assert len(told) == 2
    arena.close()


def has_memory_in_single_pages() -> bool:
    """Whether the first byte of a memory file takes one page. The system may be set to give it large ones."""
    file = MemoryFile(64 * ALIGNMENT, "chiasm-test")
    before = os.fstat(file.descriptor).st_blocks
    file.buffer[0] = 1
    grown = os.fstat(file.descriptor).st_blocks - before
    file.close()
    return grown * 512 == ALIGNMENT


def touched_bytes(arena: Arena) -> int:
    """How much of the file has memory, once no thread touches pages any more."""
    for thread in threading.enumerate():
        if thread.name == "chiasm-warm":
            thread.join()
    return os.fstat(arena.file.descriptor).st_blocks * 512


@pytest.mark.skipif(not has_memory_in_single_pages(), reason="memory files have large pages here")
def test_pages_are_touched_ahead_of_their_use_and_no_more_of_them() -> None:
    token = ALIGNMENT  # behind the pieces
    arena = Arena(64 * ALIGNMENT, "chiasm-test", warm_bytes=16 * ALIGNMENT)
    assert touched_bytes(arena) == 16 * ALIGNMENT + token
    first = allocate(arena, 10)
    assert touched_bytes(arena) == 26 * ALIGNMENT + token
    first.release()
    allocate(arena, 10)
    assert touched_bytes(arena) == 26 * ALIGNMENT + token
    allocate(arena, 50)
    assert touched_bytes(arena) == 64 * ALIGNMENT + token
    arena.close()


def test_a_closed_arena_keeps_what_is_in_it(arena: Arena) -> None:
    piece = allocate(arena, 1)
    piece.buffer[:5] = b"bytes"
    arena.close()
    assert bytes(piece.buffer[:5]) == b"bytes"
    piece.release()
    assert arena.used_bytes == 0
