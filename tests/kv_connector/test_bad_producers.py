"""What a consumer does with a producer that breaks the control protocol: its requests fail, and nobody else's."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from chiasm.kv_transfer import KVTransferRole
from chiasm.kv_transfer.messages import Claim, Copied, Granted, ProducerMessage, Refused, Release, Whole
from chiasm.transfer.channel import MAX_FRAME_BYTES

from .conftest import Make
from .instance import NUM_BLOCKS, Instance
from .raw_peers import RawConsumer, RawProducer

CONNECTOR = "SharedMemoryConnector"


@pytest.fixture
def prefill(make: Make) -> Instance:
    return make(CONNECTOR, KVTransferRole.PRODUCER)


@pytest.fixture
def decode(make: Make) -> Instance:
    return make(CONNECTOR, KVTransferRole.CONSUMER)


@pytest.fixture
def producer(prefill: Instance) -> Iterator[RawProducer]:
    with RawProducer(prefill) as producer:
        yield producer


def test_the_whole_conversation(decode: Instance, producer: RawProducer) -> None:
    request = decode.arrive("d", producer.handle("p", [1, 2]))
    decode.load(request, [5, 6])
    decode.step()
    producer.greet()
    claim = producer.hear()
    assert isinstance(claim, Claim)
    assert (claim.request_id, claim.block_ids) == ("p", [1, 2])
    producer.say(Granted(claim.claim))
    assert producer.hear() == Copied(claim.claim, 0)
    assert not decode.seen.loaded
    producer.say(Whole(claim.claim, 0))
    decode.wait_for(lambda seen: seen.loaded == {("d", 0)})
    assert producer.hear() == Release(claim.claim)


def test_claims_are_made_in_the_order_of_the_requests(decode: Instance, producer: RawProducer) -> None:
    for n in range(20):
        decode.arrive(f"d{n}", producer.handle(f"p{n}", [n]))
        decode.step()
    producer.greet()
    claims = [producer.hear() for _ in range(20)]
    assert [claim.request_id for claim in claims if isinstance(claim, Claim)] == [f"p{n}" for n in range(20)]


def test_a_copy_that_is_not_whole_fails_the_request(decode: Instance, producer: RawProducer) -> None:
    request = decode.arrive("d", producer.handle("p", [1]))
    decode.load(request, [5])
    decode.step()
    producer.greet()
    claim = producer.hear()
    assert isinstance(claim, Claim)
    producer.say(Granted(claim.claim))
    assert producer.hear() == Copied(claim.claim, 0)
    producer.say(Refused(claim.claim, "it was cut short"))
    address = f"127.0.0.1:{producer.listener.getsockname()[1]}"
    assert decode.failure_of(request) == (
        f"Could not fetch KV from the prefill instance at {address}: it was cut short."
    )
    assert decode.seen.broken_off == {("d", 0)}
    assert producer.hear() == Release(claim.claim)


def test_blocks_that_the_producer_does_not_have_are_not_read(decode: Instance, producer: RawProducer) -> None:
    request = decode.arrive("d", producer.handle("p", [NUM_BLOCKS]))
    decode.load(request, [5])
    decode.step()
    producer.greet()
    claim = producer.hear()
    assert isinstance(claim, Claim)
    producer.say(Granted(claim.claim))
    assert "it granted a block that it does not have" in decode.failure_of(request)
    assert decode.seen.broken_off == {("d", 0)}
    assert producer.is_closed()


@pytest.mark.parametrize(
    "answer",
    [Granted(99), Whole(1, 0), Refused(99, "not that one")],
    ids=["another claim", "another kind", "a refusal of another claim"],
)
def test_an_answer_to_what_was_not_asked_ends_the_connection(
    prefill: Instance, decode: Instance, producer: RawProducer, answer: ProducerMessage
) -> None:
    request = decode.arrive("d", producer.handle("p", [1]))
    decode.step()
    producer.greet()
    assert isinstance(producer.hear(), Claim)
    producer.say(answer)
    assert "its answer belongs to another question" in decode.failure_of(request)
    assert producer.is_closed()
    decode.fetch("e", prefill.prefill("q", [1]), [1])
    assert decode.holds("q", [1])


@pytest.mark.parametrize(
    "body", [b"\x82\xa4type\xa7refused\xa6reason\xa1\xff", b"\x82\xa4type\xa5whole\xa1x" + b"\x91" * 90_000]
)
def test_an_answer_that_is_no_message_is_a_line_in_the_log(
    decode: Instance, producer: RawProducer, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    request = decode.arrive("d", producer.handle("p", [1]))
    decode.step()
    producer.greet()
    assert isinstance(producer.hear(), Claim)
    producer.send_frame(body)
    assert "does not speak the control protocol" in decode.failure_of(request)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].exc_info is None


def test_a_surplus_answer_ends_the_connection(decode: Instance, producer: RawProducer) -> None:
    request = decode.arrive("d", producer.handle("p", [1]))
    decode.step()
    producer.greet()
    claim = producer.hear()
    assert isinstance(claim, Claim)
    producer.say(Granted(claim.claim), Granted(claim.claim))
    assert "it sent an answer without a question" in decode.failure_of(request)
    assert producer.is_closed()


def test_half_an_answer_is_not_waited_for(make: Make, producer: RawProducer) -> None:
    decode = make(CONNECTOR, KVTransferRole.CONSUMER, connect_timeout_seconds=5.0)
    request = decode.arrive("d", producer.handle("p", [1]))
    decode.step()
    producer.greet()
    producer.socket.sendall(struct.pack(">I", 20) + b"half")
    assert "did not answer within 5 seconds" in decode.failure_of(request)


def test_half_a_welcome_is_not_waited_for(make: Make, producer: RawProducer) -> None:
    decode = make(CONNECTOR, KVTransferRole.CONSUMER, connect_timeout_seconds=5.0)
    request = decode.arrive("d", producer.handle("p", [1]))
    decode.step()
    producer.accept()
    producer.socket.sendall(b"\x00\x00")
    assert "did not answer within 5 seconds" in decode.failure_of(request)


def test_an_answer_that_would_be_too_large_is_not_waited_for(decode: Instance, producer: RawProducer) -> None:
    request = decode.arrive("d", producer.handle("p", [1]))
    decode.step()
    producer.greet()
    producer.socket.sendall(struct.pack(">I", MAX_FRAME_BYTES + 1))
    assert "does not speak the control protocol" in decode.failure_of(request)


def test_a_producer_that_does_not_read_is_given_up(make: Make, producer: RawProducer) -> None:
    """What is kept for it is bounded, however long it may take to answer."""
    decode = make(CONNECTOR, KVTransferRole.CONSUMER, connect_timeout_seconds=600.0)
    producer.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    first = decode.arrive("d0", producer.handle("p", [1]))
    decode.step()
    producer.greet()
    large = producer.handle("p", list(range(1 << 17, (1 << 17) + 150_000)))
    for n in range(1, 100):
        decode.arrive(f"d{n}", large)
    assert "does not read" in decode.failure_of(first)
    decode.wait_for(lambda seen: len(seen.failed) == 100)


def test_a_claim_that_is_too_long_costs_its_own_request_alone(decode: Instance, producer: RawProducer) -> None:
    other = decode.arrive("other", producer.handle("p", [1]))
    long = decode.arrive("long", producer.handle("q", list(range(1 << 17, (1 << 17) + 300_000))))
    decode.step()
    producer.greet()
    claim = producer.hear()
    assert isinstance(claim, Claim)
    producer.say(Granted(claim.claim))
    assert "longer than the 1048576 that are allowed" in decode.failure_of(long)
    decode.load(other, [3])
    decode.step()
    assert Copied(claim.claim, 0) in (producer.hear(), producer.hear())
    assert decode.seen.failed.keys() == {"long"}


def test_a_consumer_stops_without_waiting_for_a_producer(make: Make, producer: RawProducer) -> None:
    decode = make(CONNECTOR, KVTransferRole.CONSUMER, connect_timeout_seconds=600.0)
    decode.arrive("d", producer.handle("p", [1]))
    decode.step()
    producer.accept()
    decode.shutdown()
    assert producer.is_closed()


def test_a_producer_stops_without_waiting_for_its_consumers(prefill: Instance) -> None:
    with RawConsumer(prefill) as silent, RawConsumer(prefill) as greeted:
        greeted.welcome()
        prefill.prefill("p", [1])
        assert greeted.ask(Claim(0, "p", [1], 60.0)) == Granted(0)
        silent.hello()
        prefill.shutdown()
        assert silent.is_closed()
        assert greeted.is_closed()


def test_a_consumer_stops_while_it_connects(make: Make, producer: RawProducer) -> None:
    decode = make(CONNECTOR, KVTransferRole.CONSUMER, connect_timeout_seconds=600.0)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        for _ in range(3):  # no more are let in then
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        handle = producer.handle("p", [1])
        handle.remote_port = full.getsockname()[1]
        decode.arrive("d", handle)
        decode.step()
        decode.shutdown()
