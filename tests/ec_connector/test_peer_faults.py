"""What goes wrong between an encoder and a language model costs an embedding, which comes from elsewhere, and nothing more."""

from __future__ import annotations

import contextlib
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
