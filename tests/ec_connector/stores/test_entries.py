"""What every store does: it gives back what it was given, or says that it can't."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chiasm.ec_transfer.stores import AbsentEntryError, CorruptEntryError, Store, StoredEntry, open_store

from .conftest import FINGERPRINT, entry_of, read


@pytest.mark.parametrize("size_bytes", [8, 4 << 20, (4 << 20) + 8, 10 << 20])
def test_an_entry_comes_back_as_it_was(any_store: Store, size_bytes: int) -> None:
    entry, data = entry_of(size_bytes, size_bytes)
    any_store.put(entry, data)
    assert any_store.exists_many([entry.identifier], FINGERPRINT) == [entry]
    assert read(any_store, entry) == data


def test_many_are_asked_for_at_once_and_each_has_its_answer(any_store: Store) -> None:
    entries = [entry_of(number, 64) for number in range(100, 106)]
    for entry, data in entries[::2]:
        any_store.put(entry, data)
    found = any_store.exists_many([entry.identifier for entry, _ in entries], FINGERPRINT)
    assert [header is not None for header in found] == [True, False] * 3
    assert any_store.exists_many([], FINGERPRINT) == []


def test_an_entry_of_another_model_is_not_found(any_store: Store) -> None:
    entry, data = entry_of(200, 64)
    any_store.put(entry, data)
    assert any_store.exists_many([entry.identifier], "cd34") == [None]


def test_an_entry_that_was_never_there_is_absent(any_store: Store) -> None:
    entry, _ = entry_of(300, 64)
    with pytest.raises(AbsentEntryError):
        read(any_store, entry)


def test_an_entry_that_is_written_again_is_the_new_one(any_store: Store) -> None:
    first, data = entry_of(400, 64)
    any_store.put(first, data)
    _, changed = entry_of(401, 64)
    second = StoredEntry.of(first.identifier, FINGERPRINT, first.dtype, first.shape, changed)
    any_store.put(second, changed)
    assert any_store.exists_many([first.identifier], FINGERPRINT) == [second]
    assert read(any_store, second) == changed


def test_health_says_what_the_store_is_and_holds(any_store: Store) -> None:
    entry, data = entry_of(500)
    any_store.put(entry, data)
    health = any_store.health()
    assert health.server
    assert health.used_bytes >= entry.size_bytes


def test_a_folder_from_which_entries_are_evicted_meanwhile_is_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (entry, data) = open_store(f"file://{tmp_path}/folder"), entry_of(600, 64)
    store.put(entry, data)
    scandir = os.scandir

    @contextlib.contextmanager
    def while_others_evict(folder: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(folder) as files:
            found = list(files)
        os.unlink(f"{folder}/{entry.identifier}.safetensors")
        yield found

    monkeypatch.setattr(os, "scandir", while_others_evict)
    assert store.health().server


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x91" * 2000,
        b"{}",
        pytest.param({"identifier": "f" * 64}, id="another item"),
        pytest.param({"fingerprint": "cd34"}, id="another model"),
        pytest.param({"version": 2}, id="another version"),
        pytest.param({"dtype": "F4"}, id="unknown dtype"),
        pytest.param({"shape": (1 << 31, 1 << 31)}, id="larger than any memory"),
        pytest.param({"shape": (0, 4)}, id="empty"),
        pytest.param({"shape": ()}, id="no shape"),
        pytest.param({"shape": (2,) * 9}, id="many dimensions"),
        pytest.param({"checksums": ()}, id="too few checksums"),
        pytest.param({"chunk_bytes": 1}, id="many chunks"),
        pytest.param({"chunk_bytes": 1 << 40}, id="huge chunks"),
        pytest.param({"checksums": (b"short",)}, id="short checksum"),
    ],
)
def test_a_header_that_is_not_the_entrys_is_corrupt(raw: bytes | dict[str, object]) -> None:
    entry, _ = entry_of(1, 64)
    if isinstance(raw, dict):
        given = {name: getattr(entry, name) for name in StoredEntry.__struct_fields__}
        raw = StoredEntry(**given | raw).to_bytes()
    with pytest.raises(CorruptEntryError):
        StoredEntry.from_bytes(raw, entry.identifier, FINGERPRINT)
