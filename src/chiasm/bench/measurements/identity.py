"""Whether any answer changes when the encoder, or prefill and decode, run in processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.bench.checkpoints import HEADS_OF_64, make_once
from chiasm.bench.load import at_most
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome
from chiasm.bench.requests import DrawnRequest, ask, count_kinds, draw_requests, sampling
from chiasm.bench.topology import (
    NIXL,
    NO_NIXL,
    aggregated,
    encoder_and_pds,
    kv_connectors,
    on_vllm,
    prefill_and_decode,
    running,
)
from chiasm.launch import Deployment, DeploymentConfig, EngineKind
from chiasm.prometheus import total
from chiasm.wire import Role

if TYPE_CHECKING:
    from chiasm.bench.reference import Reference

AGGREGATED = "aggregated"
_REQUESTS, _RANDOM_REQUESTS = 200, 40
_QUICK_REQUESTS = 12
_AT_ONCE = 8
_MAX_TOKENS = 24
_SHOWN = 10
_FAMILIES = ("qwen2_5_vl", "qwen3_vl")

Tokens = list[list[str]]
"""The tokens of the answer to each request."""


class Identity(Measurement):
    """The same requests, eight at a time, through each topology; with the built-in engine also through ``generate``."""

    name = "identity"
    target = "no answer differs"

    def __init__(self, engine: EngineKind) -> None:
        self._over_vllm = engine is EngineKind.VLLM
        self.purpose = (
            "Greedy answers of E+PD and of E+P+D over vLLM against those of one aggregated vLLM, token for token"
            if self._over_vllm
            else "Answers of E+PD and of E+P+D against those of an aggregated instance and of transformers' generate, "
            "token for token: greedy, then sampled with a seed"
        )

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        requests = draw_requests(bench.seed, bench.samples(_REQUESTS, quick=_QUICK_REQUESTS))
        outcome.notes.append(count_kinds(requests))
        if self._over_vllm:
            await _compare_over_vllm(bench, outcome, bench.model_name, bench.model, requests)
            # Random weights answer differently as soon as anything differs, so fewer requests say as much.
            few = draw_requests(bench.seed + 1, min(_RANDOM_REQUESTS, len(requests)))
            outcome.notes.append(f"To the random checkpoints: {count_kinds(few)}")
            for family in _FAMILIES:
                model = await make_once(bench, f"{family}-heads-of-64", HEADS_OF_64, family)
                await _compare_over_vllm(bench, outcome, f"random {family}", model, few)
        else:
            await _compare_built_in(bench, outcome, requests)
        return outcome


async def _compare_built_in(bench: Bench, outcome: Outcome, requests: Sequence[DrawnRequest]) -> None:
    """Compare greedy answers of all topologies and of ``generate``, then sampled ones of all topologies."""
    apart = {f"E+P+D ({one})": prefill_and_decode(bench.model, kv_connector=one) for one in kv_connectors()}
    topologies = {AGGREGATED: aggregated(bench.model), "E+PD": encoder_and_pds(bench.model), **apart}
    fields = [sampling(bench.seed, index) for index in range(len(requests))]
    passes = {"greedy": _bodies(requests), "sampled": _bodies(requests, fields)}
    answers: dict[str, dict[str, Tokens]] = {kind: {} for kind in passes}
    for label, config in topologies.items():
        async with running(bench, config) as (deployment,):
            folder = deployment.folder
            for kind, bodies in passes.items():
                answers[kind][label] = await _ask_all(bench, f"{label}, {kind}", deployment.url, bodies)
            await _note_handovers(bench, outcome, deployment, label, len(passes) * len(requests))
    expected = await generated(bench, outcome, folder, requests)
    if NIXL not in kv_connectors():
        outcome.notes.append(NO_NIXL)
    compare(outcome, "greedy", requests, answers["greedy"], expected)
    compare(outcome, "sampled", requests, answers["sampled"])


async def _compare_over_vllm(
    bench: Bench, outcome: Outcome, label: str, model: str, requests: Sequence[DrawnRequest]
) -> None:
    """Compare greedy answers of all topologies."""
    topologies: dict[str, DeploymentConfig] = {
        AGGREGATED: aggregated(model),
        "E+PD": encoder_and_pds(model),
        "E+P+D": prefill_and_decode(model),
    }
    answers: dict[str, Tokens] = {}
    # All start at once: vLLM takes long to load, and one instance alone would leave cores idle meanwhile.
    async with running(bench, *map(on_vllm, topologies.values())) as deployments:
        for topology, deployment in zip(topologies, deployments, strict=True):
            phase = f"{label}, {topology}"
            answers[topology] = await _ask_all(bench, phase, deployment.url, _bodies(requests))
            await _note_handovers(bench, outcome, deployment, phase, len(requests))
    compare(outcome, label, requests, answers)


def _bodies(requests: Sequence[DrawnRequest], fields: Sequence[dict[str, object]] | None = None) -> list[bytes]:
    return [
        ask(request.images, request.question, max_tokens=_MAX_TOKENS, logprobs=True, **more)
        for request, more in zip(requests, fields or [{}] * len(requests), strict=True)
    ]


async def _ask_all(bench: Bench, phase: str, url: str, bodies: Sequence[bytes]) -> Tokens:
    """Send all requests; their log probabilities name the tokens of the answers."""
    bench.phase(phase, len(bodies))

    async def send(index: int) -> list[str]:
        _, _, answer = await bench.client.post(url, bodies[index])
        bench.advance()
        return [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]

    return await at_most(_AT_ONCE, len(bodies), send)


async def generated(bench: Bench, outcome: Outcome, folder: Path, requests: Sequence[DrawnRequest]) -> Tokens | None:
    """Return what ``generate`` answers; None, with a note, if there is no reference for the checkpoint's family."""
    bench.phase("generate", len(requests))
    with ThreadPoolExecutor(1, "chiasm-reference") as thread:
        run = asyncio.get_running_loop().run_in_executor
        try:
            reference = await run(thread, _reference, folder)
        except ValueError:
            outcome.notes.append("No reference: transformers' generate is compared for Qwen-VL checkpoints only.")
            return None
        found = []
        for request in requests:
            found.append(await run(thread, reference.answer_tokens, request.images, request.question, _MAX_TOKENS))
            bench.advance()
    return found


def _reference(folder: Path) -> Reference:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from chiasm.bench.reference import Reference

    # Several threads wait for each other at every operator, which takes far longer on a busy machine than the work itself.
    torch.set_num_threads(1)
    disable_progress_bar()  # the bench shows its own
    return Reference(folder)


async def _note_handovers(bench: Bench, outcome: Outcome, deployment: Deployment, label: str, sent: int) -> None:
    """Note how many answers were handed over from P to D, if the deployment has a D."""
    if deployment.urls(Role.DECODE):
        counts = await bench.client.metrics(deployment.url)
        handovers = total(counts, "chiasm_proxy_handovers_total") or 0
        retries = total(counts, "chiasm_proxy_prefill_retries_total") or 0
        outcome.notes.append(
            f"{label}: D took over {handovers:.0f} of {sent} answers, the others ended with their first token; "
            f"{retries:.0f} prompts were prefilled twice."
        )


def compare(
    outcome: Outcome,
    label: str,
    requests: Sequence[DrawnRequest],
    answers: Mapping[str, Tokens],
    generated: Tokens | None = None,
) -> None:
    """Count and show answers that differ from those of the aggregated topology or from the ``generated`` ones.

    ``answers`` are by topology. Any difference makes the outcome wrong. ``label`` says in the figures what is compared.
    """
    references = {AGGREGATED: answers[AGGREGATED]} | ({} if generated is None else {"generate": generated})
    shown = 0
    for other, expected in references.items():
        for one, found in answers.items():
            if one == other:
                continue
            pairs = list(zip(found, expected, strict=True))
            differing = [index for index, (left, right) in enumerate(pairs) if left != right]
            outcome.figures.append(Figure(f"{label}, answers that differ: {one} and {other}", len(differing), "", 0))
            outcome.wrong = outcome.wrong or bool(differing)
            for index in differing[: max(0, _SHOWN - shown)]:
                shown += 1
                left, right = ("".join(tokens) for tokens in pairs[index])
                request = f"Request {index} ({requests[index].kind}, {requests[index].question!r}), {label}"
                outcome.notes.append(f"{request}: {one} answered {left!r}, {other} {right!r}.")
    tokens = sum(map(len, answers[AGGREGATED]))
    outcome.notes.append(f"{label}: {len(requests)} requests, {_AT_ONCE} at a time; {tokens} tokens per topology.")
