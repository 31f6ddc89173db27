"""How many encoders are desired, by what images cost and how long they wait."""

from __future__ import annotations

import pytest

from chiasm.proxy.encoder_demand import Backlog, EncoderDemand

from .conftest import Start, ask, image, image_bytes
from .instances import FakeInstance

START, CALM = 1.5, 300.0
NOTHING = Backlog(0.0, 0, 1)


def demand(wait_seconds: float = 0.5, calm_seconds: float = CALM) -> EncoderDemand:
    return EncoderDemand(wait_seconds, START, calm_seconds)


def waiting(seconds: float, images: int = 100, encoders: int = 0) -> Backlog:
    """So much waits, without an encoder if none is given."""
    return Backlog(seconds, images, encoders)


def feed(one: EncoderDemand, start: int, end: int, seconds: float) -> None:
    """Images that cost so many seconds come each second."""
    for now in range(start, end):
        one.note(seconds, now)


def test_none_is_needed_while_nothing_comes() -> None:
    assert demand().desired(NOTHING, 0.0) == 0


def test_the_load_is_what_came_in_a_window() -> None:
    one = demand()
    feed(one, 0, 60, 2.0)
    assert one.load(60.0, 59.5) == pytest.approx(2.0)
    feed(one, 60, 70, 8.0)
    assert one.load(10.0, 69.5) == pytest.approx(8.0)
    assert one.load(60.0, 69.5) == pytest.approx((50 * 2 + 10 * 8) / 60)


def test_images_count_by_what_they_cost() -> None:
    many, few = demand(), demand()
    for now in range(60):
        for _ in range(20):
            many.note(0.1, now)
        few.note(2.0, now)
    assert many.desired(NOTHING, 59.5) == pytest.approx(few.desired(NOTHING, 59.5)) == pytest.approx(2 / 0.55)


def test_a_burst_asks_for_more_at_once() -> None:
    one = demand()
    feed(one, 0, 60, 0.5)
    assert one.desired(NOTHING, 59.5) == pytest.approx(0.5 / 0.55)
    feed(one, 60, 70, 5.0)
    assert one.desired(NOTHING, 69.5) == pytest.approx(5 / 0.85)


def test_what_waits_asks_for_more_whatever_came() -> None:
    assert demand(wait_seconds=0.5).desired(waiting(3.2), 0.0) == pytest.approx(6.4)


def test_what_is_done_before_an_encoder_could_start_needs_none() -> None:
    assert demand().desired(waiting(2 * START - 0.1, encoders=2), 0.0) == 0
    assert demand().desired(waiting(2 * START + 0.1, encoders=2), 0.0) == pytest.approx((2 * START + 0.1) / 0.5)


def test_images_that_go_on_to_come_ask_for_more_before_much_waits() -> None:
    at_once, one_by_one = demand(), demand()
    for tenth in range(10):
        at_once.note(0.2, 9.9)
        one_by_one.note(0.2, 9 + tenth / 10)
    backlog = waiting(1.0, encoders=1)
    assert at_once.desired(backlog, 9.95) < 1  # done before an encoder could start
    assert one_by_one.desired(backlog, 9.95) == pytest.approx(2.0)


def test_no_more_are_needed_than_there_are_images() -> None:
    assert demand().desired(waiting(30.0, images=3), 0.0) == 3
    one = demand()
    one.note(40.0, 0.0)
    one.note(40.0, 0.0)
    assert one.desired(NOTHING, 1.0) == 2
    one.note(0.0, 1.0)  # an encoder has its embedding
    assert one.desired(NOTHING, 1.0) == 2


def test_what_is_desired_is_the_most_that_a_calm_while_needed() -> None:
    one = demand()
    needed = {0.0: 2.0, 100.0: 1.5, 200.0: 1.0, 201.0: 0.5}
    assert [one.desired(waiting(seconds), now) for now, seconds in needed.items()] == [4, 4, 4, 4]
    later = [CALM - 1, CALM + 1, CALM + 99, CALM + 101, CALM + 199, CALM + 202]
    assert [one.desired(NOTHING, now) for now in later] == [4, 3, 3, 2, 2, 0]


def test_need_that_returns_begins_the_calm_while_anew() -> None:
    one = demand()
    assert one.desired(waiting(2.0), 0.0) == 4
    assert one.desired(waiting(2.0), CALM - 1) == 4
    assert one.desired(NOTHING, 2 * CALM - 2) == 4
    assert one.desired(NOTHING, 2 * CALM) == 0


def test_without_a_calm_while_it_is_what_is_needed_now() -> None:
    one = demand(calm_seconds=0.0)
    assert [one.desired(waiting(seconds), now) for now, seconds in enumerate((2.0, 0.5, 1.0))] == [4, 1, 2]


def test_it_remembers_no_more_than_the_longest_window_and_the_parts_of_a_calm_while() -> None:
    one = demand()
    for tenth in range(10 * 3 * round(CALM)):  # three calm whiles; after the first, nothing more should be kept
        now = tenth / 10
        one.note(0.1, now)
        one.desired(waiting(1e6 - now, 10**9), now)  # always less than before, so that each part counts
    assert len(one._came) <= 245
    assert len(one._peaks) <= 301


async def test_the_proxy_tells_the_load_of_its_images_and_the_encoders_that_they_need(start: Start) -> None:
    front = await start([FakeInstance("encoder"), FakeInstance("pd")], encode_wait_seconds=1e-3)
    assert await front.metric('chiasm_fleet_desired_instances{role="encoder"}') == 0
    assert await front.metric('chiasm_fleet_encode_load{window_seconds="10"}') == 0
    assert (await front.post(ask("x", image(image_bytes())))).status == 200
    assert await front.metric('chiasm_fleet_desired_instances{role="encoder"}') > 0
    load = await front.metric('chiasm_fleet_encode_load{window_seconds="10"}')
    assert load > 0
    assert await front.metric('chiasm_fleet_encode_load{window_seconds="60"}') == pytest.approx(load / 6)
    assert await front.metric("chiasm_fleet_encode_wait_seconds") == 0


async def test_an_image_that_an_encoder_has_is_no_load(start: Start) -> None:
    front = await start([FakeInstance("encoder"), FakeInstance("pd")])
    await front.post(ask("x", image(image_bytes())))
    load = await front.metric('chiasm_fleet_encode_load{window_seconds="60"}')
    await front.post(ask("y", image(image_bytes())))
    assert await front.metric('chiasm_fleet_encode_load{window_seconds="60"}') == load
