"""A connector with a store beside it: what encoders publish is read elsewhere, and a store that fails is a miss."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from chiasm.ec_transfer import (
    ECConnector,
    ECConnectorFactory,
    ECConnectorRole,
    ECTransferConfig,
    ECTransferRole,
)
from chiasm.ec_transfer.stores.reader import StoreReads
from chiasm.ec_transfer.stores.writer import StoreWrites
from chiasm.ec_transfer.with_store import WithStore

from ..store_server import StoreServer, running

NAMES = [f"{number:064x}" for number in range(8)]
WIDTH = 64


@dataclass
class Item:
    identifier: str
    offset: int = 0
    length: int = 16


@dataclass
class Request:
    request_id: str
    items: list[Item]


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with running() as started:
        yield started


class Consumer:
    """Both halves of a consumer, and the scheduler's side of the calls."""

    def __init__(self, config: ECTransferConfig) -> None:
        self.scheduler = ECConnectorFactory.create_connector(config, ECConnectorRole.SCHEDULER)
        self.worker = ECConnectorFactory.create_connector(config, ECConnectorRole.WORKER)
        self._woken = threading.Semaphore(0)
        self.scheduler.set_wake(self._wake)

    def _wake(self, arrived: str = "", /) -> None:
        self._woken.release()

    def wait(self) -> None:
        """Until the connector wakes the scheduler."""
        assert self._woken.acquire(timeout=30)

    def admit(self, request: Request) -> None:
        self.scheduler.ensure_cache_available(request, 0)
        for item in request.items:
            self.scheduler.has_cache_item(item.identifier)

    def load(self, request: Request, *, through_pickle: bool = False) -> dict[str, torch.Tensor]:
        """Take what has arrived into memory, as a step does."""
        for index, item in enumerate(request.items):
            if self.scheduler.has_cache_item(item.identifier):
                self.scheduler.update_state_after_alloc(request, index)
        metadata = self.scheduler.build_connector_meta()
        cache: dict[str, torch.Tensor] = {}
        self.worker.bind_connector_metadata(pickle.loads(pickle.dumps(metadata)) if through_pickle else metadata)
        self.worker.start_load_caches(cache)
        self.worker.clear_connector_metadata()
        return cache

    def get(self, request: Request) -> dict[str, torch.Tensor]:
        """Everything that the request wants, as it arrives."""
        cache: dict[str, torch.Tensor] = {}
        while len(cache) < len(request.items):
            cache |= self.load(request)
            if len(cache) < len(request.items):
                self.wait()
        return cache

    @property
    def reads(self) -> StoreReads:
        assert isinstance(self.scheduler.store_stats, StoreReads)
        return self.scheduler.store_stats

    def close(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()


@pytest.fixture
def config(server: StoreServer, tmp_path: Path) -> ECTransferConfig:
    """Of consumers, whose folder is not the encoders'."""
    return ECTransferConfig(
        role=ECTransferRole.CONSUMER,
        connector_extra_config={"shared_storage_path": tmp_path / "consumer"},
        fingerprint="ab12",
        dtype="float32",
        entry_width=WIDTH,
        store=server.url,
    )


@pytest.fixture
def consumer(config: ECTransferConfig) -> Iterator[Consumer]:
    made = Consumer(config)
    yield made
    made.close()


@pytest.fixture
def encoder(config: ECTransferConfig, tmp_path: Path) -> Iterator[ECConnector]:
    producer = replace(
        config, role=ECTransferRole.PRODUCER, connector_extra_config={"shared_storage_path": tmp_path / "encoder"}
    )
    made = ECConnectorFactory.create_connector(producer, ECConnectorRole.WORKER)
    yield made
    made.shutdown()


def tensor(name: str, rows: int = 16, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(name, 16))
    return torch.randn(rows, width, generator=generator).to(dtype)


def publish(encoder: ECConnector, *names: str, **form: int | torch.dtype) -> None:
    """Have an encoder publish embeddings, and wait until the store has them."""
    stats = encoder.store_stats
    assert isinstance(stats, StoreWrites)
    before = stats.writes + stats.write_failures
    for name in names:
        encoder.save_caches({name: tensor(name, **form)}, name)  # type: ignore[arg-type]
    while stats.writes + stats.write_failures < before + len(names):
        pass  # written behind, by a thread that tells nobody


def request(*names: str, request_id: str = "a") -> Request:
    return Request(request_id, [Item(name, offset=20 * index) for index, name in enumerate(names)])


@pytest.mark.parametrize("told_first", [True, False])
def test_what_an_encoder_published_is_read_from_the_store(
    encoder: ECConnector, consumer: Consumer, told_first: bool
) -> None:
    publish(encoder, *NAMES[:3])
    wanted = request(*NAMES[:3])
    if told_first:
        consumer.scheduler.expect({}, stored=NAMES[:3])
        consumer.admit(wanted)
    else:
        consumer.admit(wanted)
        assert not consumer.scheduler.is_coming(NAMES[0])
        consumer.scheduler.expect({}, stored=NAMES[:3])
    assert consumer.scheduler.is_coming(NAMES[0])
    for name, found in consumer.get(wanted).items():
        assert torch.equal(found, tensor(name))
    consumer.scheduler.request_finished(wanted)
    assert consumer.reads.reads == 3


def test_what_no_request_needs_is_not_read(encoder: ECConnector, consumer: Consumer) -> None:
    publish(encoder, *NAMES[:2])
    consumer.scheduler.expect({}, stored=NAMES[:2])
    consumer.admit(request(NAMES[1]))
    consumer.wait()
    assert consumer.reads.reads == 1


def test_what_is_in_memory_is_not_read_again(encoder: ECConnector, consumer: Consumer) -> None:
    publish(encoder, NAMES[0])
    consumer.scheduler.expect({}, stored=[NAMES[0]])
    first, second, third = (request(NAMES[0], request_id=name) for name in "abc")
    consumer.admit(first)
    consumer.get(first)
    consumer.scheduler.ensure_cache_available(second, 0)
    consumer.scheduler.expect({}, stored=[NAMES[0]])
    for ended in (first, second):
        consumer.scheduler.request_finished(ended)
    assert consumer.reads.reads == 1
    assert consumer.scheduler.is_coming(NAMES[0])  # what was said last is true until it is needed
    consumer.admit(third)
    assert torch.equal(consumer.get(third)[NAMES[0]], tensor(NAMES[0]))


def test_what_the_connector_has_is_not_read_from_the_store(
    encoder: ECConnector, config: ECTransferConfig, tmp_path: Path
) -> None:
    publish(encoder, NAMES[0])
    consumer = Consumer(replace(config, connector_extra_config={"shared_storage_path": tmp_path / "encoder"}))
    consumer.scheduler.expect({}, stored=[NAMES[0]])
    wanted = request(NAMES[0])
    consumer.admit(wanted)
    assert torch.equal(consumer.get(wanted)[NAMES[0]], tensor(NAMES[0]))
    assert consumer.reads.reads == 0
    consumer.close()


def test_what_is_not_there_is_not_coming(consumer: Consumer) -> None:
    consumer.scheduler.expect({}, stored=[NAMES[0]])
    consumer.admit(request(NAMES[0]))
    consumer.wait()
    assert not consumer.scheduler.is_coming(NAMES[0])
    assert not consumer.scheduler.has_cache_item(NAMES[0])
    assert consumer.reads.absent == 1


@pytest.mark.parametrize(
    "form", [{"rows": 17}, {"width": WIDTH * 2}, {"dtype": torch.float64}], ids=lambda form: next(iter(form))
)
def test_what_a_request_cannot_use_is_refused_before_it_is_read(
    encoder: ECConnector, consumer: Consumer, form: dict[str, int | torch.dtype]
) -> None:
    publish(encoder, NAMES[0], **form)
    consumer.scheduler.expect({}, stored=[NAMES[0]])
    consumer.admit(request(NAMES[0]))
    consumer.wait()
    assert not consumer.scheduler.is_coming(NAMES[0])
    assert (consumer.reads.corrupt, consumer.reads.read_bytes) == (1, 0)


@pytest.mark.usefixtures("faults_are_remembered")
def test_a_store_that_is_down_is_a_miss_and_is_not_asked_again_at_once(
    server: StoreServer, encoder: ECConnector, consumer: Consumer
) -> None:
    publish(encoder, *NAMES[:2])
    server.kill()
    consumer.scheduler.expect({}, stored=NAMES[:2])
    consumer.admit(request(*NAMES[:2]))
    consumer.wait()
    consumer.wait()
    assert not any(consumer.scheduler.is_coming(name) for name in NAMES[:2])
    assert consumer.reads.read_failures == 2
    publish(encoder, NAMES[2])
    stats = encoder.store_stats
    assert isinstance(stats, StoreWrites)
    assert stats.write_failures == 1
    encoder.save_caches({NAMES[3]: tensor(NAMES[3])}, NAMES[3])
    assert stats.dropped == 1


def test_memory_is_bounded_and_what_is_needed_first_makes_its_way(
    encoder: ECConnector, config: ECTransferConfig
) -> None:
    size = tensor(NAMES[0]).nbytes
    consumer = Consumer(replace(config, store_read_bytes=2 * size))
    publish(encoder, *NAMES[:5])
    later, first = request(*NAMES[1:5], request_id="later"), request(NAMES[0], request_id="first")
    consumer.scheduler.ensure_cache_available(first, 0)
    consumer.scheduler.expect({}, stored=NAMES[:5])
    consumer.admit(later)
    consumer.wait()
    consumer.wait()
    assert sum(consumer.scheduler.layout_of(name) is not None for name in NAMES[:5]) <= 2
    consumer.scheduler.build_connector_meta()
    while not consumer.scheduler.has_cache_item(NAMES[0]):  # what is asked for first in a round is needed first
        consumer.wait()
    assert torch.equal(consumer.load(first)[NAMES[0]], tensor(NAMES[0]))
    assert set(consumer.get(later)) == set(NAMES[1:5])
    consumer.close()


def test_an_entry_that_is_larger_than_the_memory_is_a_miss(encoder: ECConnector, config: ECTransferConfig) -> None:
    consumer = Consumer(replace(config, store_read_bytes=tensor(NAMES[0]).nbytes - 1))
    publish(encoder, NAMES[0])
    consumer.scheduler.expect({}, stored=[NAMES[0]])
    consumer.admit(request(NAMES[0]))
    consumer.wait()
    assert not consumer.scheduler.is_coming(NAMES[0])
    consumer.close()


def test_an_embedding_can_come_if_the_connector_or_the_store_has_room_for_it(config: ECTransferConfig) -> None:
    def limit(connector: str, receive_bytes: int, store_read_bytes: int) -> int | None:
        extra = config.connector_extra_config if connector == config.connector else {}
        changed = replace(
            config,
            connector=connector,
            connector_extra_config=extra,
            role=ECTransferRole.CONSUMER,
            receive_bytes=receive_bytes,
            store_read_bytes=store_read_bytes,
        )
        scheduler = ECConnectorFactory.create_connector(changed, ECConnectorRole.SCHEDULER)
        scheduler.shutdown()
        return scheduler.max_received_bytes

    assert limit("SharedMemoryConnector", 1 << 20, 2 << 20) == 2 << 20
    assert limit("SharedMemoryConnector", 2 << 20, 1 << 20) == 2 << 20
    assert limit("SharedStorageConnector", 1 << 20, 1 << 20) is None


def test_requests_that_end_leave_nothing_behind(encoder: ECConnector, consumer: Consumer) -> None:
    publish(encoder, NAMES[0])
    one, two = request(NAMES[0], request_id="one"), request(NAMES[0], request_id="two")
    consumer.scheduler.expect({}, stored=[NAMES[0]])
    consumer.admit(one)
    consumer.admit(two)
    consumer.wait()
    consumer.scheduler.request_finished(one)
    assert consumer.scheduler.has_cache_item(NAMES[0])
    consumer.scheduler.build_connector_meta()
    consumer.scheduler.request_finished(two)
    assert not consumer.scheduler.has_cache_item(NAMES[0])
    assert not consumer.scheduler.is_coming(NAMES[0])


def test_a_worker_in_another_process_maps_what_was_read(encoder: ECConnector, config: ECTransferConfig) -> None:
    consumer = Consumer(replace(config, separate_processes=True))
    publish(encoder, NAMES[0])
    wanted = request(NAMES[0])
    consumer.scheduler.expect({}, stored=[NAMES[0]])
    consumer.admit(wanted)
    consumer.wait()
    assert torch.equal(consumer.load(wanted, through_pickle=True)[NAMES[0]], tensor(NAMES[0]))
    consumer.close()


def test_an_encoder_reads_what_it_has_lost_from_the_store(
    encoder: ECConnector, config: ECTransferConfig, tmp_path: Path
) -> None:
    publish(encoder, NAMES[0])
    encoder.discard(NAMES[0], "it is lost")
    assert encoder.restore(NAMES[0], 16)
    stats = encoder.store_stats
    assert isinstance(stats, StoreWrites)
    assert (stats.restored, stats.writes, stats.queued_bytes) == (1, 1, 0)
    consumer = Consumer(replace(config, store="", connector_extra_config={"shared_storage_path": tmp_path / "encoder"}))
    wanted = request(NAMES[0])
    consumer.admit(wanted)
    assert torch.equal(consumer.get(wanted)[NAMES[0]], tensor(NAMES[0]))
    consumer.close()


def test_an_encoder_looks_for_nothing_that_it_has_not_made(
    encoder: ECConnector, config: ECTransferConfig, tmp_path: Path
) -> None:
    publish(encoder, NAMES[0])
    other = replace(
        config, role=ECTransferRole.PRODUCER, connector_extra_config={"shared_storage_path": tmp_path / "other"}
    )
    without = ECConnectorFactory.create_connector(other, ECConnectorRole.WORKER)
    assert not without.restore(NAMES[0], 16)
    stats = without.store_stats
    assert isinstance(stats, StoreWrites)
    assert (stats.restored, stats.not_restored) == (0, 0)
    without.shutdown()


@pytest.mark.parametrize("rows", [15, 17])
def test_an_encoder_encodes_again_what_the_store_cannot_give_back(
    server: StoreServer, encoder: ECConnector, rows: int
) -> None:
    publish(encoder, *NAMES[:2])
    for name in NAMES[:2]:
        encoder.discard(name, "it is lost")
    assert not encoder.restore(NAMES[0], rows)  # of another image size
    server.kill()
    assert not encoder.restore(NAMES[1], 16)
    stats = encoder.store_stats
    assert isinstance(stats, StoreWrites)
    assert (stats.restored, stats.not_restored) == (0, 2)


def test_every_call_is_passed_on() -> None:
    own = {"plane", "is_producer", "is_consumer", "read_extra_config"}
    public = {name for name in vars(ECConnector) if not name.startswith("_")}
    assert public - own <= vars(WithStore).keys()
