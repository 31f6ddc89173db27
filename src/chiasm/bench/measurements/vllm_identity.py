"""Whether splitting the encoder off, or prefill from decode, changes any of vLLM's answers."""

from __future__ import annotations

from chiasm.bench import prompts
from chiasm.bench.answers import Answers, ask_all, compare, kinds
from chiasm.bench.checkpoints import with_heads_of_64
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Outcome
from chiasm.bench.requests import Request, draw_requests
from chiasm.bench.topology import aggregated, encoder_and_pds, prefill_and_decode, running
from chiasm.bench.vllm import on_vllm
from chiasm.launch import DeploymentConfig
from chiasm.launch.config import EngineKind

_MAX_TOKENS = 24
_REQUESTS = 200
_RANDOM_REQUESTS = 40
_FAMILIES = ("qwen2_5_vl", "qwen3_vl")
_AGGREGATED = "aggregated"


class VllmIdentity(Measurement):
    """All requests, eight at a time, through each topology."""

    name = "vllm-identity"
    purpose = (
        "Greedy answers of E+PD and of E+P+D over vLLM against those of one vLLM that does it all, token for token"
    )
    target = "no request differs"
    engine = EngineKind.VLLM

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        shipped = draw_requests(bench.seed, bench.samples(_REQUESTS, quick=6))
        await _compare(bench, outcome, bench.model.rstrip("/").rpartition("/")[2], bench.model, shipped)
        # Answers of random weights differ as soon as anything does, so fewer of them say as much.
        few = draw_requests(bench.seed + 1, min(_RANDOM_REQUESTS, bench.samples(_RANDOM_REQUESTS, quick=6)))
        for family in _FAMILIES:
            await _compare(bench, outcome, f"random {family}", await with_heads_of_64(bench, family), few)
        outcome.notes += [kinds(shipped), f"Of the random checkpoints: {kinds(few)}"]
        return outcome


async def _compare(bench: Bench, outcome: Outcome, label: str, model: str, requests: list[Request]) -> None:
    bodies = [
        prompts.ask(request.images, request.question, max_tokens=_MAX_TOKENS, logprobs=True) for request in requests
    ]
    topologies = _topologies(model)
    answers: dict[str, Answers] = {}
    # All start at once: an instance alone would leave cores idle for as long as it loads.
    async with running(bench, *map(on_vllm, topologies.values())) as deployments:
        for topology, deployment in zip(topologies, deployments, strict=True):
            bench.step(f"{label}, {topology}")
            bench.total(len(bodies))
            answers[topology] = await ask_all(bench, deployment.url, bodies)
    compare(outcome, label, requests, answers, {_AGGREGATED: answers[_AGGREGATED]})


def _topologies(model: str) -> dict[str, DeploymentConfig]:
    return {
        _AGGREGATED: aggregated(model),
        "E+PD": encoder_and_pds(model),
        "E+P+D": prefill_and_decode(model),
    }
