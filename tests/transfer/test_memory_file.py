"""Memory that another process maps: only the right file, only if it is safe, and only what is offered."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from chiasm.errors import ConfigurationError
from chiasm.transfer import memory_file
from chiasm.transfer.arena import ALIGNMENT, Arena
from chiasm.transfer.errors import TransferError
from chiasm.transfer.memory import Memory, Peer
from chiasm.transfer.memory_file import MappedFile, MemoryFile
from chiasm.transfer.shared_memory import HeldRange, SharedMemory, SharedMemoryPlane

PEER = Peer("127.0.0.1", 1)


@pytest.fixture
def file() -> Iterator[MemoryFile]:
    file = MemoryFile(100_000, "chiasm-test")
    yield file
    file.close()


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(8 * ALIGNMENT, "chiasm-test")
    yield arena
    arena.close()


def reach(arena: Arena) -> SharedMemory:
    """The arena, as a reader that copies nothing reaches it."""
    plane = SharedMemoryPlane()
    return plane.reach(PEER, plane.offer(Memory.of_file(arena.file)).describe(1), Memory(0, 0))


def test_the_memory_is_zeroed_and_as_large_as_was_asked_for(file: MemoryFile) -> None:
    assert (len(file.buffer), file.buffer.readonly) == (100_000, False)
    assert not any(file.buffer)


def test_memory_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="Cannot create"):
        MemoryFile(1 << 62, "chiasm-test")


def test_a_mapped_file_shows_what_is_written_and_cannot_be_written(file: MemoryFile) -> None:
    mapped = MappedFile(file.description)
    file.buffer[99_990:] = b"0123456789"
    assert bytes(mapped.buffer[99_990:100_000]) == b"0123456789"
    assert mapped.buffer.readonly
    mapped.close()


def test_what_was_mapped_stays_when_the_file_is_closed(file: MemoryFile) -> None:
    mapped = MappedFile(file.description)
    file.buffer[:5] = b"bytes"
    part = mapped.buffer[:5]
    mapped.close()
    file.close()
    assert bytes(part) == b"bytes"
    with pytest.raises(TransferError):
        MappedFile(file.description)


def test_what_nobody_has_locked_is_freed_once_the_memory_is_offered_no_more(arena: Arena) -> None:
    arena.file.buffer[:] = b"x" * arena.num_bytes
    reached, other = reach(arena), reach(arena)
    first, last = reached.hold(ALIGNMENT, 1), other.hold(6 * ALIGNMENT - 1, ALIGNMENT)  # which is in two pages
    assert first is not None
    assert last is not None
    assert not reached.file.free_the_rest()
    assert bytes(arena.file.buffer) == b"x" * arena.num_bytes
    arena.file.offer_no_more()
    assert reached.file.free_the_rest()
    assert 512 * os.fstat(arena.file.descriptor).st_blocks == 4 * ALIGNMENT  # with the page of the token
    kept = [bytes(arena.file.buffer[page * ALIGNMENT :][:ALIGNMENT]) != bytes(ALIGNMENT) for page in range(8)]
    assert kept == [False, True, False, False, False, True, True, False]
    assert bytes(first.buffer) == b"x"
    assert bytes(last.buffer) == b"x" * ALIGNMENT
    for one in (first, last, reached, other):
        one.release() if isinstance(one, HeldRange) else one.close()


def test_the_file_cannot_be_truncated(file: MemoryFile) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(file.descriptor, 0)


@pytest.mark.parametrize(
    "change", [{"pid": 1 << 30}, {"descriptor": 1 << 20}, {"token": b"x" * 32}, {"size_bytes": 1 << 40}, {"pid": 1}]
)
def test_a_file_that_is_another_is_not_mapped(file: MemoryFile, change: dict[str, object]) -> None:
    """As would happen with a holder in another container, whose ids mean something else here."""
    with pytest.raises(TransferError, match="runs on another host, in another container or as another user"):
        MappedFile(msgspec.structs.replace(file.description, **change))


def test_a_file_of_another_host_is_not_mapped(
    file: MemoryFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(memory_file, "_BOOT_ID", tmp_path / "boot_id")
    with pytest.raises(TransferError, match="runs on another host"):
        MappedFile(file.description)


def test_a_file_that_could_be_truncated_is_not_mapped(file: MemoryFile) -> None:
    descriptor = os.memfd_create("chiasm-test")
    os.ftruncate(descriptor, file.description.size_bytes)
    os.pwrite(descriptor, file.description.token, file.description.size_bytes - 32)
    with pytest.raises(TransferError, match="not sealed"):
        MappedFile(msgspec.structs.replace(file.description, descriptor=descriptor))
    os.close(descriptor)


@pytest.mark.parametrize(
    "change", [{"offset_bytes": 1 << 30}, {"offset_bytes": -1}, {"offset_bytes": "0"}, {"num_bytes": 1 << 40}]
)
def test_bytes_outside_the_memory_are_not_offered(arena: Arena, change: dict[str, object]) -> None:
    description = SharedMemoryPlane().offer(Memory.of_file(arena.file)).describe(1)
    changed = msgspec.msgpack.encode(msgspec.msgpack.decode(description) | change)
    with pytest.raises(TransferError, match=r"outside its memory|not understood"):
        SharedMemoryPlane().reach(PEER, changed, Memory(0, 0))


def test_a_held_range_is_the_holders_bytes_and_keeps_them(arena: Arena) -> None:
    reached = reach(arena)
    piece = arena.allocate(8 * ALIGNMENT)
    assert piece is not None
    assert reached.hold(piece.offset, piece.num_bytes) is None  # it is being written
    piece.buffer[:] = b"\5" * piece.num_bytes
    piece.publish()
    held, again = reached.hold(piece.offset, piece.num_bytes), reached.hold(piece.offset, piece.num_bytes)
    assert held is not None
    assert again is not None
    reached.close()
    piece.release()
    assert arena.allocate(1) is None
    assert np.all(np.frombuffer(held.buffer, np.uint8) == 5)
    assert held.buffer.readonly
    held.release()
    held.release()
    assert arena.allocate(1) is None
    again.release()
    assert arena.allocate(1) is not None


def test_a_range_that_is_not_in_the_memory_is_not_held(arena: Arena) -> None:
    reached = reach(arena)
    for offset, size in ((-1, 5), (0, 8 * ALIGNMENT + 1), (1 << 62, 1), (0, -1)):
        with pytest.raises(TransferError):
            reached.hold(offset, size)
    reached.close()


def test_a_reader_that_is_killed_holds_nothing(arena: Arena) -> None:
    piece = arena.allocate(8 * ALIGNMENT)
    assert piece is not None
    piece.publish()
    description = SharedMemoryPlane().offer(Memory.of_file(arena.file)).describe(1)
    code = (
        "import sys\n"
        "from chiasm.transfer.memory import Memory, Peer\n"
        "from chiasm.transfer.shared_memory import SharedMemoryPlane\n"
        "reached = SharedMemoryPlane().reach(Peer('', 0), sys.stdin.buffer.read(int(sys.argv[1])), Memory(0, 0))\n"
        "held = reached.hold(0, len(reached.file.buffer))\n"
        "print(held is not None, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(len(description))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(description)
        reader.stdin.flush()
        assert reader.stdout.readline() == b"True\n"
        piece.release()
        assert arena.allocate(1) is None
        reader.kill()
        reader.wait()
    assert arena.allocate(1) is not None


def test_nothing_stays_mapped_after_the_end() -> None:
    def num_maps() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:chiasm-gone" in line for line in maps)

    arena = Arena(8 * ALIGNMENT, "chiasm-gone")
    reached = reach(arena)
    assert num_maps() == 2
    reached.close()
    arena.close()
    del arena, reached
    gc.collect()
    assert num_maps() == 0
