"""Whether a running text stream feels that others' images are encoded."""

from __future__ import annotations

import asyncio
from functools import partial

from chiasm.bench import prompts
from chiasm.bench.alone import QUESTION, SIDE, balanced_checkpoint
from chiasm.bench.arrivals import open_loop, poisson
from chiasm.bench.images import photo
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, quantile, quantile_ratio
from chiasm.bench.streams import gaps_meanwhile
from chiasm.bench.topology import aggregated, cores, pinned, running

_AT_MOST = 0.5
_SHARE = 0.99
_LOAD = 0.5
"""Images arrive so that an aggregated instance is busy with them for this share of the time."""
_SECONDS = 8.0
_QUICK_SECONDS = 1.5
_SINGLES = 7
_TEXT_TOKENS = 64
_STREAM_TOKENS = 2000
_ANSWER_TOKENS = 2


class Isolation(Measurement):
    """Both topologies have two cores. Images never seen before arrive at random times, the same for both."""

    name = "isolation"
    purpose = (
        "Gaps between the tokens of a text stream while images keep coming: E+PD on one core each, aggregated on both"
    )
    target = f"99th percentile at most {_AT_MOST} times aggregated's"

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(6, quick=2)
        seconds = _QUICK_SECONDS if bench.quick else _SECONDS
        model = await balanced_checkpoint(bench)
        async with running(bench, aggregated(model, cpus=cores()), pinned(model)) as deployments:
            urls = [deployment.url for deployment in deployments]
            texts = prompts.Texts(deployments[0].folder, bench.seed)
            rate = _LOAD / await _seconds_of_an_image(bench, urls)
            bench.step(f"{rate:.1f} images a second")
            bench.total(2 * rounds)
            gaps: list[list[list[float]]] = [[], []]
            calm: list[list[float]] = [[], []]
            for index in range(rounds):
                times = poisson(bench.seed * 1000 + index, rate, seconds) or [
                    0.0
                ]  # chance may send none in a short time
                text = texts.of(_TEXT_TOKENS)
                names = [f"isolation {bench.seed} {index} {number}" for number in range(len(times))]
                bodies = [prompts.ask([photo(name, SIDE)], QUESTION, max_tokens=_ANSWER_TOKENS) for name in names]
                for which in (0, 1) if index % 2 else (1, 0):
                    url = urls[which]

                    async def send(number: int, url: str = url, bodies: list[bytes] = bodies) -> None:
                        await bench.client.post(url, bodies[number])

                    gaps_of = partial(gaps_meanwhile, bench, url, [text], max_tokens=_STREAM_TOKENS)
                    calm[which] += await gaps_of(partial(asyncio.sleep, seconds / 8))
                    gaps[which].append(await gaps_of(partial(open_loop, times, send)))
                    bench.advance()
        return _outcome(gaps, calm, rate, bench.seed)


async def _seconds_of_an_image(bench: Bench, urls: list[str]) -> float:
    """What an image takes the aggregated instance alone; both topologies are warm afterwards."""
    bench.step("images alone")
    taken = []
    for index in range(_SINGLES):
        body = prompts.ask([photo(f"alone {bench.seed} {index}", SIDE)], QUESTION, max_tokens=_ANSWER_TOKENS)
        for url in urls:
            seconds, _, _ = await bench.client.post(url, body)
            if url == urls[0]:
                taken.append(seconds)
    return median(taken)


def _outcome(gaps: list[list[list[float]]], calm: list[list[float]], rate: float, seed: int) -> Outcome:
    outcome = Outcome()
    ratio = quantile_ratio(gaps[0], gaps[1], _SHARE, seed=seed)
    outcome.figures.append(Figure.of("p99 gap: E+PD / aggregated", ratio, "x", at_most=_AT_MOST))
    all_gaps = [[1000 * gap for one in rounds for gap in one] for rounds in gaps]
    for label, values, alone in zip(("aggregated", "E+PD"), all_gaps, calm, strict=True):
        outcome.figures += [
            Figure(f"{label}: p99", quantile(values, _SHARE), "ms"),
            Figure(f"{label}: median", median(values), "ms"),
            Figure(f"{label}: median without images", 1000 * median(alone), "ms"),
        ]
    limit = _AT_MOST * quantile(all_gaps[0], _SHARE)
    series = [Series("aggregated", all_gaps[0]), Series("E+PD", all_gaps[1], limit)]
    outcome.panels.append(Panel("isolation: gaps between tokens", "ms", series, tail=True, logarithmic=True))
    outcome.notes.append(
        f"{rate:.1f} images a second, half of what keeps the aggregated instance busy; "
        f"{len(all_gaps[0])} and {len(all_gaps[1])} gaps."
    )
    return outcome
