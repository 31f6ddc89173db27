"""Producers and consumers in processes of their own, which die, hang and come back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from chiasm.kv_transfer import KVTransferRole
from chiasm.kv_transfer.pull import PullConnector
from chiasm.kv_transfer.puller import MAX_IDLE_PRODUCERS

from ..free_ports import free_port
from .conftest import NEEDS_NIXL, Make
from .instance import LAYOUT, PATIENCE_SECONDS, Instance, config_for
from .processes import InstanceProcess, stopped

Start = Callable[..., InstanceProcess]
BIG = 1024
"""Blocks: 32 MB."""


@pytest.fixture
def start(connector: str) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(role: KVTransferRole, *arguments: Any, **changes: Any) -> InstanceProcess:
            return stack.enter_context(InstanceProcess(config_for(connector, role, **changes), *arguments))

        yield start


@pytest.fixture
def big_decode(make: Make, connector: str) -> Instance:
    return make(connector, KVTransferRole.CONSUMER, LAYOUT, BIG, connect_timeout_seconds=30.0)


def test_blocks_go_from_process_to_process(start: Start, decode: Instance) -> None:
    prefill = start(KVTransferRole.PRODUCER)
    handle = prefill.call("prefill", "p", [1, 5, 6, 2])
    decode.fetch("d", handle, [10, 11, 3, 40])
    assert decode.holds("p", [10, 11, 3, 40])
    prefill.call("wait_until_sent", "p")


def test_a_consumer_that_is_killed_frees_what_it_claimed(start: Start, prefill: Instance) -> None:
    decode = start(KVTransferRole.CONSUMER)
    decode.call("claim", "d", prefill.prefill("p", [1]))
    prefill.prefill("q", [2])
    assert prefill.worker.stats.leases_held == 2
    decode.kill()
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert prefill.worker.stats.leases_expired == 1


def test_a_consumer_that_is_killed_in_a_pull_harms_no_other(
    start: Start, make: Make, connector: str, decode: Instance
) -> None:
    prefill = make(connector, KVTransferRole.PRODUCER, LAYOUT, BIG)
    other = start(KVTransferRole.CONSUMER, LAYOUT, BIG)
    other.call("claim", "big", prefill.prefill("big", range(1, BIG)))
    other.call("begin", list(range(1, BIG)))
    other.kill()
    prefill.wait_for(lambda seen: "big" in seen.sent)
    decode.fetch("d", prefill.prefill("p", [1]), [1])
    assert decode.holds("p", [1])


def test_a_producer_that_is_killed_fails_its_own_requests(
    start: Start, make: Make, connector: str, big_decode: Instance
) -> None:
    """Requests that wait for room fail at once, one that is being pulled fails or is whole, others continue."""
    dying = start(KVTransferRole.PRODUCER, LAYOUT, BIG, engine_id="dying")
    living = make(connector, KVTransferRole.PRODUCER, engine_id="living")
    waiting = big_decode.arrive("waiting", dying.call("prefill", "w", [0]))
    big_decode.fetch("first", living.prefill("f", [1]), [0])
    pulled = big_decode.arrive("pulled", dying.call("prefill", "p", list(range(1, BIG))))
    big_decode.load(pulled, range(1, BIG))
    big_decode.step()
    dying.kill()
    assert "Could not fetch KV from the prefill instance" in big_decode.failure_of(waiting)
    big_decode.wait_for(lambda seen: ("pulled", 0) in seen.loaded | seen.broken_off)
    assert (("pulled", 0) in big_decode.seen.loaded) != ("pulled" in big_decode.seen.failed)
    big_decode.drop(pulled)
    big_decode.fetch("second", living.prefill("s", [2]), [0])
    assert big_decode.holds("s", [0])


def test_a_producer_that_comes_back_on_its_port_is_met_anew(start: Start, decode: Instance) -> None:
    first = start(KVTransferRole.PRODUCER, engine_id="first", port=free_port())  # nobody takes it meanwhile
    handle = first.call("prefill", "p", [1])
    decode.fetch("d", handle, [1])
    lost = first.call("prefill", "lost", [2])
    first.kill()
    second = start(KVTransferRole.PRODUCER, engine_id="second", port=handle.remote_port)
    again = second.call("prefill", "again", [3])
    assert again.remote_port == handle.remote_port
    decode.fetch("e", again, [2])
    assert decode.holds("again", [2])
    assert "before a restart" in decode.failure_of(decode.arrive("f", lost))


def test_a_producer_that_hangs_fails_its_own_requests(start: Start, make: Make, connector: str) -> None:
    """Whatever it sends when it continues is ignored."""
    decode = make(connector, KVTransferRole.CONSUMER)
    still = start(KVTransferRole.PRODUCER, engine_id="still")
    living = make(connector, KVTransferRole.PRODUCER, engine_id="living")
    decode.fetch("before", still.call("prefill", "before", [1]), [1])
    handle = still.call("prefill", "p", [2])
    with stopped(still):
        with impatient(decode):
            assert "did not answer" in decode.failure_of(decode.arrive("d", handle))
        decode.fetch("other", living.prefill("o", [1]), [2])
    decode.fetch("after", still.call("prefill", "after", [3]), [3])
    assert decode.holds("after", [3])


@NEEDS_NIXL
@pytest.mark.parametrize("is_needed", [False, True])
def test_a_read_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch, make: Make, is_needed: bool) -> None:
    """Over TCP the producer takes part in a read. One that hangs in the middle of it must not write later."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr("chiasm.transfer.nixl._PATIENCE_SECONDS", 0.2)
    if is_needed:
        monkeypatch.setattr("chiasm.transfer.nixl._SLOWEST_BYTES_PER_SECOND", 5e7)
    decode = make("NixlConnector", KVTransferRole.CONSUMER, LAYOUT, 4 * BIG, connect_timeout_seconds=30.0)
    living = make("NixlConnector", KVTransferRole.PRODUCER, engine_id="living")
    with InstanceProcess(config_for("NixlConnector", KVTransferRole.PRODUCER), LAYOUT, 4 * BIG) as still:
        decode.fetch("first", still.call("prefill", "first", [1]), [1])
        for attempt in range(100):
            name = f"d{attempt}"
            request = decode.arrive(name, still.call("prefill", f"p{attempt}", list(range(4 * BIG))))
            decode.load(request, range(4 * BIG))
            decode.blocks.fill_(7)
            decode.step()
            while bool((decode.blocks[0] == 7).all()):
                pass
            with stopped(still):
                is_in_the_middle = bool((decode.blocks[-BIG:] == 7).all())
                if not is_needed:
                    decode.drop(request)
                if is_in_the_middle:
                    decode.wait_for(lambda seen: (name, 0) in seen.broken_off)  # noqa: B023
                    decode.blocks.fill_(7)
                    break
            # The test was too slow to stop it: it has sent nearly everything.
            decode.wait_for(lambda seen: (name, 0) in seen.loaded | seen.broken_off)  # noqa: B023
            still.call("wait_until_sent", f"p{attempt}")
        assert is_in_the_middle
        decode.fetch("other", living.prefill("o", [1]), [5])
        assert decode.holds("o", [5])
        decode.blocks[5] = 7
        assert bool((decode.blocks == 7).all())


def test_idle_instances_use_no_processor(start: Start) -> None:
    prefill, decode = start(KVTransferRole.PRODUCER), start(KVTransferRole.CONSUMER)
    decode.call("fetch", "d", prefill.call("prefill", "p", [1]), [1])
    prefill.call("wait_until_sent", "p")
    prefill.call("prefill", "held", [2])
    for instance in (prefill, decode):  # what they have just done may take a busy machine a while to end
        assert any(instance.idle_share(1.0) < 0.02 for _ in range(20))


def test_nothing_is_left_after_shutdown(connector: str) -> None:
    def run() -> None:
        prefill = Instance(config_for(connector, KVTransferRole.PRODUCER))
        decode = Instance(config_for(connector, KVTransferRole.CONSUMER))
        decode.fetch("d", prefill.prefill("p", [1]), [1])
        decode.arrive("waiting", prefill.prefill("q", [2]))
        decode.step()
        for instance in (prefill, decode):
            instance.shutdown()
            instance.shutdown()

    run()  # afterwards libraries hold what they keep for good
    gc.collect()
    before = held_by_this_process()
    for _ in range(3):
        run()
    gc.collect()
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not held_by_this_process() <= before and time.monotonic() < give_up:
        time.sleep(0.01)  # a thread takes a moment to disappear
    assert held_by_this_process() <= before


def test_idle_connections_are_bounded(make: Make) -> None:
    decode = make("SharedMemoryConnector", KVTransferRole.CONSUMER)
    producers = [
        make("SharedMemoryConnector", KVTransferRole.PRODUCER, engine_id=f"P{n}") for n in range(MAX_IDLE_PRODUCERS + 2)
    ]
    before = shared_maps()
    for n, prefill in enumerate(producers):
        decode.fetch(f"d{n}", prefill.prefill(f"p{n}", [1]), [1])
        prefill.wait_for(lambda seen: seen.sent)  # only then is the connection idle
    assert len(shared_maps() - before) == MAX_IDLE_PRODUCERS
    decode.fetch("again", producers[0].prefill("again", [2]), [2])
    assert decode.holds("again", [2])
    assert len(shared_maps() - before) == MAX_IDLE_PRODUCERS


def test_a_producer_that_is_gone_is_forgotten(make: Make) -> None:
    decode = make("SharedMemoryConnector", KVTransferRole.CONSUMER)
    before = shared_maps()
    with InstanceProcess(config_for("SharedMemoryConnector", KVTransferRole.PRODUCER)) as prefill:
        decode.fetch("d", prefill.call("prefill", "p", [1]), [1])
        assert len(shared_maps() - before) == 1
        claimed = decode.arrive("e", prefill.call("prefill", "q", [1]))
        decode.step()
    decode.failure_of(claimed)
    assert shared_maps() <= before


@contextlib.contextmanager
def impatient(decode: Instance) -> Iterator[None]:
    """What a consumer asks meanwhile has to be answered soon."""
    assert isinstance(decode.worker, PullConnector)
    puller = decode.worker._puller
    assert puller is not None
    patient = puller._config
    puller._config = dataclasses.replace(patient, connect_timeout_seconds=0.2)
    try:
        yield
    finally:
        puller._config = patient


def held_by_this_process() -> Counter[str]:
    """Python's threads, the system's, maps of KV caches, and what is open, by kind."""
    held = Counter(
        {
            "threads": threading.active_count(),
            "tasks": len(os.listdir("/proc/self/task")),
            "maps": len(shared_maps()),
        }
    )
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            held[os.readlink(f"/proc/self/fd/{descriptor}").split(":")[0]] += 1
    return held


def shared_maps() -> set[tuple[str, str]]:
    """The KV caches that this process has mapped, its own and those of producers: where, and the number of the file.

    What is left of other tests may go at any time.
    """
    with open("/proc/self/maps") as maps:
        found = [line.split() for line in maps if "memfd:chiasm-kv" in line]
    return {(addresses, inode) for addresses, _, _, _, inode, *_ in found}
