"""Placement: which language instance gets a request. No clock, no I/O."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from chiasm.due import STRETCH
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.placement import Placed, Placement
from chiasm.proxy.prompts import Work
from chiasm.wire import LEASE_SECONDS, Load, Role

from .placed_fleet import ENCODE, IMAGE_TOKENS, PER_TOKEN, add, costs, images, text

WHOLE = (Role.PD, Role.AGGREGATED)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


@pytest.fixture
def placement(fleet: Fleet) -> Placement:
    return Placement(fleet)


def place(placement: Placement, work: Work, now: float = 0.0) -> Placed:
    placed = placement.place(work, WHOLE, now)
    assert placed is not None
    return placed


def take(fleet: Fleet, instance: Instance) -> None:
    """Let an instance be the one that got work last."""
    with fleet.working(instance, 1):
        pass


def test_without_a_healthy_instance_there_is_no_place(fleet: Fleet, placement: Placement) -> None:
    assert placement.place(text(10), WHOLE, 0.0) is None
    one = add(fleet, "one")
    assert placement.place(text(10), WHOLE, 0.0, exclude={one}) is None
    assert placement.place(text(10), WHOLE, 0.0, model="other") is None


def test_text_goes_where_less_work_is_before_it(fleet: Fleet, placement: Placement) -> None:
    one, two = add(fleet, "1", known=costs()), add(fleet, "2", known=costs())
    first = place(placement, text(1000))
    second = place(placement, text(100))
    assert {first.instance, second.instance} == {one, two}
    assert place(placement, text(1000)).instance is second.instance


def test_equal_instances_take_turns(fleet: Fleet, placement: Placement) -> None:
    instances = [add(fleet, str(n), known=costs()) for n in range(3)]
    turns: list[Instance] = []
    for n in range(6):
        placed = place(placement, text(10), float(n))
        take(fleet, placed.instance)
        placement.end(placed, float(n))
        turns.append(placed.instance)
    assert turns == [*instances, *instances]


def test_unknown_costs_balance_by_text(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "1"), add(fleet, "2")
    placed = [place(placement, text(1000)).instance for _ in range(6)]
    assert len(set(placed[:2])) == len(set(placed[2:4])) == len(set(placed[4:])) == 2


def test_a_faster_instance_gets_more(fleet: Fleet, placement: Placement) -> None:
    fast, slow = add(fleet, "f", known=costs(speed=4)), add(fleet, "s", known=costs())
    placed = [place(placement, text(1000)).instance for _ in range(10)]
    assert (placed.count(fast), placed.count(slow)) == (8, 2)


def test_the_estimate_is_queue_and_own_prefill(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "1", known=costs())
    first = place(placement, text(984))
    assert first.estimate_seconds == pytest.approx(1000 * PER_TOKEN)
    second = place(placement, text(1984))
    slower = 1.03  # the first streams by then
    assert second.estimate_seconds == pytest.approx((1000 + 2000 * slower) * PER_TOKEN)
    placement.first_token(first, 1.0)
    third = place(placement, text(3984, arrival=1.0), 1.0)
    assert third.estimate_seconds == pytest.approx((2000 * slower + 4000 * 1.06) * PER_TOKEN)


def test_a_short_prompt_is_computed_before_a_long_one_that_came_first(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "1", known=costs())
    place(placement, text(10_000))
    half_a_step = 512 * PER_TOKEN
    assert place(placement, text(84), 0.5).estimate_seconds == pytest.approx(half_a_step + 100 * PER_TOKEN)


def test_running_streams_count(fleet: Fleet, placement: Placement) -> None:
    one, two = add(fleet, "1", known=costs()), add(fleet, "2", known=costs())
    streaming = place(placement, text(10))
    placement.first_token(streaming, 1.0)
    quiet = two if streaming.instance is one else one
    for now in (1.0, 2.0):
        placed = place(placement, text(1000, arrival=now), now)
        assert placed.instance is quiet
        placement.end(placed, now)


def test_beside_streams_a_prompt_waits_for_half_a_decode_step(fleet: Fleet, placement: Placement) -> None:
    one = add(fleet, "1", known=costs())
    alone = place(placement, text(1))
    placement.first_token(alone, 1.0)
    beside = place(placement, text(1), 1.0)
    waits = beside.estimate_seconds - alone.estimate_seconds * (1 + 0.03)
    assert waits == pytest.approx(one.costs.reported.decode_step_seconds / 2)
    placement.end(beside, 1.0)
    for _ in range(20):
        one.costs.learn_step(4 * one.costs.reported.decode_step_seconds, 1.0)
    waits = place(placement, text(1), 1.0).estimate_seconds - alone.estimate_seconds * (1 + 0.03)
    assert waits == pytest.approx(4 * one.costs.reported.decode_step_seconds / 2, rel=0.1)


def test_an_instance_says_how_much_longer_a_prompt_takes_beside_streams(fleet: Fleet, placement: Placement) -> None:
    one = add(fleet, "1", known=replace(costs(), beside_streams=1.8))
    first = place(placement, text(984))
    behind = place(placement, text(984))
    assert behind.estimate_seconds == pytest.approx((1000 + 1.8 * 1000) * PER_TOKEN)
    placement.end(behind, 0.0)
    placement.first_token(first, 1.0)
    beside = place(placement, text(984, arrival=1.0), 1.0)
    half_a_step = one.costs.reported.decode_step_seconds / 2
    assert beside.estimate_seconds == pytest.approx(1.8 * 1000 * PER_TOKEN + half_a_step)


def test_what_a_prompt_costs_is_learned_without_what_streams_took(fleet: Fleet, placement: Placement) -> None:
    one = add(fleet, "1", known=replace(costs(), beside_streams=2.0))
    placement.first_token(place(placement, text(984)), 0.0)
    for work, prefill in ((1000 * PER_TOKEN, 9.0), (None, 2000 * PER_TOKEN)):
        for n in range(10):
            placed = place(placement, text(984), float(n))
            placement.first_token(placed, float(n), prompt_tokens=1000, work_seconds=work, prefill_seconds=prefill)
            placement.end(placed, float(n))
        assert one.costs.prefill_seconds_per_token(10.0) == pytest.approx(PER_TOKEN)


def test_a_prompt_waits_no_longer_for_a_later_one_than_that_takes(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "1", known=costs())
    place(placement, text(184))
    assert place(placement, text(84)).estimate_seconds == pytest.approx((200 / 2 + 100) * PER_TOKEN)


def test_instances_of_one_device_learn_together(fleet: Fleet, placement: Placement) -> None:
    """Else the one that has computed alone seems faster, and all prompts of a burst go there."""
    one = add(fleet, "1", known=costs(), device="d", cpus=[0, 1])
    two = add(fleet, "2", known=costs(speed=1.07), device="d", cpus=[0, 1])
    elsewhere = add(fleet, "3", known=costs(), device="e")
    for n in range(10):
        placed = placement.place(text(984), WHOLE, float(n), exclude={two, elsewhere})
        assert placed is not None
        placement.first_token(placed, float(n), prompt_tokens=1000, work_seconds=500 * PER_TOKEN)
        placement.end(placed, float(n))
    assert one.costs.prefill_seconds_per_token(10.0) == two.costs.prefill_seconds_per_token(10.0)
    assert one.costs.prefill_seconds_per_token(10.0) < 0.6 * PER_TOKEN
    assert elsewhere.costs.prefill_seconds_per_token(10.0) == PER_TOKEN


def test_who_waits_beside_streams_waits_once(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "1", known=costs())
    placement.first_token(place(placement, text(1)), 1.0)
    beside = place(placement, text(1), 1.0)
    behind = place(placement, text(1), 1.0)
    assert behind.estimate_seconds < 2 * beside.estimate_seconds


def test_an_image_is_waited_for_where_its_prefill_would_begin_earlier(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "e", Role.ENCODER, known=costs())
    add(fleet, "pd", known=costs())
    placed = place(placement, images("a", tokens=24))
    assert list(placed.ready_seconds) == [ENCODE]
    assert placed.estimate_seconds == pytest.approx(ENCODE + (IMAGE_TOKENS + 40) * PER_TOKEN)


def test_prefill_of_an_image_overlaps_with_encoding_of_the_next(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "e", Role.ENCODER, known=costs())
    add(fleet, "pd", known=costs())
    placed = place(placement, images("a", "b", tokens=24))
    assert placed.estimate_seconds == pytest.approx(2 * ENCODE + (IMAGE_TOKENS + 40) * PER_TOKEN)


def test_an_aggregated_instance_encodes_as_part_of_its_work(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "a", Role.AGGREGATED, known=costs())
    placed = place(placement, images("a", "b", tokens=24))
    assert not placed.ready_seconds
    assert placed.estimate_seconds == pytest.approx(2 * ENCODE + (2 * IMAGE_TOKENS + 40) * PER_TOKEN)


def test_a_mixed_fleet_uses_whichever_is_earlier(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "e", Role.ENCODER, known=costs())
    pd, aggregated = add(fleet, "pd", known=costs()), add(fleet, "a", Role.AGGREGATED, known=costs())
    several = place(placement, images("a", "b", "c"))
    assert several.instance is pd
    placement.queue(several, several.prompt.work.items)
    placement.images.feed(0.0)
    assert place(placement, images("d")).instance is aggregated


def test_without_an_encoder_images_go_to_instances_that_encode(fleet: Fleet, placement: Placement) -> None:
    encoder = add(fleet, "e", Role.ENCODER, known=costs())
    add(fleet, "pd", known=costs(speed=10))
    aggregated = add(fleet, "a", Role.AGGREGATED, known=costs(speed=0.1))
    fleet.fail(encoder, "gone", 0.0)
    assert place(placement, images("a")).instance is aggregated
    assert place(placement, text(10)).instance is not aggregated


def test_a_repeat_goes_where_its_beginning_is_cached(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "e", Role.ENCODER, known=costs(encode=0.001))
    add(fleet, "1", known=costs()), add(fleet, "2", known=costs())
    for now in range(4):
        first = place(placement, images("a", arrival=now), now)
        take(fleet, first.instance)
        placement.end(first, now + 0.5)
        repeat = place(placement, images("a", "b", arrival=now), now + 0.5)
        assert repeat.instance is first.instance
        placement.end(repeat, now + 0.9)


def test_a_repeat_goes_elsewhere_if_the_cache_saves_less_than_the_queue_costs(
    fleet: Fleet, placement: Placement
) -> None:
    add(fleet, "e", Role.ENCODER, known=costs(encode=0.001))
    add(fleet, "1", known=costs()), add(fleet, "2", known=costs())
    first = place(placement, images("a"))
    placement.end(first, 1.0)
    for tokens, stays in ((100, True), (1000, False)):
        busy = placement.place(text(tokens, arrival=-9.0), WHOLE, 1.0, exclude=_others(fleet, first.instance))
        assert busy is not None
        repeat = place(placement, images("a", tokens=200, arrival=1.0), 1.0)
        assert (repeat.instance is first.instance) is stays
        placement.end(busy, 1.0)
        placement.end(repeat, 1.0)


def _others(fleet: Fleet, instance: Instance) -> set[Instance]:
    return {one for one in fleet.healthy(Role.PD) if one is not instance}


def test_a_request_is_due_a_multiple_of_its_own_work_after_its_arrival(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "e", Role.ENCODER, known=costs())
    add(fleet, "pd", known=costs())
    work = images("a", tokens=24, arrival=3.0)
    assert placement.due(work, 9.0) == pytest.approx(3.0 + STRETCH * (ENCODE + (IMAGE_TOKENS + 40) * PER_TOKEN))


def test_prefill_is_learned_per_instance_and_text_for_all(fleet: Fleet, placement: Placement) -> None:
    one, two = add(fleet, "1", known=costs()), add(fleet, "2", known=costs())
    for n in range(40):
        placed = placement.place(text(1000, n), WHOLE, float(n), exclude={two})
        assert placed is not None
        placement.first_token(placed, float(n), prefill_seconds=1000 * PER_TOKEN, prompt_tokens=500)
        placement.end(placed, float(n))
    assert one.costs.prefill_seconds_per_token(40.0) == pytest.approx(2 * PER_TOKEN, rel=0.1)
    assert two.costs.prefill_seconds_per_token(40.0) == PER_TOKEN
    placed = place(placement, text(1000, 40.0), 40.0)
    assert placed.instance is two
    assert placed.estimate_seconds == pytest.approx(516 * PER_TOKEN, rel=0.1)


def test_images_whose_tokens_an_instance_does_not_know_say_nothing_of_text(fleet: Fleet, placement: Placement) -> None:
    """As of vLLM, which reports what prefill took and not what images take."""
    add(fleet, "e", Role.ENCODER, known=costs()), add(fleet, "vllm")
    first = place(placement, text(1000))
    before = first.prompt.seconds
    placement.end(first, 0.0)
    for n in range(40):
        placed = place(placement, images("a", tokens=24), float(n))
        seconds = placed.instance.costs.prefill_seconds_per_token(float(n)) * 10_000
        placement.first_token(placed, float(n), prefill_seconds=seconds, prompt_tokens=10_000)
        placement.end(placed, float(n))
    assert place(placement, text(1000)).prompt.seconds == pytest.approx(before)


def test_language_instances_of_one_device_share_it(fleet: Fleet, placement: Placement) -> None:
    add(fleet, "1", known=costs(), device="m/cpu"), add(fleet, "2", known=costs(), device="m/cpu")
    first = place(placement, text(984))
    take(fleet, first.instance)
    second = place(placement, text(984))
    assert second.instance is not first.instance
    assert second.estimate_seconds == pytest.approx(2 * first.estimate_seconds)


@pytest.mark.parametrize(("cores", "slower"), [(1, 2.0), (2, 1.0), (3, 1.0)])
def test_instances_slow_each_other_down_where_there_are_fewer_cores(
    fleet: Fleet, placement: Placement, cores: int, slower: float
) -> None:
    for name in ("1", "2"):
        add(fleet, name, known=costs(), device="m/cpu", cpus=list(range(cores)))
    first = place(placement, text(984))
    take(fleet, first.instance)
    assert place(placement, text(984)).estimate_seconds == pytest.approx(slower * first.estimate_seconds)


def test_an_idle_core_is_better_than_one_that_computes(fleet: Fleet, placement: Placement) -> None:
    for name in ("1", "2"):
        add(fleet, name, known=costs(), device="m/cpu", cpus=[0, 1])
    first = place(placement, text(984))
    take(fleet, first.instance)
    (other,) = {*fleet.instances} - {first.instance}
    take(fleet, other)  # so it was taken later
    assert place(placement, text(2000)).instance is other


# ---- what other proxies have given -----------------------------------------------------------------------------------------


def tell(fleet: Fleet, placement: Placement, instance: Instance, seconds: float, now: float = 0.0) -> None:
    """Have an instance say how much work it has."""
    assert instance.health is not None
    fleet.on_load = lambda one: placement.note_load(one, now)
    fleet.succeed(instance, replace(instance.health, load=Load(outstanding_seconds=seconds)))


def test_work_of_other_proxies_counts_and_is_done_as_time_passes() -> None:
    alone = 116 * PER_TOKEN
    for told_at, now, left in ((None, 0.0, 0.0), (0.0, 0.0, 3.0), (0.0, 2.0, 1.0), (0.0, 5.0, 0.0)):
        fleet = Fleet()
        one, placement = add(fleet, "1", known=costs()), Placement(fleet)
        if told_at is not None:
            tell(fleet, placement, one, 3.0, told_at)
        assert place(placement, text(100, now), now).estimate_seconds == pytest.approx(left + alone)


def test_a_prompt_goes_where_other_proxies_have_given_less(fleet: Fleet, placement: Placement) -> None:
    one, two = add(fleet, "1", known=costs()), add(fleet, "2", known=costs())
    tell(fleet, placement, one, 0.5)
    assert [place(placement, text(100)).instance for _ in range(3)] == [two, two, two]


def test_the_own_work_of_a_proxy_does_not_count_twice(fleet: Fleet, placement: Placement) -> None:
    one = add(fleet, "1", known=costs())
    own = place(placement, text(1000))
    before = placement.place(text(100, 10.0), WHOLE, 0.0)
    assert before is not None
    placement.end(before, 0.0)
    tell(fleet, placement, one, own.prompt.seconds - 0.1)
    again = placement.place(text(100, 10.0), WHOLE, 0.0)
    assert again is not None
    assert again.estimate_seconds == before.estimate_seconds


@pytest.mark.parametrize(("age", "counts"), [(LEASE_SECONDS, True), (LEASE_SECONDS + 1, False)])
def test_a_load_that_was_told_long_ago_counts_no_more(
    fleet: Fleet, placement: Placement, age: float, counts: bool
) -> None:
    tell(fleet, placement, add(fleet, "1", known=costs()), 1000.0)
    assert (place(placement, text(100, age), age).estimate_seconds > 900) is counts
