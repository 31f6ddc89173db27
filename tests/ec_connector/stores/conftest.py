"""Entries to keep in stores, and servers to keep them in."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from chiasm.ec_transfer.stores import Store, StoredEntry, open_store

from ...store_server import StoreServer, servers

FINGERPRINT = "ab12"


def entry_of(number: int, size_bytes: int = 10 << 20) -> tuple[StoredEntry, memoryview]:
    """An entry of random bytes with its data: by default of three chunks, the last of which is smaller."""
    data = memoryview(random.Random(number).randbytes(size_bytes))
    return StoredEntry.of(f"{number:064x}", FINGERPRINT, "BF16", (size_bytes // 8, 4), data), data


def read(store: Store, entry: StoredEntry) -> bytes:
    buffer = memoryview(bytearray(entry.size_bytes))
    store.get_into(entry, buffer)
    return bytes(buffer)


@pytest.fixture(params=[*servers()])
def program(request: pytest.FixtureRequest) -> Path:
    """Each of the servers that are here, in turn."""
    return servers()[request.param]


@pytest.fixture
def server(program: Path) -> Iterator[StoreServer]:
    """A server that a test may break."""
    with StoreServer(program) as started:
        yield started


@pytest.fixture(scope="module", params=["folder", *servers()])
def any_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store of each kind, in turn."""
    with contextlib.ExitStack() as stack:
        if request.param == "folder":
            opened = open_store(f"file://{tmp_path_factory.mktemp('store')}/folder")
        else:
            opened = open_store(stack.enter_context(StoreServer(servers()[request.param])).url)
        stack.callback(opened.close)
        yield opened
