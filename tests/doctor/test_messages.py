"""Counters of both engines, and pages without any."""

from __future__ import annotations

import pytest

from chiasm.doctor.messages import Counters, counters_of

CHIASM = """# HELP chiasm_images_encoded_total Images encoded by this instance.
# TYPE chiasm_images_encoded_total counter
chiasm_images_encoded_total 3.0
chiasm_ec_loads_total 4.0
"""
VLLM = """vllm:chiasm_ec_misses_total{engine="0",model_name="a } b"} 1.0
vllm:chiasm_ec_misses_total{engine="1",model_name="m"} 2.0
vllm:chiasm_ec_loads_total{engine="0",model_name="m"} 5.0 1700000000
vllm:nixl_xfer_time_seconds_count{engine="0"} 7.0
"""


def test_counters_of_the_built_in_engine() -> None:
    assert counters_of(CHIASM) == Counters(3.0, 4.0, None)


def test_counters_of_vllm_are_summed_over_its_engines() -> None:
    assert counters_of(VLLM) == Counters(3.0, 5.0, 7.0)


def test_vllm_without_the_connector_counts_no_embeddings() -> None:
    assert counters_of('vllm:num_requests_running{engine="0"} 1.0\n') == Counters()


@pytest.mark.parametrize(
    "page",
    ["", "<html>", "chiasm_ec_loads_total", "chiasm_ec_loads_total many", "chiasm_ec_loads_total NaN", "\x00" * 100],
)
def test_a_page_without_samples_has_no_counters(page: str) -> None:
    assert counters_of(page) == Counters()


def test_counters_are_subtracted() -> None:
    assert Counters(3, 4, None).since(Counters(1, 4, None)) == Counters(2, 0, None)


def test_sums_leave_out_what_one_does_not_count() -> None:
    assert Counters.of_all([Counters(1, 2, None), Counters(3, 4, 5)]) == Counters(4, 6, None)
