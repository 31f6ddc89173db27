"""The network between an encoder and a language model fails, or the encoder does while its bytes are on their way: what should
come, comes from elsewhere, or when it is back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from chiasm.ec_transfer import reader
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.transfer import channel, nixl, tcp
from tests.hosts import Host, Network
from tests.launch.waiting import eventually

from .instance import Request, embedding_of, identifier_of
from .peers import PATIENCE_SECONDS, Encoder, LanguageModel
from .processes import EncoderProcess, stopped

VARIABLE = "CHIASM_TEST_CONNECTOR"
CONNECTOR = os.environ.get(VARIABLE, "TcpConnector")
NUM_ROWS = 1 << 14
BIG = embedding_of("big", NUM_ROWS)
"""2 MiB."""
SLOW_BITS_PER_SECOND = 8 * BIG.nbytes // 32
"""So BIG takes half a minute, far longer than what happens to it meanwhile."""
FAST_BITS_PER_SECOND = 1_000_000_000
DETECTION_SECONDS = 2.0
LONG_SECONDS = 100.0


class Fleet(NamedTuple):
    host: Host
    """Where the encoder is."""
    encoder: EncoderProcess
    model: LanguageModel
    nearby: Encoder
    """Another one, which is always reached."""

    def wait_for_word(self, name: str) -> None:
        """Return when model and encoder have spoken to each other."""
        identifier = self.encoder.encode(name)
        self.model.scheduler.expect({identifier: self.encoder.place})
        self.model.load(self.model.admit(name, name))

    def wait_for_bytes(self, count: int) -> None:
        """Return when so many more have left the encoder's host."""
        end = self.host.sent_bytes + count
        assert eventually(lambda: self.host.sent_bytes >= end, PATIENCE_SECONDS)

    def begin(self) -> Request:
        """Return when the model has been granted what is big, and some of it has come."""
        name = self.encoder.encode("big", NUM_ROWS)
        self.host.slow_down(SLOW_BITS_PER_SECOND)
        request = self.model.admit("r", "big", rows=NUM_ROWS)
        self.model.scheduler.expect({name: self.encoder.place})
        self.wait_for_bytes(BIG.nbytes // 32)
        return request

    def encode_nearby(self, name: str, embedding: torch.Tensor) -> None:
        """What the proxy does with an item that is awaited."""
        identifier = self.nearby.encode(name, embedding)
        self.model.scheduler.expect({identifier: self.nearby.place})

    def check_big(self, request: Request) -> None:
        """What was lost comes from elsewhere."""
        self.model.lose(request)
        self.encode_nearby("big", BIG)
        self.model.load(request)
        assert torch.equal(self.model.memory[identifier_of("big")], BIG)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with Network(2) as hosts:
        yield hosts


@pytest.fixture
def fleet(hosts: list[Host]) -> Iterator[Fleet]:
    key = FleetKey([make_fleet_key()])
    there, here = hosts
    there.plug()
    there.slow_down(FAST_BITS_PER_SECOND)
    with contextlib.ExitStack() as stack:
        encoder = stack.enter_context(
            EncoderProcess(CONNECTOR, there, host=there.address, fleet_key=key, max_bytes=2 * BIG.nbytes)
        )
        with here.inside():
            nearby = stack.enter_context(contextlib.closing(Encoder(CONNECTOR, host=here.address, fleet_key=key)))
            model = stack.enter_context(contextlib.closing(LanguageModel(CONNECTOR, fleet_key=key)))
        yield Fleet(there, encoder, model, nearby)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of which nothing comes is given up soon."""
    monkeypatch.setattr(tcp, "PATIENCE_SECONDS", DETECTION_SECONDS)
    monkeypatch.setattr(nixl, "_PATIENCE_SECONDS", 0.2)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read is given up only after a time that no machine needs."""
    monkeypatch.setattr(reader, "ANSWER_SECONDS", LONG_SECONDS)
    monkeypatch.setattr(tcp, "PATIENCE_SECONDS", LONG_SECONDS)


def test_word_that_an_embedding_is_there_comes_when_the_link_is_back(fleet: Fleet) -> None:
    fleet.wait_for_word("hello")
    request = fleet.model.admit("r", "cat")
    fleet.model.scheduler.expect({identifier_of("cat"): fleet.encoder.place})
    fleet.host.unplug()
    fleet.encoder.encode("cat")
    fleet.host.plug()
    fleet.model.load(request)
    assert torch.equal(fleet.model.memory[identifier_of("cat")], embedding_of("cat"))


def test_an_embedding_whose_link_is_down_comes_from_elsewhere(fleet: Fleet) -> None:
    fleet.wait_for_word("hello")
    request = fleet.model.admit("r", "cat")
    fleet.model.scheduler.expect({identifier_of("cat"): fleet.encoder.place})
    fleet.host.unplug()
    fleet.encoder.encode("cat")
    assert not fleet.model.scheduler.is_coming(identifier_of("cat"))
    fleet.encode_nearby("cat", embedding_of("cat"))
    fleet.model.load(request)
    assert torch.equal(fleet.model.memory[identifier_of("cat")], embedding_of("cat"))


def test_an_encoder_that_cant_be_reached_is_given_up(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reader, "ANSWER_SECONDS", DETECTION_SECONDS)
    fleet.host.unplug()
    request = fleet.model.admit("r", "cat")
    fleet.model.scheduler.expect({identifier_of("cat"): fleet.encoder.place})
    assert eventually(lambda: "Gave up encoder" in caplog.text, PATIENCE_SECONDS)
    fleet.model.lose(request)


def test_an_encoder_that_vanishes_with_what_it_was_asked_for_is_given_up(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(channel, "VANISHED_SECONDS", DETECTION_SECONDS)
    fleet.wait_for_word("hello")
    fleet.host.unplug()
    request = fleet.model.admit("r", "cat")
    fleet.model.scheduler.expect({identifier_of("cat"): fleet.encoder.place})
    assert eventually(lambda: "Gave up encoder" in caplog.text, PATIENCE_SECONDS)
    fleet.model.lose(request)
    fleet.host.plug()
    fleet.encoder.encode("cat")
    fleet.model.scheduler.expect({identifier_of("cat"): fleet.encoder.place})
    fleet.model.load(request)


@pytest.mark.usefixtures("impatient")
def test_bytes_that_stop_coming_come_from_elsewhere(fleet: Fleet) -> None:
    request = fleet.begin()
    fleet.host.unplug()
    fleet.check_big(request)


@pytest.mark.usefixtures("patient")
def test_bytes_that_stop_for_a_moment_come_when_the_link_is_back(fleet: Fleet) -> None:
    request = fleet.begin()
    fleet.host.unplug()
    fleet.host.slow_down(FAST_BITS_PER_SECOND)
    fleet.host.plug()
    fleet.model.load(request)
    assert torch.equal(fleet.model.memory[identifier_of("big")], BIG)


def test_bytes_of_an_encoder_that_is_killed_among_them_come_from_elsewhere(fleet: Fleet) -> None:
    request = fleet.begin()
    fleet.encoder.kill()
    fleet.check_big(request)


@pytest.mark.usefixtures("impatient")
def test_bytes_of_an_encoder_that_is_stopped_among_them_come_from_elsewhere(fleet: Fleet) -> None:
    request = fleet.begin()
    with stopped(fleet.encoder):
        fleet.check_big(request)
    if CONNECTOR == "NixlConnector":
        return  # UCX may abort an encoder that goes on with a read that was broken off, see docs/connector.md
    fleet.encoder.check_all_is_free()
    fleet.wait_for_word("hello")


def test_what_has_come_stays_when_the_link_is_down_and_is_held_nowhere(fleet: Fleet) -> None:
    name = fleet.encoder.encode("cat")
    first, second = fleet.model.admit("1", "cat"), fleet.model.admit("2", "dog")
    fleet.model.scheduler.expect({name: fleet.encoder.place})
    fleet.model.load(first)
    fleet.host.unplug()
    fleet.encode_nearby("dog", embedding_of("dog"))
    fleet.model.load(second)
    assert torch.equal(fleet.model.memory[name], embedding_of("cat"))
    fleet.model.finish(first)
    fleet.host.plug()
    fleet.encoder.check_all_is_free()
    fleet.wait_for_word("hello")


@pytest.mark.skipif(CONNECTOR != "TcpConnector", reason="this is the process of its own")
def test_all_of_this_with_nixl() -> None:
    """In a process of its own, since UCX keeps what it has seen of the network of the first host that it was used on."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {VARIABLE: "NixlConnector", "UCX_TLS": "tcp"}  # there is no other way from host to host
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
