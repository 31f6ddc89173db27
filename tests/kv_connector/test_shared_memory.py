"""Specific to shared memory: where the cache lies, and which blocks are copied in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVConnectorRole, KVLayout, KVTransferConfig, KVTransferRole
from chiasm.kv_transfer.blocks import ranges_of, runs_of
from chiasm.kv_transfer.shared_memory import SharedMemoryConnector
from chiasm.transfer import memory_file
from chiasm.transfer.memory import Range, Run

from .conftest import Make
from .instance import LAYOUT, config_for

PRODUCER, CONSUMER = KVTransferRole.PRODUCER, KVTransferRole.CONSUMER
NAME = "SharedMemoryConnector"


@pytest.mark.parametrize(
    ("local", "remote", "expected"),
    [
        ([], [], []),
        ([4], [7], [Run(40, 70, 10)]),
        ([4, 5, 6], [7, 8, 9], [Run(40, 70, 30)]),
        ([4, 5, 6], [7, 9, 10], [Run(40, 70, 10), Run(50, 90, 20)]),
        ([4, 6, 7], [7, 8, 9], [Run(40, 70, 10), Run(60, 80, 20)]),
        ([6, 5, 4], [9, 8, 7], [Run(60, 90, 10), Run(50, 80, 10), Run(40, 70, 10)]),
    ],
)
def test_adjacent_blocks_are_one_run(local: list[int], remote: list[int], expected: list[Run]) -> None:
    assert runs_of(local, remote, 10) == expected


def test_the_ranges_of_blocks_are_joined_whatever_their_order() -> None:
    assert ranges_of([5, 3, 8, 4, 9, 4], 10) == [Range(30, 30), Range(80, 20)]
    assert ranges_of([], 10) == []


def test_a_gpu_is_refused() -> None:
    config = KVTransferConfig(device="cuda:0")
    with pytest.raises(ConfigurationError, match="NixlConnector"):
        SharedMemoryConnector(config, KVConnectorRole.WORKER)


def test_a_cache_that_lies_elsewhere_is_refused() -> None:
    worker = SharedMemoryConnector(config_for(NAME, PRODUCER), KVConnectorRole.WORKER)
    blocks = torch.zeros(4, LAYOUT.bytes_per_block, dtype=torch.uint8)
    with pytest.raises(ConfigurationError, match="allocate_kv_cache"):
        worker.register_kv_caches(blocks, LAYOUT, lambda: None)
    worker.allocate_kv_cache(blocks.nbytes)
    with pytest.raises(ConfigurationError, match="allocate_kv_cache"):
        worker.register_kv_caches(blocks, LAYOUT, lambda: None)
    worker.shutdown()


def test_the_cache_is_zeroed_and_the_producers_alone() -> None:
    worker = SharedMemoryConnector(config_for(NAME, PRODUCER), KVConnectorRole.WORKER)
    memory = worker.allocate_kv_cache(100_000)
    assert memory is not None
    assert (memory.dtype, memory.shape) == (torch.uint8, (100_000,))
    assert not memory.any()
    worker.shutdown()
    consumer = SharedMemoryConnector(config_for(NAME, CONSUMER), KVConnectorRole.WORKER)
    assert consumer.allocate_kv_cache(100_000) is None


def test_blocks_that_fill_no_whole_page(make: Make) -> None:
    odd = KVLayout(num_layers=1, block_size=1, num_kv_heads=1, head_dim=3, dtype="uint8", bytes_per_block=6)
    prefill, decode = make(NAME, PRODUCER, odd), make(NAME, CONSUMER, odd)
    decode.fetch("d", prefill.prefill("p", [63, 0, 5]), [0, 63, 9])
    assert decode.holds("p", [0, 63, 9])


def test_a_producer_on_another_host(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = make(NAME, PRODUCER), make(NAME, CONSUMER)
    handle = prefill.prefill("p", [1])
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(memory_file, "_BOOT_ID", tmp_path / "boot_id")
    assert "runs on another host" in decode.failure_of(decode.arrive("d", handle))
    assert len(caplog.messages) == 1
    monkeypatch.undo()
    decode.fetch("e", handle, [2])
    assert decode.holds("p", [2])
