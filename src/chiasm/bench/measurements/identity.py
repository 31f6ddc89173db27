"""Whether splitting the encoder off, or prefill from decode, changes any answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from chiasm.bench import prompts
from chiasm.bench.answers import Answers, ask_all, compare, kinds
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Outcome
from chiasm.bench.reference import Reference
from chiasm.bench.requests import Request, draw_requests, sampling
from chiasm.bench.topology import (
    NIXL,
    NO_NIXL,
    aggregated,
    encoder_and_pds,
    kv_connectors,
    prefill_and_decode,
    running,
)
from chiasm.launch import Deployment, DeploymentConfig
from chiasm.wire import Role

_MAX_TOKENS = 24
GREEDY, SAMPLED = "greedy", "sampled"
AGGREGATED = "aggregated"


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
                    answers[kind][label] = await ask_all(bench, deployment.url, bodies)
                if deployment.urls(Role.DECODE):
                    notes.append(await _handed_over(bench, deployment, label, len(passes) * len(requests)))
        expected = await self._reference(bench, folder, requests)
        outcome = _compare(requests, answers, expected)
        outcome.notes += notes
        return outcome

    @staticmethod
    async def _reference(bench: Bench, folder: Any, requests: Sequence[Request]) -> Answers | None:
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
    for kind, by_topology in answers.items():
        references = {AGGREGATED: by_topology[AGGREGATED]}
        if kind == GREEDY and expected is not None:
            references["generate"] = expected
        compare(outcome, kind, requests, by_topology, references)
    outcome.notes.append(kinds(requests))
    return outcome
