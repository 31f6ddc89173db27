"""Whether running text streams feel that others' prompts are prefilled."""

from __future__ import annotations

import asyncio
from functools import partial

from chiasm.bench import prompts
from chiasm.bench.arrivals import open_loop, poisson
from chiasm.bench.checkpoints import with_long_prompts
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, quantile, quantile_ratio
from chiasm.bench.streams import gaps_meanwhile
from chiasm.bench.topology import cores, pd_alone, prefill_and_decode, running

_AT_MOST = 0.5
_SHARE = 0.99
_LOAD = 0.5
"""Prompts arrive so that the slower of the two topologies is busy with them for this share of the time."""
_SECONDS = 20.0
_QUICK_SECONDS = 4.0
_SINGLES = 5
_QUICK_SINGLES = 2
_PROMPT_TOKENS = 4000
_TEXT_TOKENS = 64
_STREAMS = 4
_STREAM_TOKENS = 6000
_ANSWER_TOKENS = 2
_LABELS = ("PD", "P+D")


class DecodeIsolation(Measurement):
    """Both topologies have two cores. Prompts never seen before arrive at random times, the same for both."""

    name = "decode-isolation"
    purpose = (
        f"Gaps between the tokens of {_STREAMS} text streams while prompts of {_PROMPT_TOKENS} tokens keep coming: "
        "P and D on one core each, a PD on both"
    )
    target = f"99th percentile at most {_AT_MOST} times the PD's"

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(6, quick=2)
        seconds = _QUICK_SECONDS if bench.quick else _SECONDS
        model = await with_long_prompts(bench)
        first, second = cores()
        apart = prefill_and_decode(model, encoders=0, prefill_cpus=(first,), decode_cpus=(second,))
        async with running(bench, pd_alone(model, cpus=(first, second)), apart) as deployments:
            urls = [deployment.url for deployment in deployments]
            texts = prompts.Texts(deployments[0].folder, bench.seed)
            alone = await _seconds_of_a_prompt(bench, urls, texts)
            rate = _LOAD / max(alone)
            bench.step(f"{rate:.2f} prompts a second")
            bench.total(2 * rounds)
            gaps: list[list[list[float]]] = [[], []]
            calm: list[list[float]] = [[], []]
            for index in range(rounds):
                times = poisson(bench.seed * 1000 + index, rate, seconds) or [
                    0.0
                ]  # chance may send none in a short time
                running_texts = [texts.of(_TEXT_TOKENS) for _ in range(_STREAMS)]
                bodies = [_body(texts) for _ in times]
                for which in (0, 1) if index % 2 else (1, 0):
                    url = urls[which]

                    async def send(number: int, url: str = url, bodies: list[bytes] = bodies) -> None:
                        await bench.client.post(url, bodies[number])

                    gaps_of = partial(gaps_meanwhile, bench, url, running_texts, max_tokens=_STREAM_TOKENS)
                    calm[which] += await gaps_of(partial(asyncio.sleep, seconds / 8))
                    gaps[which].append(await gaps_of(partial(open_loop, times, send)))
                    bench.advance()
        outcome = _outcome(gaps, calm, bench.seed)
        outcome.notes.append(
            f"A prompt alone takes a PD {alone[0]:.2f} s and P and D {alone[1]:.2f} s; {rate:.2f} a second keep the "
            f"slower busy half of the time. {sum(map(len, gaps[0]))} and {sum(map(len, gaps[1]))} gaps."
        )
        return outcome


def _body(texts: prompts.Texts) -> bytes:
    return prompts.chat(texts.of(_PROMPT_TOKENS), max_tokens=_ANSWER_TOKENS, ignore_eos=True)


async def _seconds_of_a_prompt(bench: Bench, urls: list[str], texts: prompts.Texts) -> list[float]:
    """What a prompt takes each of the two with nothing else to do; both are warm afterwards."""
    bench.step("prompts alone")
    taken: list[list[float]] = [[] for _ in urls]
    for _ in range(_QUICK_SINGLES if bench.quick else _SINGLES):
        body = _body(texts)
        for url, seconds in zip(urls, taken, strict=True):
            seconds.append((await bench.client.post(url, body))[0])
    return [median(seconds[1:]) for seconds in taken]


def _outcome(gaps: list[list[list[float]]], calm: list[list[float]], seed: int) -> Outcome:
    outcome = Outcome()
    ratio = quantile_ratio(gaps[0], gaps[1], _SHARE, seed=seed)
    outcome.figures.append(Figure.of("p99 gap: P+D / PD", ratio, "x", at_most=_AT_MOST))
    all_gaps = [[1000 * gap for one in rounds for gap in one] for rounds in gaps]
    for label, values, alone in zip(_LABELS, all_gaps, calm, strict=True):
        outcome.figures += [
            Figure(f"{label}: p99", quantile(values, _SHARE), "ms"),
            Figure(f"{label}: median", median(values), "ms"),
            Figure(f"{label}: median without prompts", 1000 * median(alone), "ms"),
        ]
    limit = _AT_MOST * quantile(all_gaps[0], _SHARE)
    series = [Series(_LABELS[0], all_gaps[0]), Series(_LABELS[1], all_gaps[1], limit)]
    outcome.panels.append(Panel("decode-isolation: gaps between tokens", "ms", series, tail=True, logarithmic=True))
    return outcome
