"""Reads of a shared cache are measured for every client that is installed. How long they take is not tested."""

from __future__ import annotations

from chiasm.bench.measurements.store import measure_reads, server


def test_clients_read_the_same_entry_in_turn() -> None:
    with server() as (url, says):
        taken = measure_reads(url, (4 << 20) + 1, 2)
    assert says.split()[0] in ("redis", "valkey")
    assert list(taken)[:2] == ["chiasm", "redis-py + hiredis"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in taken.values())
