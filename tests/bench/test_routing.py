"""Images at encoders with memories of their own, simulated with the proxy's own queue. Nothing here takes real time."""

from __future__ import annotations

from chiasm.bench.routing import ENCODE_SECONDS, Image, RoutingSimulation, new, popular, shared_hit_share
from chiasm.bench.statistics import quantile

ENCODERS = 4


def test_separate_memories_are_hit_nearly_as_often_as_a_common_one() -> None:
    images = popular(8000, items=1000, rate=100.0, seed=5)
    routed = RoutingSimulation(ENCODERS, capacity=100).run(images)
    assert routed.hit_share >= 0.95 * shared_hit_share(images, 400)


def test_without_preference_they_are_hit_much_less() -> None:
    images = popular(4000, items=1000, rate=60.0, seed=5)
    routed = RoutingSimulation(ENCODERS, capacity=100, peers=False).run(images)
    assert routed.hit_share < 0.8 * shared_hit_share(images, 400)


def test_new_images_wait_hardly_longer_than_for_whoever_is_free_first() -> None:
    images = new(6000, rate=0.8 * ENCODERS / (ENCODE_SECONDS * 7 / 12), seed=5)
    preferred = RoutingSimulation(ENCODERS, capacity=100).run(images).waits
    first = RoutingSimulation(ENCODERS, capacity=100, peers=False).run(images).waits
    assert quantile(preferred, 0.99) <= 1.2 * quantile(first, 0.99)


def test_equal_images_at_several_proxies_at_once_are_encoded_once() -> None:
    images = [Image(1.0, "the same") for _ in range(10)]
    routed = RoutingSimulation(ENCODERS, capacity=100, proxies=5).run(images)
    assert sum(routed.encoded) == 1
    assert (routed.joined, routed.hits) == (9, 0)


def test_an_image_that_is_most_of_the_traffic_does_not_drown_its_encoder() -> None:
    others = new(3000, rate=40.0, seed=5)
    hot = [Image(image.arrival, "hot") for image in others]
    images = sorted([*others, *hot], key=lambda image: image.arrival)
    routed = RoutingSimulation(ENCODERS, capacity=3000).run(images)
    assert max(routed.encoded) <= 1.3 * sum(routed.encoded) / ENCODERS


def test_every_image_is_encoded_or_found_or_joins_another() -> None:
    images = popular(3000, items=300, rate=80.0, seed=5)
    routed = RoutingSimulation([1.0, 2.0, 0.5], capacity=20, proxies=3).run(images)
    assert sum(routed.encoded) + routed.hits + routed.joined == len(images)


def test_hedging_makes_slow_encodings_matter_less_and_costs_one_call_in_twenty_at_most() -> None:
    images = new(4000, rate=0.4 * ENCODERS / (ENCODE_SECONDS * 7 / 12), seed=5)
    hedged, not_hedged = (
        RoutingSimulation(ENCODERS, capacity=100, slow_share=0.02, hedged_share=share).run(images)
        for share in (0.05, 0.0)
    )
    assert len(hedged.seconds) == len(not_hedged.seconds) == len(images)
    assert quantile(hedged.seconds, 0.99) < 0.8 * quantile(not_hedged.seconds, 0.99)
    assert 0 < hedged.hedges <= len(images) // 20
    assert not_hedged.hedges == 0
