"""Connectors from memory to memory in an instance whose workers are processes of their own, as with tensor parallelism."""

from __future__ import annotations

import gc
import os
import pickle
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from chiasm.ec_transfer import ECConnectorMetadata, ECTransferConfig, ECTransferRole
from chiasm.ec_transfer.entry_file import HEADER_BYTES
from chiasm.ec_transfer.intake import Stage
from chiasm.ec_transfer.peers import LandingConnector, PeerConnector, PeerMetadata
from chiasm.ec_transfer.publishing import Reserve
from chiasm.errors import StorageError
from tests.launch.waiting import eventually

from .instance import Request, embedding_of, identifier_of
from .peers import CONNECTORS, Encoder, LanguageModel, keeps_nothing, memory_mapped, memory_open
from .workers import WorkerProcess, bytes_of

ROWS = 1 << 11
"""An embedding of so many rows takes a quarter of a megabyte."""
SETTINGS: dict[str, Any] = {"max_bytes": 4 << 20, "receive_bytes": 1 << 20, "separate_processes": True}


@pytest.fixture(params=CONNECTORS)
def connector(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoder(connector: str) -> Iterator[Encoder]:
    made = Encoder(connector, max_bytes=4 << 20)
    yield made
    made.close()


@pytest.fixture
def model(connector: str) -> Iterator[LanguageModel]:
    """Only its scheduler role is used."""
    made = LanguageModel(connector, **SETTINGS)
    yield made
    made.close()


@pytest.fixture
def producer() -> Iterator[Encoder]:
    """An encoder whose worker isn't used."""
    made = Encoder("TcpConnector", **SETTINGS)
    yield made
    made.close()


@pytest.fixture
def reader() -> Iterator[LanguageModel]:
    made = LanguageModel("TcpConnector")
    yield made
    made.close()


def config_of(connector: str, role: ECTransferRole) -> ECTransferConfig:
    return ECTransferConfig(connector=connector, role=role, fingerprint="5eed", **SETTINGS)


def worker_of(connector: str) -> WorkerProcess:
    return WorkerProcess(config_of(connector, ECTransferRole.CONSUMER))


def publishing_worker() -> WorkerProcess:
    return WorkerProcess(config_of("TcpConnector", ECTransferRole.PRODUCER))


def step_of(model: LanguageModel, *requests: Request) -> ECConnectorMetadata:
    """Return the metadata of a step that loads all of the requests' embeddings, once they have arrived."""
    wanted = {item.identifier: (request, index) for request in requests for index, item in enumerate(request.items)}

    while any([not model.scheduler.has_cache_item(name) for name in wanted]):  # noqa: C419, all are asked for
        model.next_wake(seconds=0.05)
    for request, index in wanted.values():
        model.scheduler.update_state_after_alloc(request, index)
    return model.scheduler.build_connector_meta()


def admit(model: LanguageModel, encoder: Encoder, request_id: str, *names: str) -> Request:
    """A request comes whose embeddings the encoder has."""
    for name in names:
        encoder.encode(name, embedding_of(name, rows=ROWS))
    model.scheduler.expect({identifier_of(name): encoder.place for name in names})
    return model.admit(request_id, *names, rows=ROWS)


def expected(*names: str) -> dict[str, bytes]:
    return {identifier_of(name): bytes_of(embedding_of(name, rows=ROWS)) for name in names}


def stage_of(model: LanguageModel, name: str) -> Stage:
    assert isinstance(model.scheduler, PeerConnector)
    assert model.scheduler._reader is not None
    wanted = model.scheduler._reader._table._intake.get(identifier_of(name))
    assert wanted is not None
    return wanted.stage


# Consumers


def test_each_worker_loads_each_embedding(connector: str, encoder: Encoder, model: LanguageModel) -> None:
    with worker_of(connector) as one, worker_of(connector) as two:
        metadata = step_of(model, admit(model, encoder, "r", "cat", "dog"))
        assert one.run(metadata) == two.run(metadata) == expected("cat", "dog")


def test_what_a_worker_has_loaded_stays_when_everything_else_goes(
    connector: str, encoder: Encoder, model: LanguageModel
) -> None:
    with worker_of(connector) as worker:
        request = admit(model, encoder, "r", "cat")
        metadata = step_of(model, request)
        worker.run(metadata)
        del metadata
        model.scheduler.request_finished(request)
        model.close()
        encoder.close()
        assert worker.run(ECConnectorMetadata()) == expected("cat")


def test_a_worker_that_is_late_loads_nothing_rather_than_something_else(
    connector: str, encoder: Encoder, model: LanguageModel
) -> None:
    """The memory of what the late step loads is in use again, for embeddings of the same size."""
    with worker_of(connector) as worker:
        late = pickle.dumps(step_of(model, admit(model, encoder, "late", "cat")))  # the metadata itself is gone
        assert eventually(lambda: keeps_nothing(model.scheduler))
        encoder.holding.discard(identifier_of("cat"), "of no use")
        for number in range(16):
            request = admit(model, encoder, str(number), f"other {number}")
            metadata = step_of(model, request)
            model.scheduler.request_finished(request)
        assert worker.run(pickle.loads(late)) == {}
        assert worker.run(metadata) == expected("other 15")


def test_a_pin_outlives_nothing(connector: str, encoder: Encoder, model: LanguageModel) -> None:
    """Not even if the memory is free and has the bytes still."""
    with worker_of(connector) as worker:
        late = pickle.dumps(step_of(model, admit(model, encoder, "late", "cat")))
        assert eventually(lambda: keeps_nothing(model.scheduler))
        assert worker.run(pickle.loads(late)) == {}


def test_more_than_an_encoder_lends_is_copied(connector: str, encoder: Encoder, model: LanguageModel) -> None:
    """A step may hold more than the share of a memory that is lent; nothing waits for it."""
    with worker_of(connector) as worker:
        held = []
        for number in range(7):  # a quarter of the encoder's memory, and what may be on its way, are four of these
            request = admit(model, encoder, str(number), str(number))
            held.append(step_of(model, request))
            model.scheduler.request_finished(request)
        for metadata in held:
            worker.run(metadata)
        assert worker.run(ECConnectorMetadata()) == expected(*map(str, range(7)))


def test_what_the_engine_has_is_not_brought_again_until_it_asks(
    connector: str, encoder: Encoder, model: LanguageModel
) -> None:
    with worker_of(connector) as worker:
        first = admit(model, encoder, "first", "cat")
        worker.run(step_of(model, first))
        model.scheduler.request_finished(first)
        second = model.admit("second", "cat", rows=ROWS)
        assert stage_of(model, "cat") is Stage.IDLE
        worker.forget()
        model.scheduler.expect({identifier_of("cat"): encoder.place})
        assert worker.run(step_of(model, second)) == expected("cat")


def test_memory_is_free_once_all_steps_are_over(connector: str, encoder: Encoder, model: LanguageModel) -> None:
    with worker_of(connector) as worker:

        def serve(number: int) -> None:
            request = admit(model, encoder, str(number), f"{number} a", f"{number} b")
            assert worker.run(step_of(model, request)) == expected(f"{number} a", f"{number} b")
            model.scheduler.request_finished(request)
            worker.forget()

        serve(0)
        assert eventually(lambda: keeps_nothing(model.scheduler))
        before = memory_open(os.getpid())
        for number in range(1, 16):  # twice as much as there is memory
            serve(number)
        assert eventually(lambda: keeps_nothing(model.scheduler))
        assert memory_open(os.getpid()) <= before
        if isinstance(model.scheduler, LandingConnector):
            assert model.scheduler._landing.arena.used_bytes == 0
        assert eventually(lambda: encoder.holding.num_unfetched() == 0)
        encoder.encode("all", torch.empty((4 << 20) - HEADER_BYTES, dtype=torch.uint8))
        assert memory_open(worker.pid) == memory_mapped(worker.pid) == 0


def test_a_worker_that_is_killed_holds_nothing(connector: str, encoder: Encoder, model: LanguageModel) -> None:
    with worker_of(connector) as worker:
        request = admit(model, encoder, "r", "cat")
        metadata = step_of(model, request)
        worker.run(metadata)
        worker.kill()
    with worker_of(connector) as other:
        assert other.run(metadata) == expected("cat")
    del metadata
    model.scheduler.request_finished(request)
    assert eventually(lambda: keeps_nothing(model.scheduler))
    assert eventually(lambda: encoder.holding.num_unfetched() == 0)
    encoder.encode("all", torch.empty((4 << 20) - HEADER_BYTES, dtype=torch.uint8))


# Producers


def test_a_worker_publishes_in_the_memory_of_its_scheduler(producer: Encoder, reader: LanguageModel) -> None:
    name = identifier_of("cat")
    assert producer.worker.place() is None
    assert not producer.scheduler.is_published(name)
    with publishing_worker() as worker:
        worker.run(producer.scheduler.build_connector_meta(), saves=("cat", ROWS))
        assert producer.scheduler.is_published(name)
        assert (producer.scheduler.stats.saves, producer.scheduler.num_unfetched()) == (1, 1)
    reader.scheduler.expect({name: producer.place})
    request = reader.admit("r", "cat", rows=ROWS)
    reader.load(request)
    assert bytes_of(reader.memory[name]) == expected("cat")[name]


def test_a_reader_that_waits_is_told_when_a_worker_publishes(producer: Encoder, reader: LanguageModel) -> None:
    name = identifier_of("cat")
    reader.scheduler.expect({name: producer.place})
    request = reader.admit("r", "cat", rows=ROWS)
    reader.step(request)
    with publishing_worker() as worker:
        worker.run(producer.scheduler.build_connector_meta(), saves=("cat", ROWS))
        reader.load(request)
    assert bytes_of(reader.memory[name]) == expected("cat")[name]


def test_what_is_published_already_is_not_written_again(producer: Encoder) -> None:
    with publishing_worker() as one, publishing_worker() as two:
        metadata = producer.scheduler.build_connector_meta()
        one.run(metadata, saves=("cat", ROWS))
        two.run(metadata, saves=("cat", ROWS))
    assert producer.scheduler.stats.saves == 1


def test_least_recently_used_embeddings_make_room_for_those_of_a_worker(producer: Encoder) -> None:
    with publishing_worker() as worker:
        for number in range(20):
            worker.run(producer.scheduler.build_connector_meta(), saves=(str(number), ROWS))
    published = [producer.scheduler.is_published(identifier_of(number)) for number in range(20)]
    assert published == sorted(published)
    assert 0 < sum(published) < 20
    assert producer.scheduler.stats.evictions == 20 - sum(published)


def test_what_can_never_fit_is_refused_and_evicts_nothing(producer: Encoder) -> None:
    with publishing_worker() as worker:
        metadata = producer.scheduler.build_connector_meta()
        worker.run(metadata, saves=("cat", ROWS))
        with pytest.raises(StorageError, match="raise --ec-max-bytes"):
            worker.run(metadata, saves=("dog", 64 * ROWS))
        assert producer.scheduler.is_published(identifier_of("cat"))
        worker.run(metadata, saves=("horse", ROWS))
    assert producer.scheduler.is_published(identifier_of("horse"))


def test_a_worker_that_dies_while_it_writes_gives_up_its_room(producer: Encoder) -> None:
    metadata = producer.scheduler.build_connector_meta()
    assert isinstance(metadata, PeerMetadata)
    assert metadata.publishing is not None
    free = producer.scheduler.free_bytes()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dying:
        dying.connect(metadata.publishing.socket)
        dying.send(msgspec.msgpack.encode(Reserve(identifier_of("cat"), "BF16", [ROWS, 64])))
        assert dying.recv(4096)
        assert producer.scheduler.free_bytes() != free
        assert not producer.scheduler.is_published(identifier_of("cat"))
    with publishing_worker() as worker:
        worker.run(metadata, saves=("cat", ROWS))  # waits until the room was given up
    assert producer.scheduler.is_published(identifier_of("cat"))


@pytest.mark.parametrize("said", [b"hello", b"\x81\xa4type\xa8complete", b"\x81\xa4type\xa7abandon"])
def test_a_process_that_talks_nonsense_is_disconnected(producer: Encoder, said: bytes) -> None:
    metadata = producer.scheduler.build_connector_meta()
    assert isinstance(metadata, PeerMetadata)
    assert metadata.publishing is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(metadata.publishing.socket)
        stranger.send(said)
        assert stranger.recv(4096) == b""
    with publishing_worker() as worker:
        worker.run(metadata, saves=("cat", ROWS))
    assert producer.scheduler.is_published(identifier_of("cat"))


def test_a_worker_whose_scheduler_has_ended_says_so(producer: Encoder) -> None:
    with publishing_worker() as worker:
        metadata = producer.scheduler.build_connector_meta()
        worker.run(metadata, saves=("cat", ROWS))
        producer.close()
        with pytest.raises(StorageError, match="can't be reached"):
            worker.run(metadata, saves=("dog", ROWS))
        with pytest.raises(StorageError, match="can't be reached"):
            worker.run(metadata, saves=("dog", ROWS))


def test_before_the_first_step_nothing_is_published() -> None:
    encoder = Encoder("TcpConnector", **SETTINGS)
    encoder.close()
    unbound = type(encoder.worker)(encoder.worker.config, encoder.worker.role)
    with pytest.raises(StorageError, match="No step has said yet"):
        unbound.save_caches({identifier_of("cat"): embedding_of("cat")}, identifier_of("cat"))
    assert unbound.stats.save_failures == 1


def test_an_encoder_that_has_ended_leaves_nothing_open() -> None:
    opened, mapped = memory_open(os.getpid()), memory_mapped(os.getpid())
    encoder = Encoder("TcpConnector", **SETTINGS)
    metadata = encoder.scheduler.build_connector_meta()
    assert isinstance(metadata, PeerMetadata)
    assert metadata.publishing is not None
    with publishing_worker() as worker:
        worker.run(metadata, saves=("cat", ROWS))
        encoder.encode("dog")
        encoder.close()
    del encoder
    gc.collect()
    assert eventually(lambda: memory_open(os.getpid()) <= opened and memory_mapped(os.getpid()) <= mapped)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late, pytest.raises(ConnectionRefusedError):
        late.connect(metadata.publishing.socket)
