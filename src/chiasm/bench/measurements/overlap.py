"""Whether PD prefills the images that are there while the encoder works on those that are not."""

from __future__ import annotations

from chiasm.bench import prompts
from chiasm.bench.alone import QUESTION, SIDE, balanced_checkpoint, identifier_of, measure_alone
from chiasm.bench.images import photo
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import pinned, running

_AT_MOST = 1.15
_NUMBERS = (4, 8)
_WARM_UP = 1


class Overlap(Measurement):
    """Each round measures one image alone, then requests with several, so that all see the same machine."""

    name = "overlap"
    purpose = "Time to first token of 4 and 8 images in one request, against a perfect pipeline of encode and prefill"
    target = f"at most {_AT_MOST} times e + p + (n-1) max(e, p)"

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(12, quick=2)
        model = await balanced_checkpoint(bench)
        encodes: list[float] = []
        prefills: list[float] = []
        found: dict[int, list[float]] = {number: [] for number in _NUMBERS}
        async with running(bench, pinned(model)) as (deployment,):
            bench.step("images in one request")
            bench.total(rounds + _WARM_UP)
            for index in range(-_WARM_UP, rounds):
                name = f"overlap {bench.seed} {index}"
                alone = await measure_alone(bench, deployment, photo(name, SIDE), identifier_of(name))
                for number in _NUMBERS:
                    images = [photo(f"{name} {number} {place}", SIDE) for place in range(number)]
                    body = prompts.ask(images, QUESTION, max_tokens=1, stream=True)
                    answer = await bench.client.chat(deployment.url, body)
                    if index >= 0:
                        found[number].append(answer.ttft_seconds)
                if index >= 0:
                    encodes.append(alone.encode_seconds)
                    prefills.append(alone.prefill_seconds)
                bench.advance()
        return _outcome(encodes, prefills, found, bench.seed)


def _outcome(encodes: list[float], prefills: list[float], found: dict[int, list[float]], seed: int) -> Outcome:
    encode, prefill = median(encodes), median(prefills)
    outcome = Outcome()
    outcome.figures += [
        Figure("one image alone: encode e", 1000 * encode, "ms"),
        Figure("one image alone: prefill p", 1000 * prefill, "ms"),
    ]
    series = [
        Series("encode e", [1000 * value for value in encodes]),
        Series("prefill p", [1000 * value for value in prefills]),
    ]
    for number, values in found.items():
        # Each round's requests against what one image took in the same round.
        bounds = [e + p + (number - 1) * max(e, p) for e, p in zip(encodes, prefills, strict=True)]
        serial = [number * (e + p) for e, p in zip(encodes, prefills, strict=True)]
        outcome.figures += [
            Figure.of(
                f"{number} images: TTFT / pipelined bound",
                paired_ratio(bounds, values, seed=seed),
                "x",
                at_most=_AT_MOST,
            ),
            Figure.of(f"{number} images: TTFT / one after the other", paired_ratio(serial, values, seed=seed), "x"),
            Figure(f"{number} images: TTFT, median", 1000 * median(values), "ms"),
        ]
        series.append(Series(f"{number} images", [1000 * value for value in values], 1000 * _AT_MOST * median(bounds)))
    outcome.panels.append(Panel("overlap: time to first token", "ms", series))
    return outcome
