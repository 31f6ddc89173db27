"""What the plot shows of goodput."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.bench.goodput import Served, Trial, Verdict
from chiasm.bench.goodput_curves import panels_of
from chiasm.bench.measurement import Outcome
from chiasm.bench.plot import write_plot
from tests.bench.trials import trials_of

_PNG = b"\x89PNG"


def _trial(rate: float, ttft: float | None, tpot: float | None) -> Trial:
    """Ten requests, of which the ninth fastest has these times."""
    served = [Served("x", Verdict.GOOD, 0.01, 0.001)] * 8
    return Trial(rate, 0, [*served, Served("x", Verdict.LATE, ttft, tpot), Served("x", Verdict.LATE)])


def test_the_first_token_and_the_time_per_token_are_shown_over_the_rate() -> None:
    found = trials_of(one=[_trial(1.0, 0.2, 0.001), _trial(4.0, 0.5, 0.001)], none=[])
    shares, firsts, later = panels_of("text", found)
    assert (shares.target, firsts.target, later.target) == (0.9, None, None)
    assert [curve.label for curve in firsts.curves] == ["one", "none"]
    assert firsts.curves[0].points == [(1.0, 200.0), (4.0, 500.0)]
    assert firsts.curves[0].line == [(1.0, 200.0), (pytest.approx(4.0), 500.0)]
    assert later.curves[0].points == [(1.0, 1.0), (4.0, 1.0)]
    assert firsts.curves[1].points == []


def test_trials_of_almost_the_same_rate_are_one_point_of_the_line() -> None:
    found = trials_of(one=[_trial(1.0, 0.2, None), _trial(1.1, 0.4, None), _trial(4.0, 0.5, None)])
    _, firsts, _ = panels_of("text", found)
    assert [value for _, value in firsts.curves[0].line] == [300.0, 500.0]


def test_a_time_to_first_token_that_too_few_reached_is_not_shown() -> None:
    _, firsts, _ = panels_of("text", trials_of(one=[_trial(1.0, None, None)]))
    assert firsts.curves[0].points == []


@pytest.mark.parametrize("ttft", [0.2, None])
def test_curves_are_drawn_also_where_there_are_none(tmp_path: Path, ttft: float | None) -> None:
    panels = panels_of("text", trials_of(one=[_trial(1.0, ttft, None)], none=[]))
    write_plot(tmp_path / "plot.png", {"goodput": Outcome(panels=[*panels])}, "a title")
    assert (tmp_path / "plot.png").read_bytes().startswith(_PNG)
