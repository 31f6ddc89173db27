"""Halves in different processes: what the scheduler role has said yes to, the worker role finds."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import ECConnectorMetadata, ECTransferRole

from .instance import Instance, Item, Request, config_for, embedding_of, entry_path, identifier_of


@pytest.fixture
def apart(folder: Path) -> Instance:
    return Instance(config_for(folder, ECTransferRole.CONSUMER, separate_processes=True))


def request_for(*names: str) -> Request:
    return Request(tuple(Item(identifier_of(name)) for name in names))


def sent(metadata: ECConnectorMetadata) -> ECConnectorMetadata:
    """What arrives in another process."""
    received = pickle.loads(pickle.dumps(metadata))
    assert isinstance(received, ECConnectorMetadata)
    return received


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_is_loaded_though_it_is_evicted_in_between(encoder: Instance, apart: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    metadata = apart.schedule(request_for("a"))
    entry_path(folder, identifier).unlink()
    apart.execute(sent(metadata))
    assert torch.equal(apart.encoder_cache[identifier], embedding_of("a"))


def test_it_is_loaded_though_the_whole_folder_is_removed(encoder: Instance, apart: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    metadata = apart.schedule(request_for("a"))
    shutil.rmtree(folder)
    apart.execute(sent(metadata))
    assert torch.equal(apart.encoder_cache[identifier], embedding_of("a"))


def test_the_copy_is_kept_as_long_as_the_metadata_lives(encoder: Instance, apart: Instance) -> None:
    encoder.encode("a")
    before = open_files()
    metadata = apart.schedule(request_for("a"))
    assert open_files() == before + 1
    del metadata
    assert open_files() == before


def test_without_the_pin_it_is_found_by_its_name(encoder: Instance, apart: Instance) -> None:
    identifier = encoder.encode("a")
    received = sent(apart.schedule(request_for("a")))  # the metadata itself is gone, and with it the open file
    apart.execute(received)
    assert torch.equal(apart.encoder_cache[identifier], embedding_of("a"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damage_is_found_before_the_promise(encoder: Instance, apart: Instance, folder: Path, damage: str) -> None:
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
def test_it_is_loaded_though_its_file_is_cut_off_in_between(
    encoder: Instance, apart: Instance, folder: Path, size_bytes: int
) -> None:
    identifier = encoder.encode("a")
    metadata = apart.schedule(request_for("a"))
    os.truncate(entry_path(folder, identifier), size_bytes)
    apart.execute(sent(metadata))
    assert torch.equal(apart.encoder_cache[identifier], embedding_of("a"))


def test_cutting_off_a_loaded_file_harms_nobody(encoder: Instance, apart: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    loaded = apart.load(identifier)
    os.truncate(entry_path(folder, identifier), 0)
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))


def test_what_is_published_says_its_shape_and_promises_nothing(encoder: Instance, apart: Instance) -> None:
    identifier = identifier_of("a")
    assert apart.scheduler.published(identifier) is None
    encoder.encode("a")
    before = open_files()
    assert apart.scheduler.published(identifier).shape == (4, 64)
    assert open_files() == before


def test_a_producer_promises_without_a_copy(encoder: Instance, folder: Path) -> None:
    producer = Instance(config_for(folder, ECTransferRole.PRODUCER, separate_processes=True))
    identifier = encoder.encode("a")
    before = open_files()
    assert producer.scheduler.has_cache_item(identifier)
    assert open_files() == before
    with entry_path(folder, identifier).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([255 - embedding_of("a").view(torch.uint8).flatten()[-1].item()]))
    assert not producer.scheduler.has_cache_item(identifier)
