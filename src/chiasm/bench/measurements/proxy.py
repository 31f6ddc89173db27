"""What the proxy costs each request, and in memory."""

from __future__ import annotations

import asyncio
import time

from chiasm.bench import prompts
from chiasm.bench.alone import identifier_of
from chiasm.bench.images import noise
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_difference, quantile
from chiasm.bench.topology import encoder_and_pds, proxy_memory_bytes, running
from chiasm.wire import Role

_TEXT_AT_MOST_MS = 2.0
_IMAGE_AT_MOST_MS = 5.0
_MEMORY_AT_MOST_MB = 120.0
_IMAGE_BYTES = 1_000_000
_WARM_UP = 5
_TEXT_TOKENS = 64
_QUESTION = "What is shown?"


class Proxy(Measurement):
    """The same request through the proxy and straight to the instances, in turns; answers have one token."""

    name = "proxy"
    purpose = "The proxy's own cost: through it, minus straight to the instances"
    target = (
        f"median {_TEXT_AT_MOST_MS:g} ms for text, {_IMAGE_AT_MOST_MS:g} ms for 1 MB of image; under 120 MB resident"
    )

    async def run(self, bench: Bench) -> Outcome:
        pairs = bench.samples(150, quick=5)
        outcome = Outcome()
        async with running(bench, encoder_and_pds(bench.model)) as (deployment,):
            texts = prompts.Texts(deployment.folder, bench.seed)
            image = _ImageFile(noise(f"proxy {bench.seed}", _IMAGE_BYTES), deployment.urls(Role.ENCODER)[0])
            (pd,) = deployment.urls(Role.PD)
            await image.publish(bench)
            for kind, limit in (("text", _TEXT_AT_MOST_MS), ("1 MB image", _IMAGE_AT_MOST_MS)):
                bench.step(kind)
                bench.total(pairs + _WARM_UP)
                straight: list[float] = []
                through: list[float] = []
                own: list[float] = []
                for index in range(-_WARM_UP, pairs):
                    question = texts.of(_TEXT_TOKENS)
                    for is_through in (True, False) if index % 2 else (False, True):
                        if kind == "text":
                            body = prompts.chat(question, max_tokens=1)
                            url = deployment.url if is_through else pd
                            seconds, timing, _ = await bench.client.post(url, body)
                        elif is_through:
                            seconds, timing, _ = await bench.client.post(deployment.url, image.body(question))
                        else:
                            seconds = await image.straight(bench, pd, question)
                        if index >= 0:
                            (through if is_through else straight).append(1000 * seconds)
                            if is_through:
                                own.append(1000 * timing["proxy"])
                    bench.advance()
                outcome.figures += [
                    Figure.of(
                        f"{kind}: through - straight",
                        paired_difference(straight, through, seed=bench.seed),
                        "ms",
                        at_most=limit,
                    ),
                    Figure(f"{kind}: proxy's own figure, median", median(own), "ms", limit),
                    Figure(f"{kind}: proxy's own figure, p99", quantile(own, 0.99), "ms"),
                    Figure(f"{kind}: straight, median", median(straight), "ms"),
                ]
                outcome.panels.append(
                    Panel(
                        f"proxy: {kind}",
                        "ms",
                        [
                            Series("straight", straight),
                            Series("through the proxy", through, median(straight) + limit),
                            Series("proxy's own figure", own, limit),
                        ],
                    )
                )
            memory = proxy_memory_bytes(deployment) / 1e6
        outcome.figures.append(Figure("resident memory afterwards", memory, "MB", _MEMORY_AT_MOST_MB))
        outcome.notes.append(
            "The image's embedding is there beforehand in both cases, so that the noise of encoding is not in the difference."
        )
        return outcome


class _ImageFile:
    """One image, as a client sends it to the proxy, and as the proxy would pass it on."""

    def __init__(self, data: bytes, encoder: str) -> None:
        self._encoder = encoder
        self._part = prompts.image_part(data)
        self._identifier = identifier_of("proxy")
        self._side = int.from_bytes(data[16:20])  # of a PNG
        self._pixels = prompts.chat([{**self._part, "uuid": self._identifier}], max_tokens=1)

    def body(self, question: str) -> bytes:
        return prompts.chat([self._part, prompts.text_part(question)], max_tokens=1)

    async def publish(self, bench: Bench) -> None:
        await bench.client.post(self._encoder, self._pixels)

    async def straight(self, bench: Bench, pd: str, question: str) -> float:
        """Seconds until PD's answer, the encoder being told at the same time, as the proxy does."""
        embeds = {
            "type": "image_embeds",
            "image_embeds": {"image_size": [self._side, self._side]},
            "uuid": self._identifier,
        }
        body = prompts.chat([embeds, prompts.text_part(question)], max_tokens=1)
        started = time.perf_counter()
        encoding = asyncio.create_task(bench.client.post(self._encoder, self._pixels))
        try:
            await bench.client.post(pd, body)
            seconds = time.perf_counter() - started
            await encoding
        finally:
            encoding.cancel()
        return seconds
