"""Whether running text streams are disturbed by the images or the long prompts of other requests.

Requests that no topology has seen before arrive at random times, the same for all topologies.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from chiasm.bench import requests
from chiasm.bench.checkpoints import LONG_PROMPTS, SIDE, balanced_checkpoint, make_once
from chiasm.bench.load import gaps_meanwhile, open_loop, poisson, turns
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import Texts, photo
from chiasm.bench.statistics import median, quantile, quantile_ratio
from chiasm.bench.topology import aggregated, colocated, cores, pd_alone, pinned, prefill_and_decode, running
from chiasm.cores import usable_cores
from chiasm.launch import DeploymentConfig

_AT_MOST = 0.5
_SHARE = 0.99
_LOAD = 0.5
"""Requests arrive so often that they keep an instance busy for this share of the time."""
_SINGLES = 6
_TEXT_TOKENS = 64
_ANSWER_TOKENS = 2
_PROMPT_TOKENS = 4000

Gaps = list[list[float]]
"""Seconds between tokens, by round."""
Topologies = dict[str, DeploymentConfig]
"""By what they are called. The first is the baseline, the second has the target, others are reported beside them."""


@dataclass(frozen=True, kw_only=True)
class Isolation(Measurement):
    """Gaps between the tokens of text streams in several topologies while other requests arrive."""

    name: str
    purpose: str
    target: str
    topologies: Callable[[Bench], Awaitable[Topologies]]
    load: str
    """What the other requests send, in the plural."""
    body: Callable[[Texts, str], bytes]
    """Makes the body of one of the other requests, seeded by a name."""
    pace: Callable[[Sequence[float]], float]
    """Chooses the time of one request alone that decides the rate of arrivals, from those of the topologies."""
    seconds: float
    """Length of a round."""
    streams: int = 1
    """Number of text streams that run at the same time."""
    stream_tokens: int

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(6, quick=2)
        seconds = self.seconds / 5 if bench.quick else self.seconds
        topologies = await self.topologies(bench)
        labels = list(topologies)
        gaps: dict[str, Gaps] = {label: [] for label in labels}
        calm: dict[str, Gaps] = {label: [] for label in labels}
        async with running(bench, *topologies.values()) as deployments:
            urls = [deployment.url for deployment in deployments]
            texts = Texts(deployments[0].folder, bench.seed)
            alone = await self._seconds_alone(bench, urls, texts)
            rate = _LOAD / self.pace(alone)
            bench.phase(f"{rate:.2f} {self.load} per second", len(labels) * rounds)
            for index in range(rounds):
                times = poisson(bench.seed * 1000 + index, rate, seconds)
                times = times or [0.0]  # there may be none in a short time
                streamed = [texts.of(_TEXT_TOKENS) for _ in range(self.streams)]
                name = f"{self.name} {bench.seed} {index}"
                bodies = [self.body(texts, f"{name} {number}") for number in range(len(times))]
                for which in turns(index, len(labels)):
                    gaps_of = partial(gaps_meanwhile, bench, urls[which], streamed, max_tokens=self.stream_tokens)
                    send = partial(_send, bench, urls[which], bodies)
                    calm[labels[which]].append(await gaps_of(partial(asyncio.sleep, seconds / 8)))
                    gaps[labels[which]].append(await gaps_of(partial(open_loop, times, send)))
                    bench.advance()
        outcome = judge(self.name, self.load, gaps, calm, seed=bench.seed)
        outcome.notes.append(f"{rate:.2f} {self.load} per second arrived.")
        outcome.notes += [
            f"{label}: one of the {self.load} alone takes {seconds:.3g} s; {sum(map(len, gaps[label]))} gaps."
            for label, seconds in zip(labels, alone, strict=True)
        ]
        return outcome

    async def _seconds_alone(self, bench: Bench, urls: Sequence[str], texts: Texts) -> list[float]:
        """Return the seconds that one request takes each topology with nothing else to do; both are warm afterwards."""
        bench.phase(f"{self.load} alone")
        taken: Gaps = [[] for _ in urls]
        for index in range(1 + (1 if bench.quick else _SINGLES)):
            body = self.body(texts, f"alone {bench.seed} {index}")
            for url, seconds in zip(urls, taken, strict=True):
                seconds.append((await bench.client.post(url, body))[0])
        return [median(seconds[1:]) for seconds in taken]


def judge(name: str, load: str, gaps: Mapping[str, Gaps], calm: Mapping[str, Gaps], *, seed: int) -> Outcome:
    """Return the outcome for gaps by topology while ``load`` arrives, and without it (``calm``)."""
    baseline, judged, *_ = gaps
    outcome = Outcome()
    for label in list(gaps)[1:]:
        ratio = quantile_ratio(gaps[baseline], gaps[label], _SHARE, seed=seed)
        at_most = _AT_MOST if label == judged else None
        outcome.figures.append(Figure.of(f"p99 gap: {label} / {baseline}", ratio, "x", at_most=at_most))
    series: list[Series] = []
    for label, rounds in gaps.items():
        values = _milliseconds(rounds)
        outcome.figures += [
            Figure(f"{label}: p99", quantile(values, _SHARE), "ms"),
            Figure(f"{label}: median", median(values), "ms"),
            Figure(f"{label}: median without {load}", median(_milliseconds(calm[label])), "ms"),
        ]
        limit = _AT_MOST * quantile(series[0].values, _SHARE) if label == judged else None
        series.append(Series(label, values, limit))
    outcome.panels.append(Panel(f"{name}: gaps between tokens", "ms", series, tail=True, logarithmic=True))
    return outcome


def _milliseconds(rounds: Gaps) -> list[float]:
    return [1000 * gap for one in rounds for gap in one]


async def _send(bench: Bench, url: str, bodies: Sequence[bytes], number: int) -> None:
    await bench.client.post(url, bodies[number])


async def _with_images(bench: Bench) -> Topologies:
    model = await balanced_checkpoint(bench)
    whole = aggregated(model, threads=usable_cores())
    return {"aggregated": whole, "colocated": colocated(model), "E+PD": pinned(model)}


async def _with_long_prompts(bench: Bench) -> Topologies:
    model = await make_once(bench, "qwen3_vl-long-prompts", LONG_PROMPTS)
    first, second = cores()
    apart = prefill_and_decode(model, encoders=0, prefill_cpus=(first,), decode_cpus=(second,))
    return {"PD": pd_alone(model, cpus=(first, second)), "P+D": apart}


ISOLATION = Isolation(
    name="isolation",
    purpose="Gaps between the tokens of a text stream while images arrive: colocated against aggregated, both with all cores",
    target=f"99th percentile at most {_AT_MOST} times that of aggregated",
    topologies=_with_images,
    load="images",
    body=lambda texts, name: requests.ask([photo(name, SIDE)], max_tokens=_ANSWER_TOKENS),
    pace=operator.itemgetter(0),
    seconds=8.0,
    stream_tokens=2000,
)
DECODE_ISOLATION = Isolation(
    name="decode-isolation",
    purpose=(
        f"Gaps between the tokens of four text streams while prompts of {_PROMPT_TOKENS} tokens arrive: "
        "P and D on one core each, a PD on both"
    ),
    target=f"99th percentile at most {_AT_MOST} times that of the PD",
    topologies=_with_long_prompts,
    load="prompts",
    body=lambda texts, name: requests.chat(texts.of(_PROMPT_TOKENS), max_tokens=_ANSWER_TOKENS, ignore_eos=True),
    pace=max,
    seconds=20.0,
    streams=4,
    stream_tokens=6000,
)
