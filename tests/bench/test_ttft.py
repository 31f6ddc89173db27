"""The bounds of a time to first token."""

from __future__ import annotations

from chiasm.bench.checkpoints import Alone


def test_a_pipeline_takes_the_slower_stage_once_for_each_further_image() -> None:
    assert [Alone(3.0, 1.0).pipelined(images) for images in (1, 4)] == [4.0, 13.0]
    assert [Alone(1.0, 3.0).pipelined(images) for images in (1, 4)] == [4.0, 13.0]


def test_cores_that_are_always_busy_take_half_of_all_the_work() -> None:
    assert [Alone(3.0, 1.0).all_busy(images) for images in (1, 4)] == [2.0, 8.0]
