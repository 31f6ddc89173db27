"""Whether running text streams are disturbed by the images or the long prompts of other requests.

Both topologies have two cores. Requests that neither has seen before arrive at random times, the same for both.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
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
_ROUNDS = 6
_TEXT_TOKENS = 64
_ANSWER_TOKENS = 2
_PROMPT_TOKENS = 4000
_STREAMS = 4


class _GapsUnderLoad(Measurement):
    """Gaps between the tokens of text streams in two topologies while other requests arrive."""

    labels: tuple[str, str]
    """Of the topologies; the first is the baseline."""
    load: str
    """What the other requests are, in the plural."""
    streams: int
    """Text streams that run at the same time."""
    stream_tokens: int
    seconds: float
    """Length of a round."""
    quick_seconds: float
    singles: int
    """Requests by which the time of one alone is measured, the first of which doesn't count."""
    quick_singles: int

    @abstractmethod
    async def topologies(self, bench: Bench) -> tuple[DeploymentConfig, DeploymentConfig]:
        """Return the two topologies, in the order of ``labels``."""

    @abstractmethod
    def body(self, texts: Texts, name: str) -> bytes:
        """Return the body of a request that loads the instances; ``name`` seeds it."""

    @abstractmethod
    def seconds_of_one(self, alone: tuple[float, float]) -> float:
        """Return which time of one request alone the rate of arrivals follows; ``alone`` has that of each topology."""

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(_ROUNDS, quick=2)
        seconds = self.quick_seconds if bench.quick else self.seconds
        gaps: tuple[list[list[float]], list[list[float]]] = ([], [])
        calm: tuple[list[float], list[float]] = ([], [])
        async with running(bench, *await self.topologies(bench)) as deployments:
            urls = [deployment.url for deployment in deployments]
            texts = Texts(deployments[0].folder, bench.seed)
            alone = await self._alone(bench, urls, texts)
            rate = _LOAD / self.seconds_of_one(alone)
            bench.phase(f"{rate:.2f} {self.load} a second", 2 * rounds)
            for index in range(rounds):
                times = poisson(bench.seed * 1000 + index, rate, seconds)
                times = times or [0.0]  # there may be none in a short time
                streamed = [texts.of(_TEXT_TOKENS) for _ in range(self.streams)]
                name = f"{self.name} {bench.seed} {index}"
                bodies = [self.body(texts, f"{name} {number}") for number in range(len(times))]
                for which in turns(index, 2):
                    url = urls[which]
                    gaps_of = partial(gaps_meanwhile, bench, url, streamed, max_tokens=self.stream_tokens)
                    calm[which].extend(await gaps_of(partial(asyncio.sleep, seconds / 8)))
                    gaps[which].append(await gaps_of(partial(open_loop, times, partial(_send, bench, url, bodies))))
                    bench.advance()
        outcome = self._outcome(gaps, calm, bench.seed)
        outcome.notes.append(
            f"With nothing else to do, one of the {self.load} takes {self.labels[0]} {alone[0]:.3g} s and {self.labels[1]} "
            f"{alone[1]:.3g} s; {rate:.2f} a second arrived. {sum(map(len, gaps[0]))} and {sum(map(len, gaps[1]))} gaps."
        )
        return outcome

    async def _alone(self, bench: Bench, urls: list[str], texts: Texts) -> tuple[float, float]:
        """Return the seconds that one request takes each topology with nothing else to do; both are warm afterwards."""
        bench.phase(f"{self.load} alone")
        taken: tuple[list[float], list[float]] = ([], [])
        for index in range(self.quick_singles if bench.quick else self.singles):
            body = self.body(texts, f"alone {bench.seed} {index}")
            for url, seconds in zip(urls, taken, strict=True):
                seconds.append((await bench.client.post(url, body))[0])
        return median(taken[0][1:]), median(taken[1][1:])

    def _outcome(self, gaps: tuple[list[list[float]], ...], calm: tuple[list[float], ...], seed: int) -> Outcome:
        outcome = Outcome()
        ratio = quantile_ratio(gaps[0], gaps[1], _SHARE, seed=seed)
        name = f"p99 gap: {self.labels[1]} / {self.labels[0]}"
        outcome.figures.append(Figure.of(name, ratio, "x", at_most=_AT_MOST))
        milliseconds = [[1000 * gap for one in rounds for gap in one] for rounds in gaps]
        for label, values, alone in zip(self.labels, milliseconds, calm, strict=True):
            outcome.figures += [
                Figure(f"{label}: p99", quantile(values, _SHARE), "ms"),
                Figure(f"{label}: median", median(values), "ms"),
                Figure(f"{label}: median without {self.load}", 1000 * median(alone), "ms"),
            ]
        limit = _AT_MOST * quantile(milliseconds[0], _SHARE)
        series = [Series(self.labels[0], milliseconds[0]), Series(self.labels[1], milliseconds[1], limit)]
        outcome.panels.append(Panel(f"{self.name}: gaps between tokens", "ms", series, tail=True, logarithmic=True))
        return outcome


async def _send(bench: Bench, url: str, bodies: list[bytes], number: int) -> None:
    await bench.client.post(url, bodies[number])


class Isolation(_GapsUnderLoad):
    """Images, with E and PD on one core each, against an aggregated instance on both."""

    name = "isolation"
    purpose = "Gaps between the tokens of a text stream while images arrive: E+PD on one core each, aggregated on both"
    target = f"99th percentile at most {_AT_MOST} times that of aggregated"
    labels = ("aggregated", "E+PD")
    load = "images"
    streams = 1
    stream_tokens = 2000
    seconds, quick_seconds = 8.0, 1.5
    singles, quick_singles = 7, 7

    async def topologies(self, bench: Bench) -> tuple[DeploymentConfig, DeploymentConfig]:
        model = await balanced_checkpoint(bench)
        return aggregated(model, cpus=cores()), pinned(model)

    def body(self, texts: Texts, name: str) -> bytes:
        return requests.ask([photo(name, SIDE)], max_tokens=_ANSWER_TOKENS)

    def seconds_of_one(self, alone: tuple[float, float]) -> float:
        return alone[0]


class DecodeIsolation(_GapsUnderLoad):
    """Long prompts, with P and D on one core each, against a PD on both."""

    name = "decode-isolation"
    purpose = (
        f"Gaps between the tokens of {_STREAMS} text streams while prompts of {_PROMPT_TOKENS} tokens arrive: "
        "P and D on one core each, a PD on both"
    )
    target = f"99th percentile at most {_AT_MOST} times that of the PD"
    labels = ("PD", "P+D")
    load = "prompts"
    streams = _STREAMS
    stream_tokens = 6000
    seconds, quick_seconds = 20.0, 4.0
    singles, quick_singles = 5, 2

    async def topologies(self, bench: Bench) -> tuple[DeploymentConfig, DeploymentConfig]:
        model = await make_once(bench, "qwen3_vl-long-prompts", LONG_PROMPTS)
        first, second = cores()
        apart = prefill_and_decode(model, encoders=0, prefill_cpus=(first,), decode_cpus=(second,))
        return pd_alone(model, cpus=(first, second)), apart

    def body(self, texts: Texts, name: str) -> bytes:
        return requests.chat(texts.of(_PROMPT_TOKENS), max_tokens=_ANSWER_TOKENS, ignore_eos=True)

    def seconds_of_one(self, alone: tuple[float, float]) -> float:
        return max(alone)
