"""Costs of instances: what they report, and what their answers correct."""

from __future__ import annotations

import pytest

from chiasm.proxy.costs import Correction, InstanceCosts
from chiasm.wire import Costs, ImageCost

from .placed_fleet import ENCODE, IMAGE_TOKENS, PIXELS, costs


def known() -> InstanceCosts:
    instance = InstanceCosts()
    instance.reported = costs()
    return instance


def test_costs_between_the_reported_sizes_are_interpolated() -> None:
    instance = known()
    assert instance.encode_seconds(PIXELS, 0.0) == ENCODE
    assert instance.encode_seconds(PIXELS * 5 // 2, 0.0) == pytest.approx(2.5 * ENCODE)
    assert instance.image_tokens(PIXELS * 5 // 2) == pytest.approx(2.5 * IMAGE_TOKENS)


def test_costs_beyond_the_reported_sizes_are_those_of_the_nearest() -> None:
    instance = known()
    assert instance.encode_seconds(100 * PIXELS, 0.0) == instance.encode_seconds(4 * PIXELS, 0.0)
    assert instance.encode_seconds(1, 0.0) == instance.encode_seconds(PIXELS // 4, 0.0)


def test_unknown_costs_grow_with_pixels() -> None:
    instance = InstanceCosts()
    assert instance.encode_seconds(2000, 0.0) == 2 * instance.encode_seconds(1000, 0.0) > 0
    assert instance.image_tokens(1000) > 0
    assert instance.prefill_seconds_per_token(0.0) > 0


def test_costs_of_an_instance_that_encodes_nothing_still_tell_tokens() -> None:
    instance = InstanceCosts()
    instance.reported = Costs(images=[ImageCost(pixels=PIXELS, tokens=7)])
    assert instance.image_tokens(PIXELS) == 7
    assert instance.encode_seconds(PIXELS, 0.0) > 0


def test_a_slowdown_by_five_is_known_after_twenty_items() -> None:
    instance = known()
    for count in range(20):
        instance.learn_encode([PIXELS], 5 * ENCODE, float(count))
    assert instance.encode_seconds(PIXELS, 20.0) == pytest.approx(5 * ENCODE, rel=0.1)


def test_a_slowdown_shows_in_sizes_that_were_not_measured() -> None:
    instance = known()
    for count in range(20):
        instance.learn_encode([PIXELS], 5 * ENCODE, float(count))
    assert instance.encode_seconds(PIXELS // 4, 20.0) > 2 * ENCODE / 4


def test_a_step_of_decoding_is_corrected_and_forgotten() -> None:
    instance = known()
    step = instance.reported.decode_step_seconds
    for count in range(20):
        instance.learn_step(5 * step, float(count))
    assert instance.decode_step_seconds(20.0) == pytest.approx(5 * step, rel=0.1)
    assert instance.learned(20.0).decode_step_seconds == instance.decode_step_seconds(20.0)
    assert instance.decode_step_seconds(10_000.0) == pytest.approx(step)


def test_without_a_reported_step_none_is_learned() -> None:
    instance = InstanceCosts()
    instance.learn_step(0.1, 0.0)
    assert instance.decode_step_seconds(0.0) == 0


def test_sizes_may_deviate_in_different_ways() -> None:
    instance = known()
    for count in range(200):
        instance.learn_encode([PIXELS], ENCODE, float(count))
        instance.learn_encode([PIXELS // 4], ENCODE / 2, float(count))
    assert instance.encode_seconds(PIXELS, 200.0) == pytest.approx(ENCODE, rel=0.1)
    assert instance.encode_seconds(PIXELS // 4, 200.0) == pytest.approx(ENCODE / 2, rel=0.1)


def test_one_outlier_does_not_condemn_an_instance() -> None:
    instance = known()
    instance.learn_encode([PIXELS], 1000 * ENCODE, 0.0)
    assert instance.encode_seconds(PIXELS, 0.0) < 2 * ENCODE


def test_costs_that_were_learned_wrong_recover_by_measurement_and_by_time() -> None:
    instance = known()
    for _ in range(20):
        instance.learn_encode([PIXELS], 50 * ENCODE, 0.0)
    assert instance.encode_seconds(PIXELS, 3600.0) == pytest.approx(ENCODE)
    for _ in range(20):
        instance.learn_encode([PIXELS], ENCODE, 0.0)
    assert instance.encode_seconds(PIXELS, 0.0) == pytest.approx(ENCODE, rel=0.2)


def test_a_call_with_several_images_counts_once_per_size_class() -> None:
    one, many = known(), known()
    one.learn_encode([PIXELS], 3 * ENCODE, 0.0)
    many.learn_encode([PIXELS] * 8, 24 * ENCODE, 0.0)
    assert many.encode_seconds(PIXELS, 0.0) == pytest.approx(one.encode_seconds(PIXELS, 0.0))


@pytest.mark.parametrize("measured", [0.0, -1.0, float("inf"), float("nan")])
def test_nonsense_is_not_learned(measured: float) -> None:
    correction = Correction()
    correction.learn(measured, 1.0, 0.0)
    assert correction.factor(0.0) == 1.0


def test_the_transfer_is_averaged_and_an_outlier_bounded() -> None:
    instance = InstanceCosts()
    for _ in range(40):
        instance.learn_transfer(0.004)
    assert instance.transfer_seconds == pytest.approx(0.004, rel=0.1)
    instance.learn_transfer(60.0)
    assert instance.transfer_seconds < 0.01
