"""How many cores a process may use, and how its threads wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm import cores


@pytest.mark.parametrize(("limit", "count"), [("100000 100000", 1), ("150000 100000", 2), ("max 100000", 8), ("?", 8)])
def test_the_quota_of_a_container_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, count: int
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "allowed_cpus", lambda: set(range(8)))
    assert cores.usable_cores() == count


def test_waiting_threads_sleep_unless_the_environment_says_otherwise() -> None:
    environment: dict[str, str] = {}
    cores.share_cores(3, environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3"}
    environment = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}
    cores.share_cores(3, environment)
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}
