"""What the measurement of arrivals concludes from the gaps between tokens."""

from __future__ import annotations

import pytest

from chiasm.bench.arrivals import Rounds
from chiasm.bench.measurements.arrivals import judge


@pytest.mark.parametrize(("gap", "is_met"), [(0.011, True), (0.012, False)])
def test_the_gaps_with_arrivals_are_compared_with_those_without(gap: float, is_met: bool) -> None:
    rounds = Rounds(calm=[[0.01] * 50] * 2, arriving=[[gap] * 50] * 2, arrivals=[10, 12])
    outcome = judge({"TcpConnector": rounds}, seed=0)
    figures = {figure.name: figure for figure in outcome.figures}
    ratio = figures["TcpConnector: p99 gap, with / without"]
    assert ratio.value == pytest.approx(100 * gap)
    assert (ratio.at_most, outcome.met) == (1.15, is_met)
    assert figures["TcpConnector, with arrivals: p99"].value == pytest.approx(1000 * gap)
    assert figures["TcpConnector: embeddings that arrive each second"].value == pytest.approx(22 / (100 * gap))
