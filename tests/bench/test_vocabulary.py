"""Steps of both kinds are measured for every batch. How long they take is not tested."""

from __future__ import annotations

from pathlib import Path

from chiasm.bench.measurements.vocabulary import measure_steps


def test_greedy_and_sampled_steps_are_taken_in_pairs(checkpoint: Path) -> None:
    taken = measure_steps(checkpoint, (1, 3), steps=2)
    assert {batch: list(kinds) for batch, kinds in taken.items()} == {
        1: ["greedy", "sampled"],
        3: ["greedy", "sampled"],
    }
    for kinds in taken.values():
        assert all(len(milliseconds) == 2 and min(milliseconds) > 0 for milliseconds in kinds.values())
