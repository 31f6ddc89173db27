"""A producer answers consumers on its control port, and sends away those that break the protocol; others are not affected."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer import KVTransferRole
from chiasm.kv_transfer.messages import (
    PROTOCOL_VERSION,
    Claim,
    Copied,
    Granted,
    Refused,
    Release,
    Welcome,
    Whole,
)
from chiasm.transfer import listener
from chiasm.transfer.channel import MAX_FRAME_BYTES
from chiasm.transfer.greeting import Hello, Unwelcome

from .conftest import Make
from .instance import NUM_BLOCKS, Instance
from .raw_peers import RawConsumer


@pytest.fixture
def prefill(make: Make) -> Instance:
    return make("SharedMemoryConnector", KVTransferRole.PRODUCER)


@pytest.fixture
def decode(make: Make) -> Instance:
    return make("SharedMemoryConnector", KVTransferRole.CONSUMER)


@pytest.fixture
def consumer(prefill: Instance) -> Iterator[RawConsumer]:
    with RawConsumer(prefill) as consumer:
        yield consumer


@pytest.fixture
def greeted(consumer: RawConsumer) -> RawConsumer:
    consumer.welcome()
    return consumer


def test_the_whole_conversation(prefill: Instance, greeted: RawConsumer) -> None:
    prefill.prefill("p", [1, 2])
    assert greeted.ask(Claim(7, "p", [1, 2], 60.0)) == Granted(7)
    assert greeted.ask(Copied(7, 0)) == Whole(7, 0)
    assert greeted.ask(Copied(7, 1)) == Whole(7, 1)
    greeted.say(Release(7))
    prefill.wait_for(lambda seen: seen.sent == {"p"})


def test_the_welcome_says_how_many_blocks_there_are(consumer: RawConsumer) -> None:
    assert consumer.welcome().num_blocks == NUM_BLOCKS


def test_questions_may_come_before_the_answers(prefill: Instance, consumer: RawConsumer) -> None:
    prefill.prefill("p", [1])
    consumer.greet()
    consumer.say(Claim(0, "p", [1], 60.0), Copied(0, 0), Release(0))
    assert isinstance(consumer.hear(), Welcome)
    assert [consumer.hear(), consumer.hear()] == [Granted(0), Whole(0, 0)]
    prefill.wait_for(lambda seen: seen.sent == {"p"})


def test_a_question_may_come_in_pieces(prefill: Instance, greeted: RawConsumer) -> None:
    prefill.prefill("p", list(range(60)))
    body = msgspec.msgpack.encode(Claim(0, "p", list(range(60)), 60.0))
    for byte in struct.pack(">I", len(body)) + body:
        greeted.socket.sendall(bytes([byte]))
    assert greeted.hear() == Granted(0)


def test_a_copy_that_ended_after_the_lease_is_not_whole(prefill: Instance, greeted: RawConsumer) -> None:
    prefill.prefill("p", [1])
    assert greeted.ask(Claim(0, "p", [1], 0.01)) == Granted(0)
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    answer = greeted.ask(Copied(0, 0))
    assert isinstance(answer, Refused)
    assert "deadline" in answer.reason


def test_another_version_is_refused(consumer: RawConsumer) -> None:
    answer = consumer.greet(consumer.hello(version=99))
    assert isinstance(answer, Unwelcome)
    assert f"version {PROTOCOL_VERSION}" in answer.reason
    assert "99" in answer.reason
    assert consumer.is_closed()


def test_a_question_before_the_greeting_ends_the_connection(prefill: Instance, consumer: RawConsumer) -> None:
    prefill.prefill("p", [1])
    consumer.hello()
    consumer.say(Claim(0, "p", [1], 60.0))
    assert consumer.is_closed()


def test_a_claim_number_is_used_once(prefill: Instance, greeted: RawConsumer) -> None:
    prefill.prefill("p", [1])
    prefill.prefill("q", [2])
    assert greeted.ask(Claim(0, "p", [1], 60.0)) == Granted(0)
    greeted.say(Claim(0, "q", [2], 60.0))
    assert greeted.is_closed()
    prefill.wait_for(lambda seen: seen.sent == {"p"})


def test_a_consumer_cannot_release_the_claim_of_another(prefill: Instance, greeted: RawConsumer) -> None:
    prefill.prefill("p", [1])
    assert greeted.ask(Claim(0, "p", [1], 60.0)) == Granted(0)
    with RawConsumer(prefill) as other:
        other.welcome()
        assert isinstance(other.ask(Claim(0, "p", [1], 60.0)), Refused)
        other.say(Release(0))
        assert isinstance(other.ask(Copied(0, 0)), Refused)
    assert greeted.ask(Copied(0, 0)) == Whole(0, 0)


def test_the_end_of_a_connection_frees_what_was_claimed_on_it(prefill: Instance, greeted: RawConsumer) -> None:
    prefill.prefill("p", [1])
    prefill.prefill("q", [2])
    assert greeted.ask(Claim(0, "p", [1], 60.0)) == Granted(0)
    greeted.socket.close()
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert (prefill.worker.stats.leases_held, prefill.worker.stats.leases_expired) == (1, 1)


def wrong_claim(**changes: object) -> bytes:
    fields = {"type": "claim", "claim": 0, "request_id": "p", "block_ids": [1], "seconds_left": 60.0}
    return msgspec.msgpack.encode(fields | changes)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(300),
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",  # a pickle
        b"\xdd\xff\xff\xff\xff",  # it announces an array of four billion elements
        b"\x91" * 100_000,  # arrays in arrays
        msgspec.msgpack.encode({"type": "nonsense"}),
        wrong_claim(claim=-1),
        wrong_claim(request_id="p" * 257),
        wrong_claim(request_id=5),
        wrong_claim(block_ids=[-1]),
        wrong_claim(block_ids=[1 << 40]),
        wrong_claim(block_ids="1"),
        wrong_claim(seconds_left=-1.0),
        wrong_claim(seconds_left=float("inf")),
        wrong_claim(seconds_left=float("nan")),
        wrong_claim(seconds_left=1e308),
        wrong_claim(request_id="\0").replace(b"\xa1\0", b"\xa1\xff"),  # no UTF-8
        wrong_claim(claim=(1 << 64) - 1),
        b"\x82\xa4type\xa5claim\xa1x" + b"\x91" * 100_000 + b"\x90",  # deep, in a field that nobody knows
    ],
    ids=range(20),
)
def test_a_malformed_message_ends_its_connection_and_no_other(
    prefill: Instance, decode: Instance, greeted: RawConsumer, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    handle = prefill.prefill("p", [1])
    with RawConsumer(prefill) as other:
        other.hello()
        other.send_frame(body)
        assert other.is_closed()
    greeted.send_frame(body)
    assert greeted.is_closed()
    decode.fetch("d", handle, [1])
    assert decode.holds("p", [1])
    logged = [record for record in caplog.records if "does not speak the control protocol" in record.getMessage()]
    assert len(logged) == 2
    assert not [record for record in caplog.records if record.exc_info]


def test_bytes_without_frames_end_the_connection(prefill: Instance) -> None:
    for data in (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b"\xff" * 100, b"\x16\x03\x01\x02\x00\x01\x00"):
        with RawConsumer(prefill) as other:
            other.hello()
            other.socket.sendall(data)
            assert other.is_closed()


def test_a_frame_that_would_be_too_long_is_not_waited_for(greeted: RawConsumer) -> None:
    greeted.socket.sendall(struct.pack(">I", MAX_FRAME_BYTES + 1))
    assert greeted.is_closed()


def test_a_consumer_that_does_not_greet_in_time_is_sent_away(make: Make) -> None:
    prefill = make("SharedMemoryConnector", KVTransferRole.PRODUCER, connect_timeout_seconds=0.05)
    with RawConsumer(prefill) as silent, RawConsumer(prefill) as slow:
        slow.socket.sendall(b"\x00\x00")
        for consumer in (silent, slow):
            consumer.hello()
            assert consumer.is_closed()


def test_a_consumer_that_stops_in_the_middle_of_a_frame_delays_no_other(
    prefill: Instance, decode: Instance, greeted: RawConsumer
) -> None:
    greeted.socket.sendall(struct.pack(">I", 1000) + b"x")
    decode.fetch("d", prefill.prefill("p", [1]), [1])
    assert decode.holds("p", [1])


def test_a_consumer_that_does_not_read_its_answers_is_sent_away(prefill: Instance, greeted: RawConsumer) -> None:
    # Small, so that it is full soon. With a smaller one the kernel drops acknowledgements too, and everything stalls.
    greeted.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    question = msgspec.msgpack.encode(Copied(0, 0))
    data = (struct.pack(">I", len(question)) + question) * 1000

    def flood() -> None:
        while True:
            greeted.socket.sendall(data)

    with pytest.raises(OSError, match=r"reset|pipe"):
        flood()


def test_a_consumer_that_greets_twice_is_sent_away(greeted: RawConsumer) -> None:
    greeted.say(Hello("kv", 2, "P", bytes(32), b""))
    assert greeted.is_closed()


def test_connections_are_bounded_and_a_further_consumer_is_told_why(prefill: Instance, greeted: RawConsumer) -> None:
    others = []
    for _ in range(listener.MAX_READERS):
        others.append(RawConsumer(prefill))
        others[-1].say(others[-1].hello())
        is_last = len(others) == listener.MAX_READERS
        answer = others[-1].hear_frame()
        assert (b"it has 256 readers already" in answer) == is_last
    assert others[-1].is_closed()
    prefill.prefill("p", [1])
    assert greeted.ask(Claim(0, "p", [1], 60.0)) == Granted(0)
    for other in others:
        other.socket.close()


def test_a_port_in_use_is_named(make: Make, prefill: Instance) -> None:
    port = int(prefill.worker.get_handshake_metadata()["port"])
    with pytest.raises(ConfigurationError, match=f"Port {port} on 127.0.0.1 is in use.*--kv-port"):
        make("SharedMemoryConnector", KVTransferRole.PRODUCER, port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_an_address_that_names_no_instance_is_refused(make: Make, host: str) -> None:
    with pytest.raises(ConfigurationError, match="names no instance"):
        make("SharedMemoryConnector", KVTransferRole.PRODUCER, host=host)


def test_an_address_that_others_reach_needs_a_fleet_key(make: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1.*without a fleet key"):
        make("SharedMemoryConnector", KVTransferRole.PRODUCER, host="192.0.2.1")
