"""The folder stays within its limit, evicts the least recently used entry, and loses only the new entry if a disk fails."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import ECTransferRole
from chiasm.ec_transfer.bounded_folder import BoundedFolder
from chiasm.errors import Code, StorageError

from .instance import Instance, config_for, embedding_of, entry_path, identifier_of

DATA_BYTES = embedding_of("a").nbytes
ENTRY_BYTES = 4096 + DATA_BYTES


def room_for(folder: Path, entries: int, role: ECTransferRole = ECTransferRole.BOTH) -> Instance:
    return Instance(config_for(folder, role, max_bytes=entries * ENTRY_BYTES))


def entries_in(folder: Path, names: str) -> str:
    return "".join(name for name in names if entry_path(folder, identifier_of(name)).exists())


def unfinished_in(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def counted_bytes(folder: Path) -> int:
    return int((folder / ".usage").read_text())


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def not_used_for(folder: Path, name: str, seconds: int) -> None:
    path = entry_path(folder, identifier_of(name))
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns - seconds * 10**9, status.st_mtime_ns))


# ---- the limit -----------------------------------------------------------------------------------------------------


def test_the_oldest_entries_are_evicted(folder: Path) -> None:
    instance = room_for(folder, 3)
    for name in "abcde":
        instance.encode(name)
    assert entries_in(folder, "abcde") == "cde"
    assert (instance.worker.stats.evictions, instance.worker.stats.evicted_bytes) == (2, 2 * ENTRY_BYTES)
    assert counted_bytes(folder) == stored_bytes(folder) == 3 * ENTRY_BYTES


def test_the_limit_holds_over_many_saves(folder: Path) -> None:
    instance = room_for(folder, 5)
    for name in range(60):
        instance.encode(name, embedding_of(name, rows=1 + name % 7))
        assert stored_bytes(folder) <= instance.worker.config.max_bytes
    assert counted_bytes(folder) == stored_bytes(folder)
    assert stored_bytes(folder) > instance.worker.config.max_bytes - 2 * ENTRY_BYTES


@pytest.mark.parametrize("use", ["find", "load"])
def test_an_entry_that_was_used_is_kept_and_one_that_was_not_is_evicted(folder: Path, use: str) -> None:
    instance = room_for(folder, 3)
    for age, name in [(30, "a"), (20, "b"), (10, "c")]:
        instance.encode(name)
        not_used_for(folder, name, age)
    another = room_for(folder, 3, ECTransferRole.CONSUMER)
    if use == "find":
        assert another.scheduler.has_cache_item(identifier_of("a"))
    else:
        assert another.load(identifier_of("a")) is not None
    instance.encode("d")
    assert entries_in(folder, "abcd") == "acd"


def test_saving_an_entry_that_exists_counts_as_use(folder: Path) -> None:
    instance = room_for(folder, 2)
    for age, name in [(20, "a"), (10, "b")]:
        instance.encode(name)
        not_used_for(folder, name, age)
    instance.encode("a")
    instance.encode("c")
    assert entries_in(folder, "abc") == "ac"


def test_a_use_after_the_last_scan_counts(folder: Path) -> None:
    instance = room_for(folder, 4)
    for age, name in [(40, "a"), (30, "b"), (20, "c"), (10, "d")]:
        instance.encode(name)
        not_used_for(folder, name, age)
    instance.encode("e")  # scans the folder and evicts a; b, c and d are next
    assert instance.load(identifier_of("b")) is not None
    instance.encode("f")
    assert entries_in(folder, "abcdef") == "bdef"


def test_the_limit_includes_the_entries_of_other_writers(folder: Path) -> None:
    one, other = room_for(folder, 3), room_for(folder, 3)
    for name in range(12):
        (one, other)[name % 2].encode(name)
    assert stored_bytes(folder) == counted_bytes(folder) == 3 * ENTRY_BYTES
    assert one.worker.stats.evictions + other.worker.stats.evictions == 9


def test_a_folder_above_its_limit_is_reduced_at_start(folder: Path) -> None:
    large = room_for(folder, 4)
    for age, name in [(40, "a"), (30, "b"), (20, "c"), (10, "d")]:
        large.encode(name)
        not_used_for(folder, name, age)
    room_for(folder, 2)
    assert entries_in(folder, "abcd") == "cd"


def test_an_entry_larger_than_the_limit_is_refused(folder: Path) -> None:
    instance = room_for(folder, 1)
    instance.encode("a")
    with pytest.raises(StorageError, match="raise max_bytes"):
        instance.encode("b", embedding_of("b", rows=5))
    assert entries_in(folder, "ab") == "a"
    assert instance.worker.stats.save_failures == 1


def test_other_files_are_neither_counted_nor_removed(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    others = [folder / "README", folder / "model.safetensors", folder / ("A" * 64 + ".safetensors")]
    for path in others:
        path.write_bytes(bytes(10 * ENTRY_BYTES))
    instance = room_for(folder, 1)
    instance.encode("a")
    instance.encode("b")
    assert all(path.exists() for path in others)
    assert entries_in(folder, "ab") == "b"


def test_of_two_entries_that_do_not_fit_together_the_last_one_stays(folder: Path) -> None:
    """While both are being written, neither can be evicted for the other."""
    instance = room_for(folder, 3)
    other = Instance(instance.worker.config)

    def write_after_another(descriptor: int) -> None:
        other.encode("a", embedding_of("a", rows=8))
        assert entries_in(folder, "ab") == "a"
        os.pwrite(descriptor, bytes(2 * ENTRY_BYTES), 0)

    all_of_it = BoundedFolder(folder, instance.worker.config.max_bytes, lambda size_bytes: None)
    all_of_it.publish(identifier_of("b"), 3 * ENTRY_BYTES, write_after_another)
    assert entries_in(folder, "ab") == "b"
    assert counted_bytes(folder) == stored_bytes(folder) == 3 * ENTRY_BYTES


def test_a_reader_keeps_an_entry_that_is_evicted(folder: Path) -> None:
    instance = room_for(folder, 1)
    loaded = instance.load(instance.encode("a"))
    for name in "bcd":
        instance.encode(name)
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))


@pytest.mark.parametrize("content", [b"", b"no number", b"99999999999999999999"])
def test_a_corrupt_count_is_repaired(folder: Path, content: bytes) -> None:
    instance = room_for(folder, 3)
    instance.encode("a")
    (folder / ".usage").write_bytes(content)
    for name in "bcde":
        instance.encode(name)
    assert entries_in(folder, "abcde") == "cde"
    assert counted_bytes(folder) == stored_bytes(folder)


def test_entries_that_were_deleted_by_hand_are_not_counted_as_evictions(folder: Path) -> None:
    instance = room_for(folder, 3)
    for name in "abc":
        instance.encode(name)
        entry_path(folder, identifier_of(name)).unlink()
    for name in "def":
        instance.encode(name)
    assert entries_in(folder, "def") == "def"
    assert instance.worker.stats.evictions == 0


# ---- unfinished files ----------------------------------------------------------------------------------------------


def test_unfinished_files_of_dead_writers_are_removed_at_start_and_those_of_living_ones_are_kept(folder: Path) -> None:
    room_for(folder, 3)
    dead = folder / f"{identifier_of('dead')}.{'0' * 16}.tmp"
    living = folder / f"{identifier_of('living')}.{'1' * 16}.tmp"
    for path in (dead, living):
        path.write_bytes(bytes(ENTRY_BYTES))
    with living.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        instance = room_for(folder, 3)
        assert not dead.exists()
        assert living.exists()
        for name in "abc":
            instance.encode(name)  # an unfinished file takes part of the room
        assert entries_in(folder, "abc") == "bc"


# ---- a disk that fails ---------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[int]], None]:
    """Makes writes fail half-way with the given errors, one after the other, and then succeed."""
    write = os.pwrite

    def set_failures(failures: Iterator[int]) -> None:
        def failing_write(descriptor: int, data: memoryview, offset: int) -> int:
            if len(data) == DATA_BYTES:
                return write(descriptor, data[: DATA_BYTES // 2], offset)
            error = next(failures, 0) if len(data) == DATA_BYTES // 2 else 0
            if error:
                raise OSError(error, os.strerror(error))
            return write(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", failing_write)

    return set_failures


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_causes_an_eviction_and_a_second_attempt(
    folder: Path, disk: Callable[..., None], error: int
) -> None:
    instance = room_for(folder, 10)
    for age, name in [(30, "a"), (20, "b"), (10, "c")]:
        instance.encode(name)
        not_used_for(folder, name, age)
    disk(iter([error]))
    loaded = instance.load(instance.encode("d"))
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("d"))
    assert entries_in(folder, "abcd") == "bcd"
    assert counted_bytes(folder) == stored_bytes(folder)


def test_a_disk_that_stays_full_costs_only_the_new_entry(folder: Path, disk: Callable[..., None]) -> None:
    instance = room_for(folder, 10)
    for age, name in [(20, "a"), (10, "b")]:
        instance.encode(name)
        not_used_for(folder, name, age)
    disk(iter([errno.ENOSPC] * 2))
    with pytest.raises(StorageError, match="No space left"):
        instance.encode("c")
    assert unfinished_in(folder) == []
    assert entries_in(folder, "abc") == "b"
    kept = instance.load(identifier_of("b"))
    assert kept is not None
    assert torch.equal(kept, embedding_of("b"))
    assert instance.worker.stats.save_failures == 1
    assert counted_bytes(folder) == stored_bytes(folder)
    instance.encode("c")
    assert entries_in(folder, "abc") == "bc"


def test_a_full_disk_has_a_code_and_one_line_in_the_log_until_a_save_succeeds(
    folder: Path, disk: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "chiasm.ec_transfer")
    instance = room_for(folder, 10)
    disk(iter([errno.ENOSPC] * 6 + [errno.EIO, 0, errno.ENOSPC, errno.ENOSPC]))
    codes = []
    for name in range(6):
        try:
            instance.encode(name)
        except StorageError as error:
            codes.append(error.code)
    assert codes == [Code.DISK_FULL] * 3 + [None, Code.DISK_FULL]
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[2].partition(".")[0] for line in lines if line.startswith("Cannot write")] == [
        "No space left on device",
        "Input/output error",
        "No space left on device",
    ]
    assert [line.endswith("can be written to " + str(folder) + " again.") for line in lines].count(True) == 1


def test_a_disk_without_room_for_a_new_file_causes_an_eviction(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = room_for(folder, 10)
    for age, name in [(20, "a"), (10, "b")]:
        instance.encode(name)
        not_used_for(folder, name, age)
    open_file = os.open

    def full(path: str, flags: int, *arguments: int) -> int:
        if flags & os.O_EXCL and entries_in(folder, "ab") == "ab":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_file(path, flags, *arguments)

    monkeypatch.setattr(os, "open", full)
    instance.encode("c")
    assert entries_in(folder, "abc") == "bc"
    assert counted_bytes(folder) == stored_bytes(folder)


def test_a_full_disk_without_a_store_id_causes_an_eviction(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries have filled the disk since the folder was removed."""
    instance = room_for(folder, 10)
    for age, name in [(20, "a"), (10, "b")]:
        instance.encode(name)
        not_used_for(folder, name, age)
    (folder / "store-id").unlink()
    open_file = os.open

    def full(path: str | Path, flags: int, *arguments: int) -> int:
        if Path(path).name == "store-id.tmp" and entries_in(folder, "ab") == "ab":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_file(path, flags, *arguments)

    monkeypatch.setattr(os, "open", full)
    assert len(instance.worker.store_id()) == 32
    assert entries_in(folder, "ab") == "b"
    assert counted_bytes(folder) == stored_bytes(folder)


def test_any_other_error_evicts_nothing(folder: Path, disk: Callable[..., None]) -> None:
    instance = room_for(folder, 10)
    instance.encode("a")
    disk(iter([errno.EIO]))
    with pytest.raises(StorageError, match="Input/output error"):
        instance.encode("b")
    assert unfinished_in(folder) == []
    assert entries_in(folder, "ab") == "a"


SMALL_DISK = """
import os, sys
from pathlib import Path
import torch
import pytest
from chiasm.errors import StorageError
from tests.ec_connector.instance import Instance, config_for, embedding_of, identifier_of
folder = Path(sys.argv[1])
instance = Instance(config_for(folder))
for name in range(20):  # 20 entries of 132 KB, into 1 MB
    instance.encode(name, embedding_of(name, rows=1000))
assert instance.worker.stats.evictions > 10
for name in range(20):
    loaded = instance.load(identifier_of(name))
    assert loaded is None or torch.equal(loaded, embedding_of(name, rows=1000))
assert instance.load(identifier_of(19)) is not None
with pytest.raises(StorageError, match="No space left"):
    instance.encode("large", embedding_of("large", rows=10_000))
assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]

# The kernel keeps no access times on this mount, so the connector must have set it.
path = folder / (instance.encode("used") + ".safetensors")
os.utime(path, ns=(0, path.stat().st_mtime_ns))
assert instance.load(identifier_of("used")) is not None
assert path.stat().st_atime_ns > path.stat().st_mtime_ns
"""


def run_python(code: str, *arguments: object, within: tuple[str, ...] = ()) -> None:
    command = [*within, sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_entries_on_a_small_disk(tmp_path: Path) -> None:
    mount = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    script = 'mount -t tmpfs -o size=1m,noatime tmpfs "$0" && exec "$@"'
    allowed = subprocess.run([*mount, script, tmp_path, sys.executable, "-c", ""], capture_output=True, check=False)
    if allowed.returncode != 0:
        pytest.skip("may not mount a tmpfs here")
    run_python(SMALL_DISK, tmp_path / "entries", within=(*mount, script, str(tmp_path)))


# ---- a folder that changes under running instances --------------------------------------------------------------


def test_a_probe_does_not_create_the_folder(pd: Instance, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert not pd.scheduler.has_cache_item(identifier_of("a"))
    assert not folder.exists()


def test_a_folder_that_was_removed_is_created_again(folder: Path) -> None:
    instance = room_for(folder, 3)
    instance.encode("a")
    before = instance.worker.store_id()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert instance.load(identifier_of("a")) is None
    loaded = instance.load(instance.encode("b"))
    assert loaded is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert instance.worker.store_id() not in ("", before)


def test_a_folder_that_is_removed_while_an_entry_is_written_gets_it_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = room_for(folder, 3)
    write = os.pwrite
    removed: list[bool] = []

    def remove_first(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) == DATA_BYTES and not removed:
            removed.append(True)
            shutil.rmtree(folder)
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", remove_first)
    loaded = instance.load(instance.encode("a"))
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))
    assert counted_bytes(folder) == stored_bytes(folder)


def test_a_folder_that_becomes_a_file_costs_only_the_entry(folder: Path) -> None:
    instance = room_for(folder, 3)
    folder.rename(folder.parent / "moved")
    folder.touch()
    with pytest.raises(StorageError, match="Not a directory"):
        instance.encode("a")
    assert not instance.scheduler.has_cache_item(identifier_of("a"))
    with pytest.raises(StorageError, match="store-id"):
        instance.worker.store_id()


# ---- the store id --------------------------------------------------------------------------------------------------


def test_instances_with_the_same_folder_have_the_same_store_id(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "one")
    one, link, two = (Instance(config_for(tmp_path / name)) for name in ("one", "link", "two"))
    assert one.scheduler.store_id() == one.worker.store_id() == link.worker.store_id()
    assert one.worker.store_id() != two.worker.store_id()
    assert len(one.worker.store_id()) == 32


def test_a_corrupt_store_id_is_replaced(folder: Path) -> None:
    instance = room_for(folder, 1)
    (folder / "store-id").write_text("")
    assert len(instance.worker.store_id()) == 32
    assert instance.worker.store_id() == instance.scheduler.store_id()
