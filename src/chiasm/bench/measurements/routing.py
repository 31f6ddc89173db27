"""Where images and prompts go, simulated with the proxy's own code: what is found, how long it waits, what deciding costs."""

from __future__ import annotations

import asyncio
from statistics import fmean

from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome
from chiasm.bench.routing import ENCODE_SECONDS, SLOWER, RoutingSimulation, new, popular, shared_hit_share
from chiasm.bench.several_proxies import PromptSimulation, prompts
from chiasm.bench.statistics import median, quantile
from chiasm.proxy.hedging import HEDGED_SHARE

_ENCODERS = 4
_ITEMS = 1000
_CAPACITY = _ITEMS // 10
_LOAD = 0.8
_MEAN_SECONDS = ENCODE_SECONDS * 7 / 12
"""Of the three sizes of new images."""
_MANY = 64
_SLOW_SHARE = 0.02
_HEDGING_LOAD = 0.4
_LANGUAGE_INSTANCES = 4
_PROMPT_SECONDS = 1.0


class Routing(Measurement):
    """All figures but the time to choose are of simulated time, and the same on every machine."""

    name = "routing"
    purpose = "Images at encoders with memories of their own, and prompts through several proxies (simulated)"
    target = "0.95 of the hits of one common memory, 1.2 of the wait for whoever is free first, 50 µs for 64 encoders"

    async def run(self, bench: Bench) -> Outcome:
        return await asyncio.to_thread(self._measure, bench)

    def _measure(self, bench: Bench) -> Outcome:
        outcome = Outcome(parameters={"items": _ITEMS, "encoders": _ENCODERS, "capacity": _CAPACITY, "load": _LOAD})
        count = bench.samples(30_000, quick=3000)
        bench.phase("hits", 7)
        images = popular(count, items=_ITEMS, rate=1.0, seed=bench.seed)
        common = shared_hit_share(images, _ENCODERS * _CAPACITY)
        # So much that the encoders were this busy if they found what a common memory would hold.
        rate = 0.5 * _ENCODERS / (ENCODE_SECONDS * (1 - common))
        images = popular(count, items=_ITEMS, rate=rate, seed=bench.seed)
        outcome.figures.append(Figure("one common memory: share of images found", common))
        for label, proxies, peers, at_least in (
            ("one proxy", 1, True, 0.95),
            ("three proxies", 3, True, None),
            ("one proxy, no preference", 1, False, None),
        ):
            routed = RoutingSimulation(_ENCODERS, capacity=_CAPACITY, proxies=proxies, peers=peers).run(images)
            ratio = routed.hit_share / common
            outcome.figures.append(Figure(f"{label}: found / common memory", ratio, "x", at_least=at_least))
            bench.advance()
        images = new(count, rate=_LOAD * _ENCODERS / _MEAN_SECONDS, seed=bench.seed)
        waits = [
            quantile(RoutingSimulation(_ENCODERS, capacity=_CAPACITY, peers=peers).run(images).waits, 0.99)
            for peers in (True, False)
        ]
        outcome.figures.append(Figure("new images at load 0.8: p99 wait / first free", waits[0] / waits[1], "x", 1.2))
        outcome.figures.append(Figure("new images at load 0.8: p99 wait", 1000 * waits[0], "ms"))
        bench.advance()
        images = new(count // 3, rate=_LOAD * _MANY / _MEAN_SECONDS, seed=bench.seed)
        routed = RoutingSimulation(_MANY, capacity=_CAPACITY).run(images)
        spent = 1000 * median(routed.decision_seconds)
        outcome.figures.append(Figure("64 encoders: time to choose one for an image, median", spent, "ms", 0.05))
        bench.advance()
        images = new(count, rate=_HEDGING_LOAD * _ENCODERS / _MEAN_SECONDS, seed=bench.seed)
        with_hedges, without = (
            RoutingSimulation(_ENCODERS, capacity=_CAPACITY, slow_share=_SLOW_SHARE, hedged_share=share).run(images)
            for share in (HEDGED_SHARE, 0.0)
        )
        ratio = quantile(with_hedges.seconds, 0.99) / quantile(without.seconds, 0.99)
        outcome.figures.append(Figure("hedging, some encodings slow: p99 time, with / without", ratio, "x"))
        outcome.figures.append(Figure("hedging: calls that were hedged", with_hedges.hedges / len(images)))
        bench.advance()
        _add_prompts(outcome, count // 3, bench.seed)
        bench.advance()
        outcome.notes.append(
            f"Hedging: {_SLOW_SHARE:.0%} of the encodings take {SLOWER:g} times as long, and without that the load is "
            f"{_HEDGING_LOAD:g}."
        )
        outcome.notes.append(
            f"{_ITEMS} images whose popularity is Zipf's; each of {_ENCODERS} encoders remembers {_CAPACITY} of them. "
            f"Encoding one takes {ENCODE_SECONDS:g} s."
        )
        return outcome


def _add_prompts(outcome: Outcome, count: int, seed: int) -> None:
    """Add what three proxies lose against one that knows all prompts."""
    rate = _LOAD * _LANGUAGE_INSTANCES / _PROMPT_SECONDS
    asked = prompts(count, mean_seconds=_PROMPT_SECONDS, rate=rate, seed=seed)
    one, told, blind = (
        fmean(PromptSimulation(_LANGUAGE_INSTANCES, proxies=proxies, report_seconds=seconds).run(asked))
        for proxies, seconds in ((1, None), (3, 1.0), (3, None))
    )
    outcome.figures.append(Figure("prompts, three proxies: mean TTFT / one proxy", told / one, "x", 1.1))
    outcome.figures.append(
        Figure("prompts, three proxies that learn no loads: mean TTFT / one proxy", blind / one, "x")
    )
    outcome.notes.append(
        f"Prompts: log-normal, of {_PROMPT_SECONDS:g} s on average, at load {_LOAD:g} of {_LANGUAGE_INSTANCES} language "
        "instances, which tell their load every second."
    )
