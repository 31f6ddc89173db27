"""How much CPU time instances and the proxy take when there are no requests."""

from __future__ import annotations

import asyncio
import time

from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import ask, photo
from chiasm.bench.statistics import mean_of
from chiasm.bench.topology import NIXL, NO_NIXL, cpu_seconds, kv_connectors, prefill_and_decode, running
from chiasm.launch import Deployment

_AT_MOST_PERCENT = 2.0
_WINDOW_SECONDS = 2.0
_QUICK_WINDOW_SECONDS = 0.5
_SETTLING_SECONDS = 1.0
"""Time for what an instance still does after a request."""


class Idle(Measurement):
    """One request with an image goes through E, P and D, so that all connections exist; then nothing is sent."""

    name = "idle"
    purpose = "CPU time that E, P, D and the proxy take without requests"
    target = f"each process under {_AT_MOST_PERCENT:g} % of a core"

    async def run(self, bench: Bench) -> Outcome:
        windows = bench.samples(6, quick=2)
        seconds = _QUICK_WINDOW_SECONDS if bench.quick else _WINDOW_SECONDS
        outcome = Outcome()
        for connector in kv_connectors():
            async with running(bench, prefill_and_decode(bench.model, kv_connector=connector)) as (deployment,):
                body = ask([photo(f"idle {bench.seed}")], max_tokens=8, stream=True, ignore_eos=True)
                await bench.client.chat(deployment.url, body)
                await asyncio.sleep(_SETTLING_SECONDS)
                bench.phase(f"{connector}, no requests", windows)
                used = await _percentages(bench, deployment, windows, seconds)
            series: list[Series] = []
            for name, percentages in used.items():
                label = name.removesuffix("-0")
                mean = mean_of(percentages, seed=bench.seed)
                outcome.figures.append(Figure.of(f"{connector}: {label}", mean, "%", at_most=_AT_MOST_PERCENT))
                series.append(Series(label, percentages, _AT_MOST_PERCENT))
            outcome.panels.append(Panel(f"idle: share of a core, {connector}", "%", series))
        if NIXL not in kv_connectors():
            outcome.notes.append(NO_NIXL)
        outcome.notes.append(f"Means of {windows} consecutive windows of {seconds:g} s.")
        return outcome


async def _percentages(bench: Bench, deployment: Deployment, windows: int, seconds: float) -> dict[str, list[float]]:
    """Return the percentage of a core that each process used in each window."""
    found: dict[str, list[float]] = {name: [] for name in cpu_seconds(deployment)}
    before, since = cpu_seconds(deployment), time.perf_counter()
    for _ in range(windows):
        await asyncio.sleep(seconds)
        after, now = cpu_seconds(deployment), time.perf_counter()
        for name, values in found.items():
            values.append(100 * (after[name] - before[name]) / (now - since))
        before, since = after, now
        bench.advance()
    return found
