"""Who is let in: those that have the fleet's key and the same terms, and without a key processes of this host."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import msgspec
import pytest

from chiasm.errors import ConfigurationError
from chiasm.fleet_key import FleetKey, Handshake, Side, make_fleet_key, make_nonce
from chiasm.http.flood import FloodLimit
from chiasm.transfer import listener
from chiasm.transfer.errors import TransferError
from chiasm.transfer.greeting import Hello, Proven, Terms, Unwelcome, open_channel
from chiasm.transfer.listener import Listener
from chiasm.transfer.memory import Peer
from chiasm.transfer.shared_memory import SharedMemoryPlane

from .holder import ECHO, PATIENCE_SECONDS, TERMS, Echo, Holder, Stranger, stranger

KEY, OTHER_KEY = FleetKey([make_fleet_key()]), FleetKey([make_fleet_key()])


def with_key(key: FleetKey | None, **changes: Any) -> Terms:
    return dataclasses.replace(TERMS, key=key, **changes)


class Start(Protocol):
    def __call__(self, terms: Terms = ..., **settings: Any) -> Holder: ...


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def start(terms: Terms = TERMS, **settings: Any) -> Holder:
            holder = Holder(SharedMemoryPlane(), terms, **settings)
            stack.callback(holder.close)
            return holder

        yield start


def greet(holder: Holder, terms: Terms, engine_id: str = "E") -> None:
    """Open a channel as a reader, and use it. Raises TransferError."""

    async def greet() -> None:
        channel = await open_channel(holder.peer, engine_id, terms, ECHO, PATIENCE_SECONDS)
        channel.send(Echo("here"))
        assert await channel.receive() == Echo("here")
        channel.close()

    asyncio.run(greet())


def hello_to(connection: Stranger, terms: Terms, side: Side = Side.CALLER) -> Hello:
    """The right hello, or one with the proof of the other side."""
    nonce = make_nonce()
    handshake = Handshake(
        protocol=terms.protocol,
        version=terms.version,
        engine_id="E",
        caller_nonce=nonce,
        listener_nonce=connection.hear_challenge().nonce,
    )
    proof = b"" if terms.key is None else terms.key.prove(side, handshake)
    return Hello(terms.protocol, terms.version, "E", nonce, proof, dict(terms.values))


def reply_to(connection: Stranger, hello: Hello) -> Proven | Unwelcome:
    connection.say(hello)
    return msgspec.msgpack.decode(connection.hear_frame(), type=Proven | Unwelcome)


@pytest.mark.parametrize("key", [None, KEY], ids=["without a key", "with a key"])
def test_the_same_on_both_sides(start: Start, key: FleetKey | None) -> None:
    greet(start(with_key(key)), with_key(key))


def test_while_a_key_is_being_changed_both_are_accepted(start: Start) -> None:
    old, new = make_fleet_key(), make_fleet_key()
    holder = start(with_key(FleetKey([new, old])))
    greet(holder, with_key(FleetKey([old, new])))
    with pytest.raises(TransferError, match="no proof of the fleet key"):
        greet(holder, with_key(FleetKey([old])))  # it doesn't know the key with which the holder proves
    greet(holder, with_key(FleetKey([new])))


@pytest.mark.parametrize(("theirs", "ours"), [(KEY, OTHER_KEY), (KEY, None), (None, KEY)])
def test_another_key_is_refused_by_whoever_has_one(
    start: Start, theirs: FleetKey | None, ours: FleetKey | None
) -> None:
    with pytest.raises(TransferError, match="no proof of the fleet key came; give both sides the same"):
        greet(start(with_key(theirs)), with_key(ours))


def test_who_has_no_proof_is_told_the_same_whatever_it_says(start: Start) -> None:
    """So it learns neither what the holder is nor what it speaks."""
    holder = start(with_key(KEY))
    replies = set()
    changes: list[dict[str, Any]] = [{}, {"protocol": "x"}, {"version": 9}, {"engine_id": "F"}, {"terms": {}}]
    for change in [*changes, {"proof": b"x" * 32}]:
        with stranger(holder.peer) as connection:
            hello = msgspec.structs.replace(hello_to(connection, with_key(OTHER_KEY)), **change)
            replies.add(reply_to(connection, hello))
            assert connection.is_closed()
    assert len(replies) == 1
    assert isinstance(replies.pop(), Unwelcome)


def test_a_hello_that_was_recorded_is_refused_on_another_connection(start: Start) -> None:
    holder, terms = start(with_key(KEY)), with_key(KEY)
    with stranger(holder.peer) as first, stranger(holder.peer) as second:
        recorded = hello_to(first, terms)
        assert isinstance(reply_to(first, recorded), Proven)
        second.hear_challenge()
        assert isinstance(reply_to(second, recorded), Unwelcome)


def test_the_holders_proof_is_no_proof_of_a_reader(start: Start) -> None:
    holder = start(with_key(KEY))
    with stranger(holder.peer) as connection:
        assert isinstance(reply_to(connection, hello_to(connection, with_key(KEY), Side.LISTENER)), Unwelcome)


def test_a_proof_for_another_instance_is_refused(start: Start) -> None:
    holder = start(with_key(KEY))
    with stranger(holder.peer) as connection:
        hello = msgspec.structs.replace(hello_to(connection, with_key(KEY)), engine_id="F")
        assert isinstance(reply_to(connection, hello), Unwelcome)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": "other"}, "it speaks 'test', and this instance 'other'"),
        ({"version": 2}, "it speaks version 1 of the control channel, and this instance 2"),
        ({"values": {"model": "beef"}}, "model is 5eed there and beef here"),
        ({"values": {}}, "model is 5eed there and unknown here"),
        ({"values": {"model": "5eed", "more": "1"}}, "more is unknown there and 1 here"),
    ],
)
def test_what_differs_is_told_to_who_has_the_key(start: Start, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(TransferError, match=reason):
        greet(start(with_key(KEY)), with_key(KEY, **change))


def test_an_instance_from_before_a_restart_is_told_apart(start: Start) -> None:
    with pytest.raises(TransferError, match="it is instance 'E', and what is asked for is of 'before'"):
        greet(start(), TERMS, "before")


def test_who_does_not_greet_in_time_is_sent_away(start: Start) -> None:
    with stranger(start(greeting_seconds=0.05).peer) as silent:
        silent.hear_challenge()
        assert silent.is_closed()


def test_strangers_who_talk_nonsense_do_not_fill_the_log(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "FloodLimit", partial(FloodLimit, lines=3, window_seconds=1e6))
    holder = start()
    for _ in range(10):
        with stranger(holder.peer) as connection:
            connection.hear_challenge()
            connection.send_frame(b"nonsense")
            assert connection.is_closed()
    holder.close()
    *written, rest = [one.getMessage() for one in caplog.records if one.name == listener.__name__]
    assert len(written) == 3
    assert rest.startswith("7 more like these: ")


def test_strangers_are_bounded_and_the_oldest_goes_first(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_STRANGERS", 64)
    holder = start()
    strangers = [Stranger(holder.peer) for _ in range(listener.MAX_STRANGERS)]
    for connection in strangers:
        connection.hear_challenge()
    greet(holder, TERMS)
    assert strangers[0].is_closed()
    assert isinstance(reply_to(strangers[-1], Hello("test", 1, "E", bytes(32), b"", dict(TERMS.values))), Proven)
    for connection in strangers:
        connection.socket.close()


def test_a_reader_that_has_gone_is_told(start: Start) -> None:
    holder = start()
    for _ in range(2):
        greet(holder, TERMS)
        with stranger(holder.peer) as other:
            other.hear_challenge()
    holder.close()
    assert sorted(holder.gone) == [1, 2]


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])
def test_an_address_that_others_reach_is_listened_on_with_a_key_alone(start: Start, host: str) -> None:
    holder = start()

    def listen(terms: Terms) -> None:
        Listener(host, 0, "E", terms, holder.offered, ECHO, greeting_seconds=1, option="--test").close()

    with pytest.raises(ConfigurationError, match="can be reached from other hosts, and without a fleet key"):
        listen(TERMS)
    with pytest.raises(ConfigurationError, match="Cannot listen"):
        listen(with_key(KEY))


def test_another_host_is_talked_to_with_a_key_alone() -> None:
    async def open_to(terms: Terms) -> None:
        await open_channel(Peer("192.0.2.1", 1), "E", terms, ECHO, 0.05)

    with pytest.raises(
        TransferError, match=r"it is at 192\.0\.2\.1, and without a fleet key only processes of the same"
    ):
        asyncio.run(open_to(TERMS))
    with pytest.raises(TransferError, match=r"did not answer|cannot be reached"):
        asyncio.run(open_to(with_key(KEY)))


def test_a_name_for_this_host_is_talked_to(start: Start) -> None:
    holder = start()
    holder.peer = holder.peer._replace(host="localhost")
    greet(holder, TERMS)
