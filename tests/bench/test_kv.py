"""What the KV measurement finds out. How long things take is not tested."""

from __future__ import annotations

import importlib.util

import pytest

from chiasm.bench.client import StreamedAnswer
from chiasm.bench.measurements.kv import handover_parts
from chiasm.bench.measurements.kv_transfers import TransferResult, measure_transfers
from chiasm.errors import ChiasmError, ConfigurationError
from chiasm.prometheus import read_samples
from chiasm.transfer.nixl import MODULES

HAS_NIXL = any(importlib.util.find_spec(name) for name in MODULES)
NEEDS_NIXL = pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed")

BEFORE = read_samples("chiasm_kv_claim_seconds_total 1.0\nchiasm_kv_transfer_seconds_total 2.0\n")
AFTER = read_samples("chiasm_kv_claim_seconds_total 1.003\nchiasm_kv_transfer_seconds_total 2.005\n")


@pytest.mark.parametrize(
    "connector", ["SharedMemoryConnector", "TcpConnector", pytest.param("NixlConnector", marks=NEEDS_NIXL)]
)
def test_every_size_is_measured(connector: str) -> None:
    results = measure_transfers(connector, [1, 1_000_000], block_bytes=65536, repeats=2)
    assert [result.size_bytes for result in results] == [65536, 15 * 65536]
    for result in results:
        assert 0 < result.copy_seconds < result.transfer_seconds
        assert result.memcpy_ratio > 0
        assert (result.bare_nixl_ratio is not None) == (connector == "NixlConnector")


def test_ratios_are_of_speeds() -> None:
    result = TransferResult("NixlConnector", 4096, 4096, 9.0, 4.0, 1.0, 2.0)
    assert (result.memcpy_ratio, result.bare_nixl_ratio) == (0.25, 0.5)


def test_an_unknown_connector_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Pigeon"):
        measure_transfers("Pigeon", [1], block_bytes=4096, repeats=1)


def _answer() -> StreamedAnswer:
    at_p = {"queue": 0.001, "wait": 0.0, "transfer": 0.0, "prefill": 0.9, "ttft": 0.91, "proxy": 0.0001}
    at_d = {"queue": 0.002, "kv": 0.010, "prefill": 0.0, "ttft": 0.030, "handover": 0.034}
    return StreamedAnswer(0.0, token_times=[1.0, 1.04, 1.05, 1.06], timing_at_start=at_p, timing=at_p | at_d)


def test_the_parts_of_the_gap_add_up_to_it() -> None:
    parts = {name: round(1000 * seconds, 3) for name, seconds in handover_parts(_answer(), BEFORE, AFTER).items()}
    assert parts == {
        "gap of tokens 1 and 2": 40,
        "P: handle after token": 6,
        "proxy: call of D": 4,
        "D: wait for blocks": 2,
        "D: wait for KV": 10,
        "D: read, first step": 18,
        "D: later steps": 10,
        "D: claim": 3,
        "D: copy": 5,
        "P: read, token out": 9,
    }
    gap, *five = list(parts.values())[:6]
    assert sum(five) == pytest.approx(gap)


def test_an_answer_of_one_instance_has_no_such_parts() -> None:
    answer = _answer()
    del answer.timing["handover"]
    with pytest.raises(ChiasmError, match="not handed over"):
        handover_parts(answer, BEFORE, AFTER)


def test_the_gap_after_the_first_token_is_compared_with_the_median_of_the_others() -> None:
    first, later = StreamedAnswer(0.0, token_times=[1.0, 1.5, 1.6, 1.7, 2.7]).first_and_later_gaps()
    assert first == pytest.approx(0.5)
    assert later == pytest.approx(0.1)
    with pytest.raises(ChiasmError, match="3 events"):
        StreamedAnswer(0.0, token_times=[1.0, 1.5, 1.6]).first_and_later_gaps()
