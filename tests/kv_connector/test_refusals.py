"""KV that can't be fetched fails one request, with one sentence that says why, and no other request."""

from __future__ import annotations

import dataclasses
import socket
import time
from typing import Any

import pytest

from chiasm.errors import KVUnavailableError
from chiasm.kv_transfer import KVTransferRole
from chiasm.launch.ports import HeldPort
from chiasm.wire import KVTransferParams

from .conftest import Make
from .instance import LAYOUT, Instance

LAYOUT_CHANGES: list[dict[str, Any]] = [
    {"num_layers": 3},
    {"block_size": 32},
    {"num_kv_heads": 8},
    {"head_dim": 128},
    {"dtype": "bfloat16"},
    {"bytes_per_block": 65536},
]


def changed(handle: KVTransferParams, **changes: Any) -> KVTransferParams:
    fields = {name: getattr(handle, name) for name in handle.__struct_fields__}
    return KVTransferParams(**(fields | changes))


def test_another_fingerprint(make: Make, connector: str, prefill: Instance) -> None:
    other = make(connector, KVTransferRole.CONSUMER, fingerprint="beef")
    reason = other.failure_of(other.arrive("d", prefill.prefill("p", [1])))
    assert "fingerprint is 5eed there and beef here" in reason


@pytest.mark.parametrize("change", LAYOUT_CHANGES, ids=lambda change: next(iter(change)))
def test_another_layout(make: Make, change: dict[str, Any]) -> None:
    prefill = make("SharedMemoryConnector", KVTransferRole.PRODUCER)
    other = make("SharedMemoryConnector", KVTransferRole.CONSUMER, dataclasses.replace(LAYOUT, **change))
    reason = other.failure_of(other.arrive("d", prefill.prefill("p", [1])))
    ((name, value),) = change.items()
    assert f"{name} is {getattr(LAYOUT, name)} there and {value} here" in reason
    assert reason.count(" there and ") == 1


def test_another_connector(make: Make, gated: tuple[Instance, Instance]) -> None:
    _, decode = gated
    prefill = make("SharedMemoryConnector", KVTransferRole.PRODUCER)
    reason = decode.failure_of(decode.arrive("d", prefill.prefill("p", [1])))
    assert "connector is SharedMemoryConnector there and GatedConnector here" in reason


def test_another_instance_at_the_address(prefill: Instance, decode: Instance) -> None:
    handle = changed(prefill.prefill("p", [1]), remote_engine_id="the one before")
    reason = decode.failure_of(decode.arrive("d", handle))
    assert "it is instance 'P', and what is asked for is of 'the one before', before a restart" in reason


def test_nobody_at_the_address(prefill: Instance, decode: Instance) -> None:
    nobody = HeldPort("127.0.0.1")
    handle = changed(prefill.prefill("p", [1]), remote_port=nobody.port)
    reason = decode.failure_of(decode.arrive("d", handle))
    nobody.release()
    assert f"127.0.0.1:{nobody.port}" in reason
    assert "cannot be reached" in reason


def test_a_name_that_stands_for_no_host(prefill: Instance, decode: Instance) -> None:
    handle = changed(prefill.prefill("p", [1]), remote_host="no-such-host.invalid")
    assert "cannot be reached" in decode.failure_of(decode.arrive("d", handle))


def test_somebody_who_does_not_answer(make: Make, prefill: Instance) -> None:
    decode = make("SharedMemoryConnector", KVTransferRole.CONSUMER, connect_timeout_seconds=0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        handle = changed(prefill.prefill("p", [1]), remote_port=silent.getsockname()[1])
        assert "did not answer within 0.1 seconds" in decode.failure_of(decode.arrive("d", handle))


def test_somebody_who_answers_something_else(prefill: Instance, decode: Instance) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        handle = changed(prefill.prefill("p", [1]), remote_port=server.getsockname()[1])
        request = decode.arrive("d", handle)
        decode.step()
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert "does not speak the control protocol" in decode.failure_of(request)


def test_a_request_that_was_never_there(prefill: Instance, decode: Instance) -> None:
    handle = changed(prefill.prefill("p", [1]), remote_request_id="q")
    assert "it never had KV here" in decode.failure_of(decode.arrive("d", handle))


@pytest.mark.parametrize("blocks", [[1, 2], [1, 2, 4], [1, 2, 3, 4], [3, 2, 1], [1, 2, 1 << 30], [11, 12, 13]])
def test_blocks_that_are_not_the_requests_own(prefill: Instance, decode: Instance, blocks: list[int]) -> None:
    handle = prefill.prefill("p", [1, 2, 3])
    prefill.prefill("another", [11, 12, 13])
    request = decode.arrive("d", changed(handle, remote_block_ids=blocks))
    decode.load(request, range(len(blocks)))
    assert "block ids" in decode.failure_of(request)
    assert decode.seen.broken_off == {("d", 0)}
    decode.fetch("e", handle, [4, 5, 6])  # the handle itself is still good
    assert decode.holds("p", [4, 5, 6])


@pytest.mark.parametrize(("local", "remote"), [([0], [9]), ([1 << 20], [1]), ([-1], [1])])
def test_a_load_of_blocks_that_do_not_exist(
    prefill: Instance, decode: Instance, local: list[int], remote: list[int]
) -> None:
    request = decode.arrive("d", prefill.prefill("p", [1, 2]))
    decode.load(request, local, remote)
    assert "names blocks" in decode.failure_of(request)
    assert decode.seen.broken_off == {("d", 0)}
    prefill.wait_for(lambda seen: seen.sent == {"p"})


def test_a_handle_that_is_used_twice(prefill: Instance, decode: Instance) -> None:
    handle = prefill.prefill("p", [1])
    first, second = decode.arrive("first", handle), decode.arrive("second", handle)
    assert "claimed already" in decode.failure_of(second)
    decode.load(first, [5])
    decode.wait_for(lambda seen: ("first", 0) in seen.loaded)
    assert "its KV was fetched already" in decode.failure_of(decode.arrive("third", handle))


def test_a_lease_that_ran_out(make: Make, connector: str, decode: Instance) -> None:
    prefill = make(connector, KVTransferRole.PRODUCER, lease_seconds=0.01)
    handle = prefill.prefill("p", [1])
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert prefill.worker.stats.leases_expired == 1
    assert "its lease has ended" in decode.failure_of(decode.arrive("d", handle))


def test_a_deadline_that_passes_while_blocks_are_claimed(prefill: Instance, decode: Instance) -> None:
    request = decode.arrive("d", prefill.prefill("p", [1]), deadline=time.monotonic() + 0.05)
    decode.step()
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert prefill.worker.stats.leases_expired == 1
    decode.load(request, [1])
    assert "deadline" in decode.failure_of(request)
    assert decode.seen.broken_off == {("d", 0)}
    assert not decode.seen.loaded


def test_one_refusal_leaves_the_others_alone(prefill: Instance, decode: Instance) -> None:
    good = decode.arrive("good", prefill.prefill("p", [1, 2]))
    bad = decode.arrive("bad", changed(prefill.prefill("q", [3]), remote_block_ids=[4]))
    decode.load(good, [5, 6])
    decode.load(bad, [7])
    decode.wait_for(lambda seen: seen.loaded and seen.failed)
    assert decode.seen.loaded == {("good", 0)}
    assert decode.seen.failed.keys() == {"bad"}
    assert decode.worker.stats.failures == 1


@pytest.mark.parametrize(
    "field", ["remote_engine_id", "remote_block_ids", "remote_host", "remote_port", "remote_request_id"]
)
def test_a_handle_that_lacks_something(prefill: Instance, decode: Instance, field: str) -> None:
    handle = changed(prefill.prefill("p", [1]), **{field: None})
    with pytest.raises(KVUnavailableError, match=field):
        decode.arrive("d", handle)
    assert not decode.scheduler.build_connector_meta()


def test_a_handle_of_several_ranks(prefill: Instance, decode: Instance) -> None:
    with pytest.raises(KVUnavailableError, match="2 ranks"):
        decode.arrive("d", changed(prefill.prefill("p", [1]), tp_size=2))
