"""Whether splitting the encoder off, or prefill from decode, changes any answer."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from chiasm.bench import prompts
from chiasm.bench.arrivals import at_most
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome
from chiasm.bench.pictures import png
from chiasm.bench.reference import Reference
from chiasm.bench.topology import (
    NIXL,
    NO_NIXL,
    aggregated,
    encoder_and_pds,
    kv_connectors,
    prefill_and_decode,
    running,
)
from chiasm.demo.pictures import draw_example
from chiasm.engine.config import Role
from chiasm.launch import Deployment, DeploymentConfig

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


GREEDY, SAMPLED = "greedy", "sampled"
AGGREGATED = "aggregated"
Answers = list[list[str]]
"""The tokens of each request's answer."""
_PENALTIES: tuple[dict[str, float], ...] = (
    {},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3},
)


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


def sampling(seed: int, index: int) -> dict[str, Any]:
    """How request ``index`` is sampled: each with a seed of its own, two in three with penalties.

    Every other one goes on after the end token, since most answers of a trained checkpoint are over after a few.
    """
    fields: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": seed * 100_000 + index}
    return fields | _PENALTIES[index % len(_PENALTIES)] | {"ignore_eos": index % 2 == 1}


class Identity(Measurement):
    """All requests, eight at a time, through each topology, and one by one through ``generate``."""

    name = "identity"
    purpose = (
        "Answers of E+PD and of E+P+D against those of aggregated and of transformers' generate, token for token: "
        "greedy, then sampled with a seed"
    )
    target = "no request differs"

    async def run(self, bench: Bench) -> Outcome:
        requests = draw_requests(bench.seed, bench.samples(200, quick=12))
        passes = {
            kind: [
                prompts.ask(request.images, request.question, max_tokens=_MAX_TOKENS, logprobs=True, **fields)
                for request, fields in zip(requests, given, strict=True)
            ]
            for kind, given in (
                (GREEDY, [{}] * len(requests)),
                (SAMPLED, [sampling(bench.seed, index) for index in range(len(requests))]),
            )
        }
        answers: dict[str, dict[str, Answers]] = {kind: {} for kind in passes}
        notes = [] if NIXL in kv_connectors() else [NO_NIXL]
        for label, config in _topologies(bench.model).items():
            async with running(bench, config) as (deployment,):
                folder = deployment.folder
                for kind, bodies in passes.items():
                    bench.step(f"{label}, {kind}")
                    bench.total(len(bodies))
                    answers[kind][label] = await _ask_all(bench, deployment.url, bodies)
                if deployment.urls(Role.DECODE):
                    notes.append(await _handed_over(bench, deployment, label, len(passes) * len(requests)))
        expected = await self._reference(bench, folder, requests)
        outcome = _compare(requests, answers, expected)
        outcome.notes += notes
        return outcome

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


def _topologies(model: str) -> dict[str, DeploymentConfig]:
    """By what the figures call them; all others are compared with the first."""
    apart = {f"E+P+D ({connector})": prefill_and_decode(model, kv_connector=connector) for connector in kv_connectors()}
    return {AGGREGATED: aggregated(model), "E+PD": encoder_and_pds(model), **apart}


async def _ask_all(bench: Bench, url: str, bodies: Sequence[bytes]) -> Answers:
    async def send(index: int) -> list[str]:
        _, _, answer = await bench.client.post(url, bodies[index])
        bench.advance()
        return [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]

    return await at_most(_AT_ONCE, len(bodies), send)


async def _handed_over(bench: Bench, deployment: Deployment, label: str, sent: int) -> str:
    counts = await bench.client.metrics(deployment.url)
    return (
        f"{label}: D took over {counts['chiasm_proxy_handovers_total']:.0f} of {sent} answers, the others ended with their "
        f"first token; {counts['chiasm_proxy_prefill_retries_total']:.0f} were prefilled twice."
    )


def _compare(
    requests: Sequence[Request], answers: Mapping[str, Mapping[str, Answers]], expected: Answers | None
) -> Outcome:
    """Count and show the differences; any of them makes the outcome wrong.

    ``answers`` are those of each kind by topology, ``expected`` the greedy ones of ``generate``.
    """
    outcome = Outcome()
    if expected is None:
        outcome.notes.append("No reference: transformers' generate is compared for Qwen-VL checkpoints only.")
    shown = 0
    for kind, by_topology in answers.items():
        references = {AGGREGATED: by_topology[AGGREGATED]}
        if kind == GREEDY and expected is not None:
            references["generate"] = expected
        pairs = [(one, other) for other in references for one in by_topology if one != other]
        for one, other in pairs:
            together = list(zip(by_topology[one], references[other], strict=True))
            differing = [index for index, (left, right) in enumerate(together) if left != right]
            outcome.figures.append(Figure(f"{kind}, differ: {one} and {other}", len(differing), "", 0))
            outcome.wrong = outcome.wrong or bool(differing)
            for index in differing[: max(0, _SHOWN - shown)]:
                shown += 1
                left, right = together[index]
                outcome.notes.append(
                    f"request {index} ({requests[index].kind}, {requests[index].question!r}), {kind}, {one} and {other}: "
                    f"{''.join(left)!r} and {''.join(right)!r}"
                )
        tokens = sum(map(len, by_topology[AGGREGATED]))
        outcome.notes.append(f"{kind}: {len(requests)} requests, {_AT_ONCE} at a time, {tokens} tokens a topology.")
    counted = Counter(request.kind for request in requests)
    outcome.notes.append(f"Of {len(requests)}: {', '.join(f'{number} {kind}' for kind, number in counted.items())}.")
    return outcome
