"""The network between an encoder and a language model fails: what should come, comes from elsewhere, or when it is back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from chiasm.ec_transfer import reader
from chiasm.fleet_key import FleetKey, make_fleet_key
from chiasm.transfer import channel, tcp
from tests.hosts import Host, Network
from tests.launch.waiting import eventually

from .instance import embedding_of, identifier_of
from .peers import PATIENCE_SECONDS, Encoder, LanguageModel

NUM_ROWS = 1 << 14
BIG = embedding_of("big", NUM_ROWS)
"""2 MiB, which take two seconds when the encoder's host is slow."""
BITS_PER_SECOND = 8 * BIG.nbytes // 2
DETECTION_SECONDS = 2.0


class Fleet(NamedTuple):
    host: Host
    """Where the encoder is."""
    encoder: Encoder
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
        while self.host.sent_bytes < end:
            time.sleep(0.01)

    def encode_nearby(self, name: str, embedding: torch.Tensor) -> None:
        """What the proxy does with an item that is awaited."""
        identifier = self.nearby.encode(name, embedding)
        self.model.scheduler.expect({identifier: self.nearby.place})


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with Network(2) as hosts:
        hosts[0].slow_down(BITS_PER_SECOND)
        yield hosts


@pytest.fixture
def fleet(hosts: list[Host]) -> Iterator[Fleet]:
    key = FleetKey([make_fleet_key()])
    there, here = hosts
    there.plug()
    with contextlib.ExitStack() as stack:
        with there.inside():
            encoder = stack.enter_context(
                contextlib.closing(Encoder("TcpConnector", host=there.address, fleet_key=key))
            )
        with here.inside():
            nearby = stack.enter_context(contextlib.closing(Encoder("TcpConnector", host=here.address, fleet_key=key)))
            model = stack.enter_context(contextlib.closing(LanguageModel("TcpConnector", fleet_key=key)))
        yield Fleet(there, encoder, model, nearby)


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


def test_bytes_that_stop_coming_come_from_elsewhere(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "PATIENCE_SECONDS", DETECTION_SECONDS)
    name = fleet.encoder.encode("big", BIG)
    request = fleet.model.admit("r", "big", rows=NUM_ROWS)
    fleet.model.scheduler.expect({name: fleet.encoder.place})
    fleet.wait_for_bytes(BIG.nbytes // 8)
    fleet.host.unplug()
    fleet.model.lose(request)
    fleet.encode_nearby("big", BIG)
    fleet.model.load(request)
    assert torch.equal(fleet.model.memory[name], BIG)


def test_bytes_that_stop_for_a_moment_come_when_the_link_is_back(fleet: Fleet) -> None:
    name = fleet.encoder.encode("big", BIG)
    request = fleet.model.admit("r", "big", rows=NUM_ROWS)
    fleet.model.scheduler.expect({name: fleet.encoder.place})
    fleet.wait_for_bytes(BIG.nbytes // 8)
    fleet.host.unplug()
    fleet.host.plug()
    fleet.model.load(request)
    assert torch.equal(fleet.model.memory[name], BIG)
