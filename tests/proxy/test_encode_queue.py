"""The queue of images: which encoder gets which image, and when. No clock, no I/O."""

from __future__ import annotations

import pytest

from chiasm.proxy.encode_plan import Entry
from chiasm.proxy.encode_queue import EncodeQueue, Feed
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.placement import Placement
from chiasm.proxy.prompts import ItemWork
from chiasm.wire import Role

from .placed_fleet import ENCODE, PIXELS, add, costs


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def queue(fleet: Fleet) -> EncodeQueue:
    return Placement(fleet).images


def wait(
    queue: EncodeQueue, name: str, due: float = 0.0, *, pixels: int = PIXELS, **more: Instance | str | int
) -> Entry:
    entry = Entry(ItemWork(name, pixels), due, **more)  # type: ignore[arg-type]
    queue.add(entry)
    return entry


def names(feeds: list[Feed]) -> list[list[str]]:
    return [[entry.item.identifier for entry in feed.entries] for feed in feeds]


def encoder(fleet: Fleet, name: str = "e", speed: float = 1.0, device: str = "", **health: int) -> Instance:
    return add(fleet, name, Role.ENCODER, known=costs(speed=speed), device=device, **health)


def test_an_encoder_gets_one_image_to_encode_and_one_to_wait(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet)
    for name in "abc":
        wait(queue, name)
    assert names(queue.feed(0.0)) == [["a", "b"]]
    assert queue.feed(0.0) == []
    assert len(queue) == 1


def test_the_next_image_is_given_when_one_has_been_encoded(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet)
    entries = [wait(queue, name, request=name) for name in "abc"]
    assert names(queue.feed(0.0)) == [["a"], ["b"]]
    queue.finish(entries[:1], 0.5)
    assert names(queue.feed(0.5)) == [["c"]]


def test_a_fast_encoder_gets_more(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, speed=75)  # 7 ms for an image
    for n in range(40):
        wait(queue, str(n))
    assert sum(len(feed.entries) for feed in queue.feed(0.0)) == 8


def test_a_call_has_no_more_bytes_than_its_encoder_takes(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, speed=75, max_body_bytes=10 << 20)
    for name, size in (("a", 4), ("b", 4), ("c", 4), ("d", 30), ("e", 9)):
        wait(queue, name, size_bytes=size << 20)
    assert names(queue.feed(0.0)) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_call_to_an_encoder_that_says_nothing_has_at_most_64_mib(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, speed=75)
    for name in "abcdefg":
        wait(queue, name, size_bytes=11 << 20)
    assert [len(one) for one in names(queue.feed(0.0))] == [5, 2]


def test_what_is_due_first_goes_first(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet)
    wait(queue, "later", 2.0, request="1")
    wait(queue, "soon", 1.0, request="2")
    wait(queue, "soon too", 1.0, request="2")
    assert names(queue.feed(0.0)) == [["soon", "soon too"]]


def test_a_request_that_is_due_earlier_hastens_an_image(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet)
    for name, due in (("a", 1.0), ("b", 2.0)):
        wait(queue, name, due)
    last = wait(queue, "c", 3.0)
    queue.hasten(last, 0.5)
    queue.hasten(last, 9.0)
    assert names(queue.feed(0.0)) == [["c", "a"]]


def test_images_of_a_request_are_spread_in_the_prompts_order(fleet: Fleet, queue: EncodeQueue) -> None:
    one, two = encoder(fleet, "1"), encoder(fleet, "2")
    for name in "abcde":
        wait(queue, name, request="r")
    feeds = queue.feed(0.0)
    assert names(feeds) == [["a", "c"], ["b", "d"]]
    assert [feed.encoder for feed in feeds] == [one, two]


def test_a_call_carries_images_of_one_request_up_to_the_encoders_limit(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, speed=1000, max_items=2)
    for name, request in (("a", "1"), ("b", "2"), ("c", "1"), ("d", "1")):
        wait(queue, name, request=request)
    assert names(queue.feed(0.0)) == [["a", "c"], ["d"], ["b"]]


def test_a_slow_encoder_gets_an_image_only_if_it_finishes_it_first(fleet: Fleet, queue: EncodeQueue) -> None:
    fast, slow = encoder(fleet, "fast"), encoder(fleet, "slow", speed=0.22)
    for n in range(3):
        wait(queue, str(n), request=str(n))
    assert [feed.encoder for feed in queue.feed(0.0)] == [fast, fast]
    for n in range(3, 9):
        wait(queue, str(n), request=str(n))
    feeds = queue.feed(0.0)
    assert [feed.encoder for feed in feeds] == [slow]
    assert names(feeds) == [["4"]]


def test_a_late_encoder_loses_the_images_that_wait_for_it(fleet: Fleet, queue: EncodeQueue) -> None:
    fast, slow = encoder(fleet, "fast"), encoder(fleet, "slow", speed=0.5)
    wait(queue, "a", request="a")
    wait(queue, "b", request="b")
    assert {feed.encoder for feed in queue.feed(0.0)} == {fast}
    wait(queue, "c", request="c")
    assert [feed.encoder for feed in queue.feed(10.0)] == [slow]


def test_the_encoder_on_the_device_that_needs_the_embedding_is_preferred(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet, "1", device="one")
    two = encoder(fleet, "2", device="two")
    pd = add(fleet, "pd", known=costs(), device="two")
    for name in "ab":
        entry = wait(queue, name, language=pd)
        assert [feed.encoder for feed in queue.feed(0.0)] == [two]
        queue.finish([entry], 0.0)


def test_an_image_that_was_published_is_looked_up_at_once(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet)
    entry = wait(queue, "a")
    queue.feed(0.0)
    queue.finish([entry], 1.0)
    for name in "bcd":
        wait(queue, name, request=name)
    assert names(queue.feed(1.0)) == [["b"], ["c"]]
    wait(queue, "a", 9.0)
    assert names(queue.feed(1.0)) == [["a"]]


def test_a_plan_knows_images_that_other_requests_wait_for(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet)
    for name in "abc":
        wait(queue, name)
    queue.feed(0.0)
    plan = queue.plan(1.0, 0.0)
    items = [ItemWork(name, PIXELS) for name in "abcd"]
    assert plan.ready_seconds(items) == pytest.approx([2 * ENCODE, 2 * ENCODE, 3 * ENCODE, 4 * ENCODE])


def test_a_full_encoder_gets_nothing_for_a_while_each_time_longer(fleet: Fleet, queue: EncodeQueue) -> None:
    one = encoder(fleet)
    entry = wait(queue, "a")
    now = 0.0
    for seconds in (0.05, 0.1, 0.2, 0.4, 0.5, 0.5):
        assert names(queue.feed(now)) == [["a"]]
        queue.release([entry], now)
        queue.pause(one, now)
        queue.add(entry)
        assert queue.feed(now) == []
        wakes_at = queue.wakes_at(now)
        assert wakes_at == pytest.approx(now + seconds)
        assert wakes_at is not None
        now = wakes_at
    queue.feed(now)
    queue.finish([entry], now)
    queue.pause(one, now)
    queue.add(entry)
    assert queue.wakes_at(now) == pytest.approx(now + 0.05)


def test_images_of_a_full_encoder_go_elsewhere(fleet: Fleet, queue: EncodeQueue) -> None:
    full, other = encoder(fleet, "full", speed=2), encoder(fleet, "other")
    entry = wait(queue, "a")
    assert [feed.encoder for feed in queue.feed(0.0)] == [full]
    queue.release([entry], 0.0)
    queue.pause(full, 0.0)
    queue.add(entry)
    assert [feed.encoder for feed in queue.feed(0.0)] == [other]


def test_an_image_that_failed_somewhere_does_not_go_there_again(fleet: Fleet, queue: EncodeQueue) -> None:
    one, two = encoder(fleet, "1"), encoder(fleet, "2")
    entry = wait(queue, "a")
    queue.feed(0.0)
    queue.release([entry], 0.0)
    entry.failed_at.add(one)
    queue.add(entry)
    assert [feed.encoder for feed in queue.feed(0.0)] == [two]
    queue.release([entry], 0.0)
    entry.failed_at.add(two)
    queue.add(entry)
    assert queue.feed(0.0) == []
    assert queue.stranded() == [entry]


def test_an_image_that_nobody_needs_makes_room(fleet: Fleet, queue: EncodeQueue) -> None:
    encoder(fleet)
    entries = [wait(queue, name, request=name) for name in "abcd"]
    queue.feed(0.0)
    queue.discard(entries[0], 0.1)
    queue.discard(entries[2], 0.1)
    assert names(queue.feed(0.1)) == [["d"]]
    assert len(queue) == 0


def test_an_outstanding_image_counts_less_the_longer_it_has_been_encoded(fleet: Fleet, queue: EncodeQueue) -> None:
    one = encoder(fleet)
    wait(queue, "a")
    queue.feed(0.0)
    assert queue.plan(0.0, 0.0).left[one] == pytest.approx(ENCODE)
    assert queue.plan(0.0, 0.4).left[one] == pytest.approx(ENCODE - 0.4)
    assert queue.plan(0.0, 2.0).left[one] == pytest.approx(2.0 - ENCODE)


def test_a_plan_sees_what_is_due_earlier(fleet: Fleet, queue: EncodeQueue) -> None:
    one, two = encoder(fleet, "1"), encoder(fleet, "2")
    for n in range(200):
        wait(queue, str(n), 1.0)
    wait(queue, "later", 3.0)
    left = queue.plan(2.0, 0.0).left
    assert left[one] == pytest.approx(100 * ENCODE)
    assert left[two] == pytest.approx(100 * ENCODE)
