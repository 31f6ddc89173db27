"""Whether splitting the encoder off changes any answer."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from chiasm.bench import prompts
from chiasm.bench.arrivals import at_most
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome
from chiasm.bench.pictures import png
from chiasm.bench.reference import Reference
from chiasm.bench.topology import aggregated, encoder_and_pds, running
from chiasm.demo.pictures import draw_example

_MAX_TOKENS = 24
_AT_ONCE = 8
_SHOWN = 10
_PICTURES = {"text": 0, "1 picture": 1, "2 pictures": 2, "3 pictures": 3, "4 pictures": 4, "the same picture twice": 2}
_SHARES = {
    "text": 4,
    "1 picture": 6,
    "2 pictures": 3,
    "3 pictures": 2,
    "4 pictures": 2,
    "the same picture twice": 3,
}
"""Of 20 requests."""


@dataclass(frozen=True)
class Request:
    """Pictures as files, and a question."""

    kind: str
    images: tuple[bytes, ...]
    question: str


def draw_requests(seed: int, count: int) -> list[Request]:
    """Requests of all kinds in a shuffled order; the same arguments give the same bytes."""
    kinds = [kind for kind, share in _SHARES.items() for _ in range(share)]
    drawn = [kinds[index % len(kinds)] for index in range(count)] if count >= len(kinds) else _few(kinds, count)
    random.Random(f"identity {seed}").shuffle(drawn)
    return [_draw(seed * 100_000 + index, kind) for index, kind in enumerate(drawn)]


def _few(kinds: Sequence[str], count: int) -> list[str]:
    distinct = list(dict.fromkeys(kinds))
    return [distinct[index % len(distinct)] for index in range(count)]


def _draw(seed: int, kind: str) -> Request:
    number = _PICTURES[kind]
    example = draw_example(seed, images=max(1, number))
    images = [png(image) for image in example.images[:number]]
    if kind == "the same picture twice":
        images[1] = images[0]
    return Request(kind, tuple(images), example.question)


class Identity(Measurement):
    """All requests, eight at a time, through both topologies, and one by one through ``generate``."""

    name = "identity"
    purpose = "Greedy answers of E+PD, of aggregated and of transformers' generate, token for token"
    target = "no request differs"

    async def run(self, bench: Bench) -> Outcome:
        requests = draw_requests(bench.seed, bench.samples(200, quick=12))
        bodies = [
            prompts.ask(request.images, request.question, max_tokens=_MAX_TOKENS, logprobs=True) for request in requests
        ]
        async with running(bench, aggregated(bench.model), encoder_and_pds(bench.model)) as deployments:
            folder = deployments[0].folder
            bench.total(2 * len(bodies))
            answers: list[list[list[str]]] = []
            for label, deployment in zip(("aggregated", "E+PD"), deployments, strict=True):
                bench.step(label)

                async def send(index: int, url: str = deployment.url) -> list[str]:
                    _, _, answer = await bench.client.post(url, bodies[index])
                    bench.advance()
                    return _tokens(answer)

                answers.append(await at_most(_AT_ONCE, len(bodies), send))
        expected = await self._reference(bench, folder, requests)
        return _compare(requests, expected, answers[0], answers[1])

    @staticmethod
    async def _reference(bench: Bench, folder: Any, requests: Sequence[Request]) -> list[list[str]] | None:
        bench.step("generate")
        bench.total(len(requests))
        with ThreadPoolExecutor(1, "chiasm-reference") as thread:
            run = asyncio.get_running_loop().run_in_executor
            try:
                reference = await run(thread, Reference, folder)
            except ValueError:
                return None
            found = []
            for request in requests:
                found.append(await run(thread, reference.answer, request.images, request.question, _MAX_TOKENS))
                bench.advance()
        return found


def _tokens(answer: Any) -> list[str]:
    return [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]


def _compare(
    requests: Sequence[Request],
    expected: Sequence[list[str]] | None,
    aggregated_answers: Sequence[list[str]],
    split_answers: Sequence[list[str]],
) -> Outcome:
    """Count and show the differences; any of them makes the outcome wrong."""
    outcome = Outcome()
    pairs: list[tuple[str, Sequence[list[str]], Sequence[list[str]]]] = [
        ("E+PD and aggregated", split_answers, aggregated_answers)
    ]
    if expected is None:
        outcome.notes.append("No reference: transformers' generate is compared for Qwen-VL checkpoints only.")
    else:
        pairs.append(("aggregated and generate", aggregated_answers, expected))
        pairs.append(("E+PD and generate", split_answers, expected))
    shown = 0
    for label, left, right in pairs:
        differing = [index for index, (one, other) in enumerate(zip(left, right, strict=True)) if one != other]
        outcome.figures.append(Figure(f"differ: {label}", len(differing), "", 0))
        outcome.wrong = outcome.wrong or bool(differing)
        for index in differing[: max(0, _SHOWN - shown)]:
            shown += 1
            outcome.notes.append(
                f"request {index} ({requests[index].kind}, {requests[index].question!r}), {label}: "
                f"{''.join(left[index])!r} and {''.join(right[index])!r}"
            )
    counted = Counter(request.kind for request in requests)
    tokens = sum(map(len, split_answers))
    outcome.notes.append(
        f"{len(requests)} requests ({', '.join(f'{number} {kind}' for kind, number in counted.items())}), "
        f"{_AT_ONCE} at a time, {tokens} tokens"
    )
    return outcome
