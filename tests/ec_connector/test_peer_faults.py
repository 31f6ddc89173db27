"""What goes wrong between an encoder and a language model costs an embedding, which comes from elsewhere, and nothing more."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from chiasm.ec_transfer import reader
from chiasm.ec_transfer.peers import PeerConnector
from chiasm.fleet_key import FleetKey, make_fleet_key
from tests.launch.waiting import eventually

from .instance import embedding_of, identifier_of
from .peers import CONNECTORS, Encoder, LanguageModel
from .processes import EncoderProcess, stopped

CAT, DOG = identifier_of("cat"), identifier_of("dog")
BIG_ROWS = 1 << 14
"""Of an embedding of 2 MiB."""


@pytest.fixture(params=CONNECTORS)
def connector(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def process(connector: str) -> Iterator[EncoderProcess]:
    with EncoderProcess(connector) as process:
        yield process


@pytest.fixture
def model(connector: str) -> Iterator[LanguageModel]:
    model = LanguageModel(connector)
    yield model
    model.close()


@pytest.fixture
def other(connector: str) -> Iterator[Encoder]:
    """Another encoder, to which nothing happens."""
    with contextlib.closing(Encoder(connector)) as other:
        yield other


def holds(model: LanguageModel, *names: str) -> bool:
    return all(torch.equal(model.memory[identifier_of(name)], embedding_of(name)) for name in names)


def memory_of_encoders() -> dict[int, int]:
    """Return how many bytes the memory files of encoders take of which this process has descriptors, by their inodes."""
    found: dict[int, int] = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:chiasm-ec "):
                status = os.stat(f"/proc/self/fd/{descriptor}")
                found[status.st_ino] = 512 * status.st_blocks
    return found


def wait_until_wanted(process: EncoderProcess, model: LanguageModel, name: str) -> None:
    """Return when an encoder has heard that this is wanted, which it doesn't have: it has heard all that was said before
    something that it has come."""
    model.scheduler.expect({identifier_of(name): process.place})
    hello = process.encode("hello")
    model.scheduler.expect({hello: process.place})
    request = model.admit("hello", "hello")
    model.load(request)
    model.finish(request)


def test_a_killed_encoder_loses_what_should_come_and_nothing_that_came(
    process: EncoderProcess, other: Encoder, model: LanguageModel
) -> None:
    process.encode("cat")
    model.scheduler.expect(dict.fromkeys((CAT, DOG), process.place))
    first, second = model.admit("1", "cat"), model.admit("2", "dog")
    model.load(first)
    process.kill()
    model.lose(second)
    other.encode("dog")
    model.scheduler.expect({DOG: other.place})
    model.load(second)
    assert holds(model, "cat", "dog")


def test_an_encoder_that_is_stopped_before_it_is_met_is_given_up(
    process: EncoderProcess, other: Encoder, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.encode("cat")
    request = model.admit("r", "cat")
    with stopped(process), monkeypatch.context() as impatient:
        impatient.setattr(reader, "ANSWER_SECONDS", 0.5)
        model.scheduler.expect({CAT: process.place})
        model.lose(request)
    other.encode("cat")
    model.scheduler.expect({CAT: other.place})
    model.load(request)
    assert holds(model, "cat")
    process.check_all_is_free()


@pytest.mark.parametrize("seconds", [3600.0, 0.0])
def test_what_is_wanted_of_an_encoder_that_is_being_met_is_coming_for_a_while(
    process: EncoderProcess, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """On a slow link the proxy asks before the encoder can have answered."""
    monkeypatch.setattr(reader, "_MEETING_SECONDS", seconds)
    process.encode("cat")
    request = model.admit("r", "cat")
    with stopped(process):
        model.scheduler.expect({CAT: process.place})
        holders = model.holders
        assert eventually(lambda: process.place in holders)
        assert model.scheduler.is_coming(CAT) is (seconds > 0)
    model.load(request)
    assert holds(model, "cat")


def test_what_is_wanted_of_an_encoder_that_is_stopped_comes_from_elsewhere(
    process: EncoderProcess, other: Encoder, model: LanguageModel
) -> None:
    """When it goes on, it makes the embedding as well, and nobody keeps that from being evicted."""
    request = model.admit("r", "cat")
    wait_until_wanted(process, model, "cat")
    with stopped(process):
        process.tell("cat")
        assert not model.scheduler.is_coming(CAT)  # so the proxy has it encoded
        other.encode("cat")
        model.scheduler.expect({CAT: other.place})
        model.load(request)
    assert process.hear() == CAT
    assert holds(model, "cat")
    model.finish(request)
    process.check_all_is_free()


def test_what_is_wanted_of_an_encoder_that_is_stopped_for_a_while_comes_then(
    process: EncoderProcess, model: LanguageModel
) -> None:
    request = model.admit("r", "cat")
    wait_until_wanted(process, model, "cat")
    with stopped(process):
        process.tell("cat")
        model.step(request)
        assert CAT not in model.memory
    model.load(request)
    assert holds(model, "cat")
    assert process.hear() == CAT


def test_an_encoder_that_is_killed_while_it_stands_still_loses_what_is_wanted_of_it(
    process: EncoderProcess, other: Encoder, model: LanguageModel
) -> None:
    request = model.admit("r", "cat")
    wait_until_wanted(process, model, "cat")
    process.stop()
    process.kill()
    model.lose(request)
    other.encode("cat")
    model.scheduler.expect({CAT: other.place})
    model.load(request)
    assert holds(model, "cat")


def test_what_has_come_stays_when_its_encoder_is_stopped_and_holds_nothing_there(
    process: EncoderProcess, other: Encoder, model: LanguageModel
) -> None:
    process.encode("cat")
    first = model.admit("1", "cat")
    model.scheduler.expect({CAT: process.place})
    model.load(first)
    with stopped(process):
        assert holds(model, "cat")
        second = model.admit("2", "dog")
        other.encode("dog")
        model.scheduler.expect({DOG: other.place})
        model.load(second)
        assert holds(model, "cat", "dog")
        model.finish(first)
        gc.collect()
    process.check_all_is_free()
    process.encode("cat")
    third = model.admit("3", "cat")
    model.scheduler.expect({CAT: process.place})
    model.load(third)
    assert holds(model, "cat")


@pytest.mark.parametrize("is_killed", [False, True])
def test_of_the_memory_of_an_encoder_that_has_ended_only_what_is_in_use_stays(is_killed: bool) -> None:
    with (
        contextlib.closing(LanguageModel("SharedMemoryConnector")) as model,
        EncoderProcess("SharedMemoryConnector") as process,
    ):
        process.encode("large", BIG_ROWS)
        process.encode("cat")
        model.scheduler.expect({CAT: process.place})
        others = memory_of_encoders()
        model.load(model.admit("r", "cat"))
        (file,) = memory_of_encoders().keys() - others
        assert memory_of_encoders()[file] > embedding_of("large", BIG_ROWS).nbytes
        if is_killed:
            process.kill()
        else:
            process.end()
        assert eventually(lambda: memory_of_encoders()[file] <= 4 * mmap.PAGESIZE)
        assert holds(model, "cat")


def test_an_encoder_is_not_given_up_for_the_time_that_reads_from_others_take(
    other: Encoder, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.encode("cat")
    request = model.admit("r", "cat")
    assert isinstance(model.scheduler, PeerConnector)
    assert model.scheduler._reader is not None
    pool, are_over = model.scheduler._reader._pool, threading.Event()
    for _ in range(reader.MAX_READING):
        pool.submit(are_over.wait)
    model.scheduler.expect({CAT: other.place})
    assert eventually(lambda: pool._work_queue.qsize() > 0 or model.scheduler.layout_of(CAT) is not None)
    monkeypatch.setattr(reader, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 100.0))
    are_over.set()
    model.load(request)
    assert holds(model, "cat")


def test_an_encoder_of_another_fleet_is_not_believed(connector: str) -> None:
    ours, theirs = FleetKey([make_fleet_key()]), FleetKey([make_fleet_key()])
    with (
        contextlib.closing(Encoder(connector, fleet_key=theirs)) as stranger,
        contextlib.closing(Encoder(connector, fleet_key=ours)) as encoder,
        contextlib.closing(LanguageModel(connector, fleet_key=ours)) as model,
    ):
        name = stranger.encode("cat")
        request = model.admit("r", "cat")
        model.scheduler.expect({name: stranger.place})
        model.lose(request)
        encoder.encode("cat")
        model.scheduler.expect({name: encoder.place})
        model.load(request)
        assert torch.equal(model.memory[name], embedding_of("cat"))
