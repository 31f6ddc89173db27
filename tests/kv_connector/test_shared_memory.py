"""Specific to shared memory: who may map it, and which blocks are copied in one piece."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVConnectorRole, KVLayout, KVTransferConfig, KVTransferRole, shared_memory
from chiasm.kv_transfer.shared_memory import Run, SharedMemoryConnector, runs

from .conftest import Make
from .instance import LAYOUT, Instance, config_for
from .raw_peers import RawConsumer

PRODUCER, CONSUMER = KVTransferRole.PRODUCER, KVTransferRole.CONSUMER
NAME = "SharedMemoryConnector"


@pytest.mark.parametrize(
    ("local", "remote", "expected"),
    [
        ([], [], []),
        ([4], [7], [Run(4, 7, 1)]),
        ([4, 5, 6], [7, 8, 9], [Run(4, 7, 3)]),
        ([4, 5, 6], [7, 9, 10], [Run(4, 7, 1), Run(5, 9, 2)]),
        ([4, 6, 7], [7, 8, 9], [Run(4, 7, 1), Run(6, 8, 2)]),
        ([6, 5, 4], [9, 8, 7], [Run(6, 9, 1), Run(5, 8, 1), Run(4, 7, 1)]),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [Run(0, 0, 3), Run(3, 3, 2)]),
    ],
)
def test_adjacent_blocks_are_one_run_up_to_a_length(local: list[int], remote: list[int], expected: list[Run]) -> None:
    assert list(runs(local, remote, longest=3)) == expected


def test_a_gpu_is_refused() -> None:
    config = KVTransferConfig(device="cuda:0")
    for role in KVConnectorRole:
        with pytest.raises(ConfigurationError, match="NixlConnector"):
            SharedMemoryConnector(config, role)


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
    monkeypatch.setattr(shared_memory, "_BOOT_ID", tmp_path / "boot_id")
    assert "use NixlConnector" in decode.failure_of(decode.arrive("d", handle))
    assert len(caplog.messages) == 1
    monkeypatch.undo()
    decode.fetch("e", handle, [2])
    assert decode.holds("p", [2])


@pytest.mark.parametrize(
    "change", [{"pid": 1 << 30}, {"descriptor": 1 << 20}, {"token": b"x" * 32}, {"size_bytes": 1 << 40}, {"pid": 1}]
)
def test_a_file_that_is_not_the_producers_memory_is_not_mapped(make: Make, change: dict[str, object]) -> None:
    """As would happen with a producer in another container, whose ids mean something else here."""
    prefill, decode = make(NAME, PRODUCER), make(NAME, CONSUMER)
    with pytest.raises(Exception, match="NixlConnector"):
        reach_changed(prefill, decode, change)


@pytest.mark.parametrize("change", [{"offset_bytes": 1 << 30}, {"offset_bytes": -1}, {"offset_bytes": "0"}])
def test_blocks_outside_the_memory_are_not_read(make: Make, change: dict[str, object]) -> None:
    prefill, decode = make(NAME, PRODUCER), make(NAME, CONSUMER)
    with pytest.raises(Exception, match=r"outside its memory|not understood"):
        reach_changed(prefill, decode, change)


def reach_changed(prefill: Instance, decode: Instance, change: dict[str, object]) -> None:
    """Reach a producer that describes its memory wrongly."""
    with RawConsumer(prefill) as consumer:
        welcome = consumer.ask(consumer.hello())
    description = msgspec.msgpack.decode(welcome.memory)  # type: ignore[union-attr]
    changed = msgspec.structs.replace(welcome, memory=msgspec.msgpack.encode(description | change))
    assert isinstance(decode.worker, SharedMemoryConnector)
    decode.worker.reach(changed)  # type: ignore[arg-type]


def test_a_copy_stops_between_blocks(make: Make) -> None:
    """It asks after every few megabytes whether to stop."""
    num_blocks = 1024  # 32 MB
    prefill, decode = make(NAME, PRODUCER, LAYOUT, num_blocks), make(NAME, CONSUMER, LAYOUT, num_blocks)
    prefill.blocks.fill_(1)
    with RawConsumer(prefill) as consumer:
        welcome = consumer.ask(consumer.hello())
    assert isinstance(decode.worker, SharedMemoryConnector)
    memory = decode.worker.reach(welcome)  # type: ignore[arg-type]
    answers = iter([False, True])
    assert not memory.read(range(num_blocks), range(num_blocks), lambda: next(answers))
    copied = int((decode.blocks[:, 0] == 1).sum())
    assert copied == 2 * (8 << 20) // LAYOUT.bytes_per_block
    assert not decode.blocks[copied:].any()
    memory.close()
