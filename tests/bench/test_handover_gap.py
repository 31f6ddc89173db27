"""The gap between tokens one and two, taken apart."""

from __future__ import annotations

from dataclasses import fields

import pytest

from chiasm.bench.client import Answer
from chiasm.bench.handover_gap import HandoverParts, first_and_later_gaps
from chiasm.errors import ChiasmError

_BEFORE = {"chiasm_kv_claim_seconds_total": 1.0, "chiasm_kv_transfer_seconds_total": 2.0}
_AFTER = {"chiasm_kv_claim_seconds_total": 1.003, "chiasm_kv_transfer_seconds_total": 2.005}


def _answer() -> Answer:
    at_p = {"queue": 0.001, "wait": 0.0, "transfer": 0.0, "prefill": 0.9, "ttft": 0.91, "proxy": 0.0001}
    at_d = {"queue": 0.002, "kv": 0.010, "prefill": 0.0, "ttft": 0.030, "handover": 0.034}
    return Answer(0.0, token_times=[1.0, 1.04, 1.05, 1.06], timing_at_start=at_p, timing=at_p | at_d)


def test_the_parts_of_the_gap_add_up_to_it() -> None:
    parts = HandoverParts.of(_answer(), _BEFORE, _AFTER)
    assert parts.gap == pytest.approx(0.04)
    assert parts.handle + parts.call + parts.queue + parts.load + parts.step == pytest.approx(parts.gap)
    assert {one.name: round(1000 * getattr(parts, one.name), 3) for one in fields(parts)} == {
        "gap": 40,
        "handle": 6,
        "call": 4,
        "queue": 2,
        "load": 10,
        "step": 18,
        "later": 10,
        "claim": 3,
        "copy": 5,
        "first_token": 9,
    }


def test_an_answer_of_one_instance_has_no_such_parts() -> None:
    answer = _answer()
    del answer.timing["handover"]
    with pytest.raises(ChiasmError, match="not handed over"):
        HandoverParts.of(answer, _BEFORE, _AFTER)


def test_the_gap_after_the_first_token_stands_apart_from_the_others() -> None:
    answer = Answer(0.0, token_times=[1.0, 1.5, 1.6, 1.7, 2.7])
    assert first_and_later_gaps(answer) == (pytest.approx(0.5), pytest.approx(0.1))
    with pytest.raises(ChiasmError, match="3 events"):
        first_and_later_gaps(Answer(0.0, token_times=[1.0, 1.5, 1.6]))
