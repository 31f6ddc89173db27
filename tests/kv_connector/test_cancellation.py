"""A request can end at any moment: its transfers are broken off, and the producer's blocks are given back."""

from __future__ import annotations

import torch

from chiasm.launch.ports import HeldPort

from .gated_connector import GATE
from .instance import NUM_BLOCKS, Instance


def test_before_the_claim_is_built(prefill: Instance, decode: Instance) -> None:
    request = decode.arrive("d", prefill.prefill("p", [1]))
    decode.drop(request)
    decode.step()
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert prefill.worker.stats.leases_expired == 0


def test_while_the_producer_is_being_reached(prefill: Instance, decode: Instance) -> None:
    request = decode.arrive("d", prefill.prefill("p", [1]))
    decode.load(request, [1])
    decode.step()
    decode.drop(request)
    decode.wait_for(lambda seen: ("d", 0) in seen.broken_off | seen.loaded)
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert not decode.seen.failed


def test_after_the_claim_and_before_there_is_room(prefill: Instance, decode: Instance) -> None:
    request = decode.arrive("d", prefill.prefill("p", [1]))
    decode.fetch("other", prefill.prefill("q", [2]), [5])  # the claim before it was granted by then
    decode.drop(request)
    decode.step()
    prefill.wait_for(lambda seen: seen.sent == {"p", "q"})
    assert not decode.seen.broken_off
    assert not decode.seen.failed


def test_during_the_copy(gated: tuple[Instance, Instance]) -> None:
    prefill, decode = gated
    request = decode.arrive("d", prefill.prefill("p", [1, 2, 3]))
    decode.load(request, [1, 2, 3])
    decode.step()
    GATE.wait_for(1)
    decode.drop(request)
    decode.wait_for(lambda seen: seen.broken_off == {("d", 0)})
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert not decode.seen.loaded
    assert not decode.seen.failed
    assert not decode.blocks.any()


def test_while_the_copy_waits_for_its_turn(gated: tuple[Instance, Instance]) -> None:
    prefill, decode = gated
    parallel = decode.config.max_parallel_transfers
    requests = [decode.arrive(f"d{n}", prefill.prefill(f"p{n}", [n])) for n in range(parallel + 1)]
    for place, request in enumerate(requests):
        decode.load(request, [place])
    decode.step()
    GATE.wait_for(parallel)
    decode.drop(requests[-1])
    decode.step()
    GATE.open()
    last = (f"d{parallel}", 0)
    decode.wait_for(lambda seen: len(seen.loaded) == parallel and last in seen.broken_off)
    prefill.wait_for(lambda seen: len(seen.sent) == parallel + 1)


def test_a_claim_does_not_wait_for_the_copies_of_others(gated: tuple[Instance, Instance]) -> None:
    prefill, decode = gated
    parallel = decode.config.max_parallel_transfers
    for n in range(2 * parallel):
        decode.load(decode.arrive(f"d{n}", prefill.prefill(f"p{n}", [n])), [n])
    decode.step()
    GATE.wait_for(parallel)
    handle = prefill.prefill("late", [60])
    decode.arrive("d", handle)
    second = decode.arrive("second", handle)
    assert "claimed already" in decode.failure_of(second)


def test_after_everything_is_here(prefill: Instance, decode: Instance) -> None:
    request = decode.arrive("d", prefill.prefill("p", [1]))
    decode.load(request, [1])
    decode.wait_for(lambda seen: seen.loaded == {("d", 0)})
    decode.drop(request)
    decode.fetch("other", prefill.prefill("q", [2]), [5])
    assert not decode.seen.broken_off
    assert decode.holds("p", [1])


def test_after_one_of_two_loads(prefill: Instance, decode: Instance) -> None:
    request = decode.arrive("d", prefill.prefill("p", [1]), num_choices=2)
    decode.load(request, [1], index=0)
    decode.wait_for(lambda seen: seen.loaded == {("d", 0)})
    decode.drop(request)
    decode.step()
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert not decode.seen.broken_off


def test_after_it_failed(prefill: Instance, decode: Instance) -> None:
    handle = prefill.prefill("p", [1])
    nobody = HeldPort("127.0.0.1")
    handle.remote_port = nobody.port
    request = decode.arrive("d", handle)
    decode.wait_for(lambda seen: "d" in seen.failed)
    nobody.release()
    decode.load(request, [1])  # noted before the scheduler knew
    decode.wait_for(lambda seen: seen.broken_off == {("d", 0)})
    decode.drop(request)
    decode.step()


def test_many_at_random_moments_leave_nothing_behind(prefill: Instance, decode: Instance) -> None:
    """Each load ends one way or the other, and each lease is given back."""
    for n in range(60):
        request = decode.arrive(f"d{n}", prefill.prefill(f"p{n}", range(n % 7, NUM_BLOCKS - 8, 2)))
        decode.load(request, range(len(range(n % 7, NUM_BLOCKS - 8, 2))))
        decode.step()
        for _ in range(n % 5):
            decode.step()
        decode.drop(request)
        decode.step()
    decode.wait_for(lambda seen: len(seen.loaded | seen.broken_off) == 60)
    prefill.wait_for(lambda seen: len(seen.sent) == 60)
    assert not decode.seen.loaded & decode.seen.broken_off
    assert not decode.seen.failed
    assert prefill.worker.stats.leases_held == 0
    assert prefill.worker.stats.leases_expired == 0
    before = decode.blocks.clone()
    decode.fetch("last", prefill.prefill("last", [60]), [63])
    assert torch.equal(decode.blocks[:63], before[:63])  # what was broken off writes no more
