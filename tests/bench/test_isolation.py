"""What a measurement of isolation concludes from the gaps between tokens."""

from __future__ import annotations

from chiasm.bench.measurements.isolation import Gaps, judge

_CALM: dict[str, Gaps] = {"one": [[0.01]], "two": [[0.01]], "three": [[0.01]]}


def test_all_topologies_are_compared_with_the_first_and_only_the_second_has_a_target() -> None:
    gaps: dict[str, Gaps] = {"one": [[0.1], [0.1]], "two": [[0.04], [0.04]], "three": [[0.3], [0.3]]}
    outcome = judge("isolation", "images", gaps, _CALM, seed=0)
    ratios = {figure.name: figure for figure in outcome.figures if figure.unit == "x"}
    assert {name: round(figure.value, 3) for name, figure in ratios.items()} == {
        "p99 gap: two / one": 0.4,
        "p99 gap: three / one": 3.0,
    }
    assert [figure.at_most for figure in ratios.values()] == [0.5, None]
    assert outcome.met is True


def test_the_target_is_missed_if_the_second_has_longer_gaps_than_it_may() -> None:
    gaps: dict[str, Gaps] = {"one": [[0.1]], "two": [[0.06]]}
    assert judge("isolation", "images", gaps, _CALM, seed=0).met is False
