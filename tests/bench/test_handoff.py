"""Handoffs are measured at every size, and leave nothing behind. How long they take is not tested."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chiasm.bench.measurements.handoff import HandoffResult, measure_handoff
from chiasm.bench.memory_handoff import measure_memory_handoff


def test_every_size_is_measured_and_no_file_remains(tmp_path: Path) -> None:
    results = measure_handoff(tmp_path, [1, 100_000], repeats=2)
    assert [result.size_bytes for result in results] == [4096, 98_304]
    for result in results:
        assert result.memcpy_seconds > 0
        assert result.ratio > 0
    assert os.listdir(tmp_path) == []


def test_the_ratio_is_of_the_handoff_to_writing_and_reading() -> None:
    result = HandoffResult(4096, 2.0, 1.0, 0.5, 6.0)
    assert result.ratio == pytest.approx(2.0)


@pytest.mark.parametrize("connector", ["SharedMemoryConnector", "TcpConnector"])
def test_handoffs_from_memory_are_measured_beside_the_bytes_alone(connector: str) -> None:
    result = measure_memory_handoff(connector, 100_000, repeats=2)
    assert result.size_bytes == 98_304
    assert min(result.memcpy_seconds, result.bare_seconds, result.handoff_seconds) > 0
