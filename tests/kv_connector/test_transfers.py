"""D gets the blocks that P offered, byte for byte, and P learns when its blocks are free."""

from __future__ import annotations

import random

import torch

from chiasm.kv_transfer import KVTransferRole

from .conftest import Make
from .instance import LAYOUT, NUM_BLOCKS, Instance

SCATTERED = [40, 3, 17, 4, 5, 6, 63, 0]


def test_scattered_blocks(prefill: Instance, decode: Instance) -> None:
    handle = prefill.prefill("p", SCATTERED)
    local = [9, 10, 11, 2, 30, 31, 63, 1]
    decode.fetch("d", handle, local)
    assert decode.holds("p", local)
    prefill.wait_for(lambda seen: seen.sent == {"p"})


def test_adjacent_blocks(prefill: Instance, decode: Instance) -> None:
    handle = prefill.prefill("p", range(10, 50))
    decode.fetch("d", handle, range(20, 60))
    assert decode.holds("p", range(20, 60))


def test_nothing_else_is_written(prefill: Instance, decode: Instance) -> None:
    decode.blocks.fill_(7)
    local = [9, 10, 30]
    decode.fetch("d", prefill.prefill("p", [1, 2, 3]), local)
    others = [block for block in range(NUM_BLOCKS) if block not in local]
    assert torch.all(decode.blocks[others] == 7)


def test_only_the_blocks_that_are_not_here_already(prefill: Instance, decode: Instance) -> None:
    handle = prefill.prefill("p", [8, 9, 2, 3])
    request = decode.arrive("d", handle)
    decode.load(request, [50, 51], [2, 3])
    decode.wait_for(lambda seen: seen.loaded)
    assert torch.equal(decode.blocks[50:52], prefill.blocks[2:4])
    assert decode.worker.stats.transferred_bytes == 2 * LAYOUT.bytes_per_block
    prefill.wait_for(lambda seen: seen.sent == {"p"})


def test_a_load_of_nothing_ends_and_frees_the_producer(prefill: Instance, decode: Instance) -> None:
    request = decode.arrive("d", prefill.prefill("p", [8, 9]))
    decode.load(request, [], [])
    decode.wait_for(lambda seen: seen.loaded == {("d", 0)})
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert prefill.worker.stats.leases_expired == 0


def test_one_load_for_each_continuation(prefill: Instance, decode: Instance) -> None:
    """The producer's blocks are held until the last of them, and each counts as soon as it is here."""
    request = decode.arrive("d", prefill.prefill("p", [4, 7]), num_choices=3)
    decode.load(request, [0, 1], index=0)
    decode.wait_for(lambda seen: ("d", 0) in seen.loaded)
    decode.load(request, [1], [7], index=2)
    decode.load(request, [], [], index=1)
    decode.wait_for(lambda seen: {("d", 1), ("d", 2)} <= seen.loaded)
    prefill.wait_for(lambda seen: seen.sent == {"p"})
    assert decode.holds("p", [0, 1])


def test_a_producer_holds_its_blocks_until_the_last_load(gated: tuple[Instance, Instance]) -> None:
    prefill, decode = gated
    request = decode.arrive("d", prefill.prefill("p", [4, 7]), num_choices=2)
    decode.load(request, [], [], index=0)
    decode.wait_for(lambda seen: ("d", 0) in seen.loaded)
    second = decode.arrive("e", prefill.prefill("q", [5]))
    decode.load(second, [], [])
    decode.step()
    prefill.wait_for(lambda seen: "q" in seen.sent)  # messages arrive in order
    assert prefill.seen.sent == {"q"}
    assert prefill.worker.stats.leases_held == 1


def test_a_claim_is_made_before_there_is_room(prefill: Instance, decode: Instance) -> None:
    request = decode.arrive("d", prefill.prefill("p", [4, 7]))
    decode.fetch("other", prefill.prefill("q", [5]), [0])  # answers come in order
    assert decode.worker.stats.claim_seconds > 0
    decode.load(request, [2, 3])
    decode.wait_for(lambda seen: ("d", 0) in seen.loaded)
    assert decode.holds("p", [2, 3])


def test_many_requests_at_once(prefill: Instance, decode: Instance) -> None:
    choose = random.Random(5)
    theirs, ours = list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS))
    choose.shuffle(theirs)
    choose.shuffle(ours)
    places = {f"p{start}": (theirs[start : start + 8], ours[start : start + 8]) for start in range(0, NUM_BLOCKS, 8)}
    handles = {name: prefill.prefill(name, remote) for name, (remote, _) in places.items()}
    for name, (_, local) in places.items():
        decode.load(decode.arrive(name, handles[name]), local)
    decode.wait_for(lambda seen: seen.loaded == {(name, 0) for name in places})
    assert all(decode.holds(name, local) for name, (_, local) in places.items())
    prefill.wait_for(lambda seen: seen.sent == places.keys())
    assert prefill.worker.stats.leases_held == 0


def test_two_producers(make: Make, connector: str, decode: Instance) -> None:
    producers = [make(connector, KVTransferRole.PRODUCER, engine_id=name) for name in "ab"]
    requests = []
    for place, producer in enumerate(producers):
        handle = producer.prefill(f"p{place}", [1, 5, 2])
        request = decode.arrive(f"d{place}", handle)
        decode.load(request, range(place * 10, place * 10 + 3))
        requests.append(request)
    decode.wait_for(lambda seen: len(seen.loaded) == 2)
    assert all(decode.holds(f"p{place}", range(place * 10, place * 10 + 3)) for place in range(2))


def test_two_consumers(make: Make, connector: str, prefill: Instance) -> None:
    for name in "ab":
        decode = make(connector, KVTransferRole.CONSUMER, engine_id=name)
        decode.fetch(name, prefill.prefill(name, [3, 9]), [0, 1])
        assert decode.holds(name, [0, 1])
    prefill.wait_for(lambda seen: seen.sent == {"a", "b"})


def test_what_was_moved_is_counted(prefill: Instance, decode: Instance) -> None:
    decode.fetch("d", prefill.prefill("p", [1, 2, 3]), [4, 5, 6])
    stats = decode.worker.stats
    assert (stats.transfers, stats.transferred_bytes, stats.failures) == (1, 3 * LAYOUT.bytes_per_block, 0)
    assert stats.transfer_seconds > 0
    assert stats.claim_seconds > 0


def test_held_blocks_are_counted(prefill: Instance) -> None:
    prefill.prefill("p", [1])
    prefill.prefill("q", [2])
    assert prefill.worker.stats.leases_held == 2
