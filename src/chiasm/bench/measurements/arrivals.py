"""Whether a text stream of a PD feels embeddings of 67 MB that arrive at it back to back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.bench.checkpoints import TEXT_LAYERS, make_once, size_of
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.statistics import median, quantile, quantile_ratio
from chiasm.bench.topology import cores

if TYPE_CHECKING:
    from chiasm.bench.arrivals import Rounds

_CONNECTORS = ("SharedMemoryConnector", "TcpConnector")
_SIZE_BYTES = 67_000_000
_TOKENS = 300
_SHARE = 0.99
_AT_MOST = 1.15


class Arrivals(Measurement):
    """:mod:`chiasm.bench.arrivals` says how it is measured."""

    name = "arrivals"
    purpose = "Gaps between the tokens of a text stream while embeddings of 67 MB arrive at its PD back to back"
    target = f"99th percentile at most {_AT_MOST} times that without arrivals"

    async def run(self, bench: Bench) -> Outcome:
        from chiasm.bench.arrivals import Plan, measure_arrivals

        folder = await make_once(bench, "qwen3_vl-arrivals", size_of(TEXT_LAYERS))
        rounds = bench.samples(5, quick=1)
        tokens = _TOKENS // 5 if bench.quick else _TOKENS
        found: dict[str, Rounds] = {}
        bench.phase("streams", len(_CONNECTORS))
        language, encoder = cores()
        for connector in _CONNECTORS:
            plan = Plan(Path(folder), connector, _SIZE_BYTES, rounds, tokens, language, encoder)
            found[connector] = await asyncio.to_thread(measure_arrivals, plan)
            bench.advance()
        return judge(found, seed=bench.seed)


def judge(found: Mapping[str, Rounds], *, seed: int) -> Outcome:
    """Return the outcome for what was measured with each connector."""
    outcome = Outcome(parameters={"size_bytes": _SIZE_BYTES})
    for connector, rounds in found.items():
        ratio = quantile_ratio(rounds.calm, rounds.arriving, _SHARE, seed=seed)
        outcome.figures.append(Figure.of(f"{connector}: p99 gap, with / without", ratio, "x", at_most=_AT_MOST))
        series = []
        for label, gaps in (("without arrivals", rounds.calm), ("with arrivals", rounds.arriving)):
            values = [1000 * gap for one in gaps for gap in one]
            outcome.figures += [
                Figure(f"{connector}, {label}: p99", quantile(values, _SHARE), "ms"),
                Figure(f"{connector}, {label}: median", median(values), "ms"),
            ]
            series.append(Series(label, values))
        per_second = sum(rounds.arrivals) / max(1e-9, sum(gap for one in rounds.arriving for gap in one))
        outcome.figures.append(Figure(f"{connector}: embeddings that arrive each second", per_second))
        outcome.panels.append(
            Panel(f"arrivals: gaps between tokens, {connector}", "ms", series, tail=True, logarithmic=True)
        )
    outcome.notes.append("The PD's engine has one core, and the encoder's half of the connector another.")
    return outcome
