"""Halves in different processes: the worker role can load everything that the scheduler role has found."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import ECConnectorMetadata, ECTransferRole
from chiasm.ec_transfer.shared_storage import SharedStorageConnector

from .instance import Instance, Item, Request, config_for, embedding_of, entry_path, identifier_of


@pytest.fixture
def apart(folder: Path) -> Instance:
    return Instance(config_for(folder, ECTransferRole.CONSUMER, separate_processes=True))


def request_for(*names: str) -> Request:
    return Request(tuple(Item(identifier_of(name)) for name in names))


def sent(metadata: ECConnectorMetadata) -> ECConnectorMetadata:
    """The metadata as another process receives it."""
    received = pickle.loads(pickle.dumps(metadata))
    assert isinstance(received, ECConnectorMetadata)
    return received


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_found_entry_is_loaded_even_if_it_is_evicted_before(encoder: Instance, apart: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    metadata = apart.schedule(request_for("a"))
    entry_path(folder, identifier).unlink()
    apart.execute(sent(metadata))
    assert torch.equal(apart.encoder_cache[identifier], embedding_of("a"))


def test_a_found_entry_is_loaded_even_if_the_folder_is_removed_before(
    encoder: Instance, apart: Instance, folder: Path
) -> None:
    identifier = encoder.encode("a")
    metadata = apart.schedule(request_for("a"))
    shutil.rmtree(folder)
    apart.execute(sent(metadata))
    assert torch.equal(apart.encoder_cache[identifier], embedding_of("a"))


def test_the_copy_lives_as_long_as_the_metadata(encoder: Instance, apart: Instance) -> None:
    encoder.encode("a")
    before = open_files()
    metadata = apart.schedule(request_for("a"))
    assert open_files() == before + 1
    del metadata
    assert open_files() == before


def test_an_entry_whose_copy_is_gone_is_found_by_its_name(encoder: Instance, apart: Instance) -> None:
    identifier = encoder.encode("a")
    received = sent(apart.schedule(request_for("a")))  # the metadata itself is gone, and with it the open file
    apart.execute(received)
    assert torch.equal(apart.encoder_cache[identifier], embedding_of("a"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damage_is_noticed_by_the_probe(encoder: Instance, apart: Instance, folder: Path, damage: str) -> None:
    path = entry_path(folder, encoder.encode("a"))
    with path.open("r+b") as file:
        if damage == "flip":
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        else:
            file.truncate(0 if damage == "empty" else path.stat().st_size - 1)
    assert not apart.scheduler.has_cache_item(identifier_of("a"))
    assert not path.exists()
    assert apart.scheduler.stats.corrupt_entries == 1


@pytest.mark.parametrize("size_bytes", [0, 5000])
def test_a_found_entry_is_loaded_even_if_its_file_is_truncated_before(
    encoder: Instance, apart: Instance, folder: Path, size_bytes: int
) -> None:
    identifier = encoder.encode("a")
    metadata = apart.schedule(request_for("a"))
    os.truncate(entry_path(folder, identifier), size_bytes)
    apart.execute(sent(metadata))
    assert torch.equal(apart.encoder_cache[identifier], embedding_of("a"))


def test_truncating_the_file_of_a_loaded_entry_does_not_affect_it(
    encoder: Instance, apart: Instance, folder: Path
) -> None:
    identifier = encoder.encode("a")
    loaded = apart.load(identifier)
    os.truncate(entry_path(folder, identifier), 0)
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))


def test_published_returns_the_header_and_makes_no_copy(encoder: Instance, apart: Instance) -> None:
    identifier = identifier_of("a")
    scheduler = apart.scheduler
    assert isinstance(scheduler, SharedStorageConnector)
    assert scheduler.published(identifier) is None
    encoder.encode("a")
    before = open_files()
    header = scheduler.published(identifier)
    assert header is not None
    assert header.shape == (4, 64)
    assert open_files() == before


def test_a_producer_verifies_an_entry_without_a_copy(encoder: Instance, folder: Path) -> None:
    producer = Instance(config_for(folder, ECTransferRole.PRODUCER, separate_processes=True))
    identifier = encoder.encode("a")
    before = open_files()
    assert producer.scheduler.has_cache_item(identifier)
    assert open_files() == before
    with entry_path(folder, identifier).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([255 - int(embedding_of("a").view(torch.uint8).flatten()[-1])]))
    assert not producer.scheduler.has_cache_item(identifier)
