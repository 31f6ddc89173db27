"""What goes wrong between an encoder and a language model costs an embedding, which comes from elsewhere, and nothing more."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from chiasm.ec_transfer import reader
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.wire import ECPlace

from .instance import embedding_of, identifier_of
from .peers import Encoder, LanguageModel

ROOT = Path(__file__).parents[2]
TESTED = ("SharedMemoryConnector", "TcpConnector")
NUM_ROUNDS = 60
"""Of random faults. More are run by hand."""


class Process:
    """An encoder in a process of its own."""

    def __init__(self, connector: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ec_connector.encoder_process", connector],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.place = msgspec.json.decode(self._line(), type=ECPlace)

    def encode(self, name: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return self._line().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(params=TESTED)
def connector(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def process(connector: str) -> Iterator[Process]:
    process = Process(connector)
    yield process
    process.end()


@pytest.fixture
def model(connector: str) -> Iterator[LanguageModel]:
    model = LanguageModel(connector)
    yield model
    model.close()


def test_a_killed_encoder_loses_what_should_come_and_nothing_that_came(process: Process, model: LanguageModel) -> None:
    cat = process.encode("cat")
    model.scheduler.expect({cat: process.place, identifier_of("dog"): process.place})
    first, second = model.admit("1", "cat"), model.admit("2", "dog")
    model.load(first)
    process.end()
    model.lose(second)
    with contextlib.closing(Encoder(model.scheduler.config.connector)) as other:
        other.encode("dog")
        model.scheduler.expect({identifier_of("dog"): other.place})
        model.load(second)
    assert torch.equal(model.memory[cat], embedding_of("cat"))
    assert torch.equal(model.memory[identifier_of("dog")], embedding_of("dog"))


def test_a_stopped_encoder_is_given_up(process: Process, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "ANSWER_SECONDS", 0.5)
    cat = process.encode("cat")
    process.send(signal.SIGSTOP)
    model.scheduler.expect({cat: process.place})
    model.lose(model.admit("r", "cat"))


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


def test_random_faults_leave_no_wrong_byte_and_nothing_behind(connector: str) -> None:
    run_random_faults(connector, NUM_ROUNDS, seed=7)


def run_random_faults(connector: str, num_rounds: int, seed: int) -> None:
    """Two encoders that are restarted, evict and lose at random, and requests that end at any moment."""
    chance = random.Random(seed)
    settings = {"max_bytes": 1 << 20, "receive_bytes": 1 << 18}
    encoders = [Encoder(connector, **settings) for _ in range(2)]
    model = LanguageModel(connector, **settings)
    descriptors = len(os.listdir("/proc/self/fd"))
    names = [f"image {number}" for number in range(12)]
    expected = {identifier_of(name): embedding_of(name, rows=chance.choice((1, 300, 700))) for name in names}
    rows = {name: len(expected[identifier_of(name)]) for name in names}
    for number in range(num_rounds):
        wanted = chance.sample(names, chance.randint(1, 3))
        request = model.admit(str(number), *wanted, rows=max(rows[name] for name in wanted))
        model.scheduler.expect({identifier_of(name): chance.choice(encoders).place for name in wanted})
        for _ in range(chance.randint(0, 3)):
            which = chance.randrange(2)
            if chance.random() < 0.1:
                encoders[which].close()
                encoders[which] = Encoder(connector, **settings)
            elif chance.random() < 0.2:
                encoders[which].worker.discard(identifier_of(chance.choice(names)), "of chance")
            else:
                name = chance.choice(names)
                encoders[which].encode(name, expected[identifier_of(name)])
        if chance.random() < 0.8:
            while any(identifier_of(name) not in model.memory for name in wanted):
                for name in wanted:  # what the proxy does
                    if identifier_of(name) not in model.memory and not model.scheduler.is_coming(identifier_of(name)):
                        encoder = chance.choice(encoders)
                        encoder.encode(name, expected[identifier_of(name)])
                        model.scheduler.expect({identifier_of(name): encoder.place})
                model.next_wake(request)
            for name in wanted:
                assert torch.equal(model.memory[identifier_of(name)], expected[identifier_of(name)])
        model.finish(request)
    gc.collect()
    for encoder in encoders:  # all of its memory is free again, or can be freed
        big = embedding_of("big", rows=(encoder.worker.max_entry_bytes - 4096) // 128)
        encoder.encode("big", big)
        encoder.close()
    model.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
