"""What an engine measures of itself at start."""

from __future__ import annotations

from chiasm.wire import Role
from tests.engine.conftest import Encoder, Start


def test_an_encoder_knows_what_images_cost(encoder: Encoder) -> None:
    costs = encoder.engine.costs
    assert costs is not None
    pixels = [image.pixels for image in costs.images]
    assert pixels == sorted(pixels)
    assert all(image.encode_seconds > 0 and image.tokens > 0 for image in costs.images)


def test_a_pd_knows_what_prompts_steps_and_images_cost(start: Start) -> None:
    costs = start(Role.PD).engine.costs
    assert costs is not None
    assert costs.prefill_seconds_per_token > 0
    assert costs.decode_step_seconds > 0
    assert costs.beside_streams > 1
    assert [image.encode_seconds for image in costs.images] == [0.0] * len(costs.images)


def test_calibration_leaves_nothing_in_the_prefix_cache_and_the_counters(start: Start) -> None:
    stats = start(Role.PD).engine.stats()
    assert (stats.kv_blocks_used, stats.prefix_cache_query_tokens, stats.generation_tokens) == (0, 0, 0)
