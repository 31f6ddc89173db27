"""Whether a PD prefills images whose embeddings are there while the encoder works on the others."""

from __future__ import annotations

from chiasm.bench.checkpoints import SIDE, Alone, balanced_checkpoint, measure_alone
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import ask, photo
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import pinned, running

_AT_MOST = 1.15
_NUMBERS = (4, 8)
_WARM_UP = 1


class Overlap(Measurement):
    """Each round measures one image alone and then requests with several, so that both see the same machine."""

    name = "overlap"
    purpose = "Time to first token of 4 and 8 images in one request, against a perfect pipeline of encode and prefill"
    target = f"at most {_AT_MOST} times e + p + (n-1) max(e, p)"

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(12, quick=2)
        model = await balanced_checkpoint(bench)
        alone: list[Alone] = []
        found: dict[int, list[float]] = {number: [] for number in _NUMBERS}
        async with running(bench, pinned(model)) as (deployment,):
            bench.phase("images in one request", rounds + _WARM_UP)
            for index in range(-_WARM_UP, rounds):
                name = f"overlap {bench.seed} {index}"
                one = await measure_alone(bench, deployment, name)
                if index >= 0:
                    alone.append(one)
                for number in _NUMBERS:
                    images = [photo(f"{name} {number} {place}", SIDE) for place in range(number)]
                    answer = await bench.client.chat(deployment.url, ask(images, max_tokens=1, stream=True))
                    if index >= 0:
                        found[number].append(answer.ttft_seconds)
                bench.advance()
        return _outcome(alone, found, bench.seed)


def _outcome(alone: list[Alone], found: dict[int, list[float]], seed: int) -> Outcome:
    encodes, prefills = [one.encode_seconds for one in alone], [one.prefill_seconds for one in alone]
    outcome = Outcome()
    series: list[Series] = []
    for label, seconds in (("encode e", encodes), ("prefill p", prefills)):
        outcome.figures.append(Figure(f"one image alone: {label}", 1000 * median(seconds), "ms"))
        series.append(Series(label, [1000 * value for value in seconds]))
    for number, ttfts in found.items():
        # The requests of a round are compared with what one image took in the same round.
        bounds = [one.pipelined(number) for one in alone]
        serial = [number * (e + p) for e, p in zip(encodes, prefills, strict=True)]
        name = f"{number} images: TTFT"
        ratio = paired_ratio(bounds, ttfts, seed=seed)
        outcome.figures += [
            Figure.of(f"{name} / pipelined bound", ratio, "x", at_most=_AT_MOST),
            Figure.of(f"{name} / one image after the other", paired_ratio(serial, ttfts, seed=seed), "x"),
            Figure(f"{name}, median", 1000 * median(ttfts), "ms"),
        ]
        series.append(Series(f"{number} images", [1000 * value for value in ttfts], 1000 * _AT_MOST * median(bounds)))
    outcome.panels.append(Panel("overlap: time to first token", "ms", series))
    return outcome
