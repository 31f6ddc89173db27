"""How many requests per second each deployment answers in time, all of them on the same cores or GPUs."""

from __future__ import annotations

from chiasm.bench.comparison import Comparison
from chiasm.bench.measurement import Bench, Measurement, Outcome
from chiasm.bench.trace import Trace
from chiasm.bench.traffic import MIXES
from chiasm.errors import ConfigurationError
from chiasm.launch.config import EngineKind

_QUICK_MIXES = ("mixed", "heavy")


class GoodputMeasurement(Measurement):
    """All mixes, on all arms."""

    name = "goodput"
    purpose = "Requests per second of which 90 % get their first token and all others in time, at equal cores or GPUs"
    target = "colocated at least 1.0 times the best other deployment on every mix"
    only_by_name = True

    def __init__(self, engine: EngineKind) -> None:
        self._engine = engine

    async def run(self, bench: Bench) -> Outcome:
        chosen = bench.goodput.mixes or (_QUICK_MIXES if bench.quick else tuple(MIXES))
        if unknown := [name for name in chosen if name not in MIXES]:
            raise ConfigurationError(f"There is no mix {unknown[0]!r}; the mixes are {', '.join(MIXES)}.")
        return await Comparison(bench, self._engine).run([mix for name, mix in MIXES.items() if name in chosen])


class TraceMeasurement(Measurement):
    """A person's own arrivals and sizes, on all arms."""

    name = "trace"
    purpose = "Requests per second of a trace of which 90 % get their first token and all others in time"
    target = GoodputMeasurement.target.replace("every mix", "the trace")

    def __init__(self, engine: EngineKind, trace: Trace) -> None:
        self._engine = engine
        self._trace = trace

    async def run(self, bench: Bench) -> Outcome:
        own_rate = f"The trace has {self._trace.rate:.3g} requests per second itself."
        return await Comparison(bench, self._engine, [own_rate]).run([self._trace])
