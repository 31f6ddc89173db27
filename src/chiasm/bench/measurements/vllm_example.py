"""chiasm over vLLM against what vLLM itself ships for encoders apart: ECExampleConnector and its example proxy."""

from __future__ import annotations

import random
import time
from pathlib import Path

from chiasm.bench import prompts
from chiasm.bench.arrivals import at_most
from chiasm.bench.counting import counting
from chiasm.bench.example import (
    NOT_THERE,
    Example,
    can_forward_images,
    chiasm_proxy,
    example_instances,
    example_proxy,
    pd_for_images,
    proxy_file,
)
from chiasm.bench.images import photo
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import pinned, running
from chiasm.bench.vllm import on_vllm
from chiasm.launch import Deployment
from chiasm.launch.config import EngineKind
from chiasm.wire import Role

_TTFT_AT_MOST = 0.9
_RATE_AT_LEAST = 1.1
_BYTES_AT_MOST = 0.1
_WARM_UP = 3
_AT_ONCE = 8
_TEXT_TOKENS = 64
_ANSWER_TOKENS = 16
_MIXED = 24
_QUICK_MIXED = 4
_QUESTION = "What is shown?"
_LABELS = ("vLLM's example", "chiasm")


class VllmExample(Measurement):
    """Both have an encoder and a PD of the same vLLM with the same flags but for the connector, and take turns."""

    name = "vllm-example"
    purpose = "chiasm over vLLM against vLLM's ECExampleConnector behind vLLM's example proxy"
    target = (
        f"first token of a 512 x 512 image at most {_TTFT_AT_MOST} times theirs; requests a second of texts and images at "
        f"least {_RATE_AT_LEAST} times; bytes of request bodies at PD at most {_BYTES_AT_MOST} times"
    )
    engine = EngineKind.VLLM

    async def run(self, bench: Bench) -> Outcome:
        file = proxy_file()
        if file is None:
            return Outcome(notes=[NOT_THERE])
        outcome = Outcome()
        async with (
            running(bench, on_vllm(pinned(bench.model))) as (deployment,),
            example_instances(bench, deployment) as example,
        ):
            mix = Mix(bench, deployment.folder)
            async with example_proxy(bench, file, example.encoder, example.pd) as theirs:
                urls = (theirs, deployment.url)
                await _first_token(bench, outcome, urls)
                await _rate(bench, outcome, urls, mix)
            await _bytes_at_pd(bench, outcome, deployment, example, file, mix)
        return outcome


class Mix:
    """Texts and images, half of each in a shuffled order, all of them new."""

    def __init__(self, bench: Bench, checkpoint: Path) -> None:
        self._texts = prompts.Texts(checkpoint, bench.seed)
        self._random = random.Random(f"mix {bench.seed}")
        self._size = _QUICK_MIXED if bench.quick else _MIXED
        self._seed = bench.seed
        self._drawn = 0

    def draw(self) -> list[bytes]:
        """Bodies of so many requests."""
        images = [photo(f"mix {self._seed} {self._drawn + index}") for index in range(self._size // 2)]
        self._drawn += len(images)
        fields = {"max_tokens": _ANSWER_TOKENS, "ignore_eos": True}
        bodies = [prompts.ask([image], _QUESTION, **fields) for image in images]
        bodies += [prompts.chat(self._texts.of(_TEXT_TOKENS), **fields) for _ in range(self._size - len(images))]
        self._random.shuffle(bodies)
        return bodies


async def _first_token(bench: Bench, outcome: Outcome, urls: tuple[str, str]) -> None:
    pairs = bench.samples(60, quick=3)
    bench.step("first token")
    bench.total(pairs + _WARM_UP)
    found: list[list[float]] = [[], []]
    for index in range(-_WARM_UP, pairs):
        image = photo(f"vllm-example {bench.seed} {index}")
        body = prompts.ask([image], _QUESTION, max_tokens=2, stream=True, ignore_eos=True, logprobs=True)
        for which in (0, 1) if index % 2 else (1, 0):
            answer = await bench.client.chat(urls[which], body)
            if index >= 0:
                found[which].append(1000 * answer.ttft_seconds)
        bench.advance()
    ratio = paired_ratio(found[0], found[1], seed=bench.seed)
    outcome.figures.append(Figure.of("image, first token: chiasm / vLLM's example", ratio, "x", at_most=_TTFT_AT_MOST))
    outcome.figures += [
        Figure(f"image, first token: {label}, median", median(values), "ms")
        for label, values in zip(_LABELS, found, strict=True)
    ]
    limits = (None, _TTFT_AT_MOST * median(found[0]))
    series = [Series(label, values, limit) for label, values, limit in zip(_LABELS, found, limits, strict=True)]
    outcome.panels.append(Panel("vllm-example: image, first token", "ms", series))


async def _rate(bench: Bench, outcome: Outcome, urls: tuple[str, str], mix: Mix) -> None:
    rounds = min(20, bench.samples(10, quick=2))
    bench.step("texts and images")
    bench.total(rounds + 1)
    seconds: list[list[float]] = [[], []]
    sent = 0
    for index in range(-1, rounds):
        bodies = mix.draw()
        for which in (0, 1) if index % 2 else (1, 0):
            taken = await _seconds_for_all(bench, urls[which], bodies)
            if index >= 0:
                seconds[which].append(taken)
        sent = len(bodies)
        bench.advance()
    ratio = paired_ratio(seconds[1], seconds[0], seed=bench.seed)
    outcome.figures.append(
        Figure.of("texts and images, requests a second: chiasm / vLLM's example", ratio, "x", at_least=_RATE_AT_LEAST)
    )
    outcome.figures += [
        Figure(f"texts and images: {label}, median", sent / median(taken), "a second")
        for label, taken in zip(_LABELS, seconds, strict=True)
    ]
    series = [Series(label, taken) for label, taken in zip(_LABELS, seconds, strict=True)]
    outcome.panels.append(Panel(f"vllm-example: {sent} texts and images, {_AT_ONCE} at a time", "s", series))
    outcome.notes.append(
        f"{rounds} rounds of {sent} requests, half of them with one image of 512 x 512 pixels, {_AT_ONCE} at a time, "
        f"answers of {_ANSWER_TOKENS} tokens."
    )


async def _seconds_for_all(bench: Bench, url: str, bodies: list[bytes]) -> float:
    async def send(index: int) -> None:
        await bench.client.post(url, bodies[index])

    started = time.perf_counter()
    await at_most(_AT_ONCE, len(bodies), send)
    return time.perf_counter() - started


async def _bytes_at_pd(
    bench: Bench, outcome: Outcome, deployment: Deployment, example: Example, file: Path, mix: Mix
) -> None:
    """One more round through proxies whose PD stands behind a counter."""
    bench.step("bytes of bodies at PD")
    bodies = mix.draw()
    (pd,) = deployment.urls(Role.PD)
    async with counting(pd) as ours, chiasm_proxy(bench, deployment, ours.url) as url:
        await _seconds_for_all(bench, url, bodies)
    async with (
        counting(example.pd) as theirs,
        example_proxy(bench, file, example.encoder, theirs.url) as url,
    ):
        await _seconds_for_all(bench, url, bodies)
    counters = {"chiasm": ours, "vLLM's example": theirs}
    if can_forward_images(file):
        async with (
            pd_for_images(bench, deployment, example) as other_pd,
            counting(other_pd) as unwritten,
            example_proxy(bench, file, example.encoder, unwritten.url, forward_images=True) as url,
        ):
            await _seconds_for_all(bench, url, bodies)
        counters["vLLM's example with --no-rewrite"] = unwritten
    for label, counter in counters.items():
        if counter is not ours:
            ratio = ours.body_bytes / counter.body_bytes
            limit = _BYTES_AT_MOST if counter is theirs else None
            outcome.figures.append(Figure(f"bytes of bodies at PD: chiasm / {label}", ratio, "x", limit))
    for label, counter in counters.items():
        outcome.figures.append(
            Figure(f"bytes of bodies at PD: {label}", counter.body_bytes / counter.requests / 1000, "kB a request")
        )
        if counter.requests != len(bodies):
            outcome.notes.append(f"PD of {label} got {counter.requests} requests for {len(bodies)} of the client.")
    sent = sum(map(len, bodies)) / len(bodies)
    outcome.figures.append(Figure("bytes of bodies from the client", sent / 1000, "kB a request"))
