"""What an encoder or a language model says that follows no protocol ends its connection and harms nothing else."""

from __future__ import annotations

import contextlib
import gc
import socket
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from chiasm.ec_transfer import holder
from chiasm.ec_transfer.peer_messages import PROTOCOL, PROTOCOL_VERSION, Forget, Here, HolderMessage, Want, Welcome
from chiasm.fleet_key import make_nonce
from chiasm.transfer.greeting import Challenge, Hello, Proven
from chiasm.transfer.memory import Peer
from chiasm.wire import ECPlace
from tests.transfer.holder import PATIENCE_SECONDS, Stranger

from .instance import embedding_of, identifier_of
from .peers import Encoder, LanguageModel

TESTED = ("SharedMemoryConnector", "NixlConnector")
"""What travels on the channel is the same with TcpConnector, whose false holder would have to lend its data connections too."""
CAT = identifier_of("cat")
LONGEST = struct.pack(">I", (1 << 32) - 1)
"""The beginning of the longest frame that there can be."""


def packed(message: dict[str, Any]) -> bytes:
    body = msgspec.msgpack.encode(message)
    return struct.pack(">I", len(body)) + body


def here(**changes: Any) -> dict[str, Any]:
    said = {"type": "here", "identifier": CAT, "offset": 0, "dtype": "BF16", "shape": [4, 64], "checksum": ""}
    return said | {"granted": False} | changes


class Connection(Stranger):
    """One end of a connection that is open already."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(PATIENCE_SECONDS)

    def wait_for_the_end(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(1 << 16):
                pass


class FalseReader(Connection):
    """A language model that says what a test wants, once it has been greeted."""

    def __init__(self, encoder: Encoder) -> None:
        place = encoder.place
        super().__init__(socket.create_connection(Peer(place.host, place.port)))
        self.hear_challenge()
        terms = {"connector": encoder.worker.config.connector, "fingerprint": "5eed"}
        self.say(Hello(PROTOCOL, PROTOCOL_VERSION, place.engine_id, make_nonce(), b"", terms))
        assert msgspec.msgpack.decode(self.hear_frame(), type=Proven)
        self.welcome = msgspec.msgpack.decode(self.hear_frame(), type=Welcome)


class FalseHolder:
    """An encoder that says what a test wants. It lends the memory of a real one."""

    def __init__(self, lender: Encoder) -> None:
        reader = FalseReader(lender)
        self._welcome = reader.welcome
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE_SECONDS)
        self.place = ECPlace(host="127.0.0.1", port=self._listener.getsockname()[1], engine_id="false")
        self._connections: list[Connection] = [reader]

    def accept(self) -> Connection:
        """Welcome the language model that comes, and hear what it wants."""
        connection = Connection(self._listener.accept()[0])
        self._connections.append(connection)
        connection.say(Challenge(make_nonce()))
        assert msgspec.msgpack.decode(connection.hear_frame(), type=Hello)
        connection.say(Proven(b""))
        connection.say(self._welcome)
        assert msgspec.msgpack.decode(connection.hear_frame(), type=Want).identifier == CAT
        return connection

    def close(self) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.socket.close()


@pytest.fixture(params=TESTED)
def encoder(request: pytest.FixtureRequest) -> Iterator[Encoder]:
    with contextlib.closing(Encoder(request.param)) as encoder:
        yield encoder


@pytest.fixture
def model(encoder: Encoder) -> Iterator[LanguageModel]:
    with contextlib.closing(LanguageModel(encoder.worker.config.connector)) as model:
        yield model


@pytest.fixture
def false_holder(encoder: Encoder) -> Iterator[FalseHolder]:
    with contextlib.closing(FalseHolder(encoder)) as false_holder:
        yield false_holder


@pytest.fixture
def false_reader(encoder: Encoder) -> Iterator[FalseReader]:
    reader = FalseReader(encoder)
    yield reader
    reader.socket.close()


LIES = {
    "the longest frame": LONGEST,
    "an offset of 2^63 bytes": packed(here(offset=1 << 63, granted=True)),
    "an offset outside the memory": packed(here(offset=(1 << 62) - 1, granted=True)),
    "a size beyond 2^63 bytes": packed(here(shape=[1 << 40, 1 << 40], granted=True)),
    "another welcome": packed({"type": "welcome", "memory": b"", "num_bytes": 1}),
}


@pytest.mark.parametrize("said", LIES.values(), ids=LIES.keys())
def test_an_encoder_that_lies_is_given_up(
    false_holder: FalseHolder, encoder: Encoder, model: LanguageModel, said: bytes
) -> None:
    request = model.admit("r", "cat")
    model.scheduler.expect({CAT: false_holder.place})
    connection = false_holder.accept()
    connection.socket.sendall(said)
    connection.wait_for_the_end()
    assert_comes_from(encoder, model, request)


def test_a_torn_frame_of_an_encoder_is_no_embedding(
    false_holder: FalseHolder, encoder: Encoder, model: LanguageModel
) -> None:
    request = model.admit("r", "cat")
    model.scheduler.expect({CAT: false_holder.place})
    connection = false_holder.accept()
    whole = packed(here(granted=True))
    connection.socket.sendall(whole[: len(whole) // 2])
    connection.socket.close()
    model.lose(request)
    assert_comes_from(encoder, model, request)


def test_an_embedding_that_claims_2_to_the_63_bytes_is_refused(
    false_holder: FalseHolder, encoder: Encoder, model: LanguageModel
) -> None:
    request = model.admit("r", "cat")
    model.scheduler.expect({CAT: false_holder.place})
    connection = false_holder.accept()
    connection.socket.sendall(packed(here(shape=[(1 << 31) - 1, (1 << 31) - 1], granted=True)))
    assert msgspec.msgpack.decode(connection.hear_frame(), type=Forget).identifier == CAT
    assert_comes_from(encoder, model, request)


@pytest.mark.parametrize(
    "said",
    [LONGEST, packed({"type": "want", "identifier": CAT, "room_bytes": 1 << 63}), packed({"type": "want"})[:-1] + b"?"],
    ids=["the longest frame", "room for 2^63 bytes", "no message"],
)
def test_a_language_model_that_says_something_else_is_disconnected(
    encoder: Encoder, model: LanguageModel, false_reader: FalseReader, said: bytes
) -> None:
    false_reader.socket.sendall(said)
    assert false_reader.is_closed()
    assert_comes_from(encoder, model, model.admit("r", "cat"))


def test_a_torn_frame_of_a_language_model_keeps_nobody_waiting(
    encoder: Encoder, model: LanguageModel, false_reader: FalseReader
) -> None:
    whole = packed({"type": "want", "identifier": CAT, "room_bytes": 1 << 20})
    false_reader.socket.sendall(whole[: len(whole) // 2])
    assert_comes_from(encoder, model, model.admit("r", "cat"))


def test_who_is_granted_what_it_waited_for_and_says_nothing_is_disconnected(
    encoder: Encoder, false_reader: FalseReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "MAX_READING_SECONDS", 0.2)
    false_reader.say(Want(CAT, 1 << 20))
    false_reader.say(Want(identifier_of("dog")))
    encoder.encode("dog")
    assert not hear(false_reader).granted
    encoder.encode("cat")
    assert hear(false_reader).granted
    assert false_reader.is_closed()


def test_an_encoder_that_closes_also_closes_what_has_just_connected() -> None:
    with warnings.catch_warnings(record=True) as unclosed:
        warnings.simplefilter("always", ResourceWarning)
        for _ in range(20):  # in some of them, it has accepted a connection and not handed it over yet
            encoder = Encoder("TcpConnector")
            with contextlib.ExitStack() as connections:
                for _ in range(3):
                    address = (encoder.place.host, encoder.place.port)
                    connections.enter_context(socket.create_connection(address))
                encoder.close()
        gc.collect()
    assert [str(warning.message) for warning in unclosed if "_SelectorSocketTransport" in str(warning.message)] == []


def hear(reader: FalseReader) -> Here:
    message: HolderMessage = msgspec.msgpack.decode(reader.hear_frame(), type=HolderMessage)
    assert isinstance(message, Here)
    return message


def assert_comes_from(encoder: Encoder, model: LanguageModel, request: Any) -> None:
    encoder.encode("cat")
    model.scheduler.expect({CAT: encoder.place})
    model.load(request)
    assert torch.equal(model.memory[CAT], embedding_of("cat"))
