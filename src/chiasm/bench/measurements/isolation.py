"""Whether running text streams are disturbed by the images or the long prompts of other requests.

Both topologies have two cores. Requests that neither has seen before arrive at random times, the same for both.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from chiasm.bench import requests
from chiasm.bench.checkpoints import LONG_PROMPTS, SIDE, balanced_checkpoint, make_once
from chiasm.bench.load import gaps_meanwhile, open_loop, poisson, turns
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import Texts, photo
from chiasm.bench.statistics import median, quantile, quantile_ratio
from chiasm.bench.topology import aggregated, cores, pd_alone, pinned, prefill_and_decode, running
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


@dataclass(frozen=True, kw_only=True)
class Isolation(Measurement):
    """Gaps between the tokens of text streams in two topologies while other requests arrive."""

    name: str
    purpose: str
    target: str
    labels: tuple[str, str]
    """Names of the topologies; the first is the baseline."""
    topologies: Callable[[Bench], Awaitable[tuple[DeploymentConfig, DeploymentConfig]]]
    load: str
    """What the other requests send, in the plural."""
    body: Callable[[Texts, str], bytes]
    """Makes the body of one of the other requests, seeded by a name."""
    pace: Callable[[Sequence[float]], float]
    """Chooses the time of one request alone that decides the rate of arrivals, from those of the two topologies."""
    seconds: float
    """Length of a round."""
    streams: int = 1
    """Number of text streams that run at the same time."""
    stream_tokens: int

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(6, quick=2)
        seconds = self.seconds / 5 if bench.quick else self.seconds
        gaps: tuple[Gaps, Gaps] = ([], [])
        calm: tuple[Gaps, Gaps] = ([], [])
        async with running(bench, *await self.topologies(bench)) as deployments:
            urls = [deployment.url for deployment in deployments]
            texts = Texts(deployments[0].folder, bench.seed)
            alone = await self._seconds_alone(bench, urls, texts)
            rate = _LOAD / self.pace(alone)
            bench.phase(f"{rate:.2f} {self.load} per second", 2 * rounds)
            for index in range(rounds):
                times = poisson(bench.seed * 1000 + index, rate, seconds)
                times = times or [0.0]  # there may be none in a short time
                streamed = [texts.of(_TEXT_TOKENS) for _ in range(self.streams)]
                name = f"{self.name} {bench.seed} {index}"
                bodies = [self.body(texts, f"{name} {number}") for number in range(len(times))]
                for which in turns(index, 2):
                    gaps_of = partial(gaps_meanwhile, bench, urls[which], streamed, max_tokens=self.stream_tokens)
                    send = partial(_send, bench, urls[which], bodies)
                    calm[which].append(await gaps_of(partial(asyncio.sleep, seconds / 8)))
                    gaps[which].append(await gaps_of(partial(open_loop, times, send)))
                    bench.advance()
        outcome = self._outcome(gaps, calm, bench.seed)
        outcome.notes.append(
            f"One of the {self.load} alone takes {self.labels[0]} {alone[0]:.3g} s and {self.labels[1]} {alone[1]:.3g} s; "
            f"{rate:.2f} per second arrived. {sum(map(len, gaps[0]))} and {sum(map(len, gaps[1]))} gaps."
        )
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

    def _outcome(self, gaps: tuple[Gaps, Gaps], calm: tuple[Gaps, Gaps], seed: int) -> Outcome:
        baseline, other = self.labels
        ratio = quantile_ratio(*gaps, _SHARE, seed=seed)
        outcome = Outcome([Figure.of(f"p99 gap: {other} / {baseline}", ratio, "x", at_most=_AT_MOST)])
        loaded, unloaded = ([[1000 * gap for one in rounds for gap in one] for rounds in both] for both in (gaps, calm))
        for label, values, without in zip(self.labels, loaded, unloaded, strict=True):
            outcome.figures += [
                Figure(f"{label}: p99", quantile(values, _SHARE), "ms"),
                Figure(f"{label}: median", median(values), "ms"),
                Figure(f"{label}: median without {self.load}", median(without), "ms"),
            ]
        limit = _AT_MOST * quantile(loaded[0], _SHARE)
        series = [Series(baseline, loaded[0]), Series(other, loaded[1], limit)]
        outcome.panels.append(Panel(f"{self.name}: gaps between tokens", "ms", series, tail=True, logarithmic=True))
        return outcome


async def _send(bench: Bench, url: str, bodies: Sequence[bytes], number: int) -> None:
    await bench.client.post(url, bodies[number])


async def _without_encoder(bench: Bench) -> tuple[DeploymentConfig, DeploymentConfig]:
    model = await balanced_checkpoint(bench)
    return aggregated(model, cpus=cores()), pinned(model)


async def _without_prefill(bench: Bench) -> tuple[DeploymentConfig, DeploymentConfig]:
    model = await make_once(bench, "qwen3_vl-long-prompts", LONG_PROMPTS)
    first, second = cores()
    apart = prefill_and_decode(model, encoders=0, prefill_cpus=(first,), decode_cpus=(second,))
    return pd_alone(model, cpus=(first, second)), apart


ISOLATION = Isolation(
    name="isolation",
    purpose="Gaps between the tokens of a text stream while images arrive: E+PD on one core each, aggregated on both",
    target=f"99th percentile at most {_AT_MOST} times that of aggregated",
    labels=("aggregated", "E+PD"),
    topologies=_without_encoder,
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
    labels=("PD", "P+D"),
    topologies=_without_prefill,
    load="prompts",
    body=lambda texts, name: requests.chat(texts.of(_PROMPT_TOKENS), max_tokens=_ANSWER_TOKENS, ignore_eos=True),
    pace=max,
    seconds=20.0,
    streams=4,
    stream_tokens=6000,
)
