"""Runs of bytes, cut into batches."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from chiasm.transfer.memory import Run, batches_of

RUNS = st.lists(st.builds(Run, st.integers(0, 99), st.integers(0, 99), st.integers(1, 20)), max_size=12)


@given(RUNS, st.integers(1, 25), st.integers(1, 5))
def test_batches_keep_both_limits_and_have_every_byte_of_the_runs_in_order(
    runs: list[Run], max_bytes: int, max_runs: int
) -> None:
    batches = list(batches_of(runs, max_bytes=max_bytes, max_runs=max_runs))
    assert all(0 < len(batch) <= max_runs for batch in batches)
    assert all(sum(run.num_bytes for run in batch) <= max_bytes for batch in batches)
    assert pairs_of(run for batch in batches for run in batch) == pairs_of(runs)


def pairs_of(runs: Iterable[Run]) -> list[tuple[int, int]]:
    """Where each byte of the runs goes, and where it comes from."""
    return [(run.local + index, run.remote + index) for run in runs for index in range(run.num_bytes)]
