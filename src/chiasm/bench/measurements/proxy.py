"""What the proxy costs each request, and how much memory it takes."""

from __future__ import annotations

import asyncio
import time

from chiasm.bench.load import turns
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import Texts, ask, chat, embeds_part, identifier_of, noise, publish, text_part
from chiasm.bench.statistics import median, paired_difference, quantile
from chiasm.bench.topology import encoder_and_pds, proxy_memory_bytes, running
from chiasm.wire import Role

_TEXT_AT_MOST_MS = 2.0
_IMAGE_AT_MOST_MS = 5.0
_MEMORY_AT_MOST_MB = 120.0
_IMAGE_BYTES = 1_000_000
_WARM_UP = 5
_TEXT_TOKENS = 64


class Proxy(Measurement):
    """The same request through the proxy and directly to the instances, in turns; answers have one token."""

    name = "proxy"
    purpose = "The proxy's own cost: the time through it, minus the time of calling the instances directly"
    target = (
        f"median {_TEXT_AT_MOST_MS:g} ms for text, {_IMAGE_AT_MOST_MS:g} ms for 1 MB of image; "
        f"under {_MEMORY_AT_MOST_MB:g} MB resident"
    )

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        async with running(bench, encoder_and_pds(bench.model)) as (deployment,):
            texts = Texts(deployment.folder, bench.seed)
            (encoder,), (pd,) = deployment.urls(Role.ENCODER), deployment.urls(Role.PD)
            text = _Text(bench, pd)
            image = _Image(bench, noise(f"proxy {bench.seed}", _IMAGE_BYTES), encoder, pd)
            await bench.client.post(encoder, image.pixels, as_proxy=True)
            await _compare(bench, outcome, "text", text, texts, deployment.url, _TEXT_AT_MOST_MS)
            await _compare(bench, outcome, "1 MB image", image, texts, deployment.url, _IMAGE_AT_MOST_MS)
            memory = proxy_memory_bytes(deployment) / 1e6
        outcome.figures.append(Figure("resident memory afterwards", memory, "MB", _MEMORY_AT_MOST_MB))
        outcome.notes.append(
            "The image's embedding is there before either request, so that the noise of encoding is not in the difference."
        )
        return outcome


class _Text:
    """A question without an image."""

    def __init__(self, bench: Bench, pd: str) -> None:
        self._bench = bench
        self._pd = pd

    def body(self, question: str) -> bytes:
        """Return what a client sends to the proxy."""
        return chat(question, max_tokens=1)

    async def call_directly(self, question: str) -> float:
        """Return the seconds that the same request takes without the proxy."""
        return (await self._bench.client.post(self._pd, self.body(question), as_proxy=True))[0]


class _Image(_Text):
    """A question about an image, which the client sends to the encoder and describes to the PD, as the proxy does."""

    def __init__(self, bench: Bench, data: bytes, encoder: str, pd: str) -> None:
        super().__init__(bench, pd)
        self._data = data
        self._encoder = encoder
        self._identifier = identifier_of("proxy")
        self._embeds = embeds_part(self._identifier, int.from_bytes(data[16:20]))  # the width in a PNG's header
        self.pixels = publish(data, self._identifier)

    def body(self, question: str) -> bytes:
        return ask([self._data], question, max_tokens=1)

    async def call_directly(self, question: str) -> float:
        """Return the seconds until the PD's answer, while the encoder is called at the same time."""
        body = chat([self._embeds, text_part(question)], max_tokens=1)
        await self._bench.client.tell_place(self._pd, self._encoder, self._identifier)
        started = time.perf_counter()
        encoding = asyncio.create_task(self._bench.client.post(self._encoder, self.pixels, as_proxy=True))
        try:
            await self._bench.client.post(self._pd, body, as_proxy=True)
            seconds = time.perf_counter() - started
            await encoding
        finally:
            encoding.cancel()
        return seconds


async def _compare(
    bench: Bench, outcome: Outcome, kind: str, request: _Text, texts: Texts, url: str, limit: float
) -> None:
    """Send a request through the proxy at ``url`` and directly; ``limit`` is the target in milliseconds."""
    pairs = bench.samples(150, quick=5)
    bench.phase(kind, pairs + _WARM_UP)
    direct: list[float] = []
    through: list[float] = []
    own: list[float] = []
    for index in range(-_WARM_UP, pairs):
        question = texts.of(_TEXT_TOKENS)
        for is_through in turns(index, 2):
            if is_through:
                seconds, timing, _ = await bench.client.post(url, request.body(question))
            else:
                seconds = await request.call_directly(question)
            if index >= 0:
                (through if is_through else direct).append(1000 * seconds)
                if is_through:
                    own.append(1000 * timing["proxy"])
        bench.advance()
    difference = paired_difference(direct, through, seed=bench.seed)
    outcome.figures += [
        Figure.of(f"{kind}: through the proxy - directly", difference, "ms", at_most=limit),
        Figure(f"{kind}: the proxy's own figure, median", median(own), "ms", limit),
        Figure(f"{kind}: the proxy's own figure, p99", quantile(own, 0.99), "ms"),
        Figure(f"{kind}: directly, median", median(direct), "ms"),
    ]
    series = [
        Series("directly", direct),
        Series("through the proxy", through, median(direct) + limit),
        Series("the proxy's own figure", own, limit),
    ]
    outcome.panels.append(Panel(f"proxy: {kind}", "ms", series))
