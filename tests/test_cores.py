"""Which cores there are for a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm import cores


@pytest.mark.parametrize(("limit", "count"), [("100000 100000", 1), ("150000 100000", 2), ("max 100000", 8), ("?", 8)])
def test_a_container_has_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, count: int
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "allowed_cpus", lambda: set(range(8)))
    assert cores.usable_cores() == count


def test_threads_that_wait_sleep_unless_a_person_has_set_it_otherwise() -> None:
    environment: dict[str, str] = {}
    cores.share_cores(3, environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3"}
    environment = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}
    cores.share_cores(3, environment)
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}
