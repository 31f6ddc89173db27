"""vLLM beside the built-in engine, with the same weights behind the same proxy."""

from __future__ import annotations

from dataclasses import replace

from chiasm.bench import prompts
from chiasm.bench.checkpoints import third_of_a_billion
from chiasm.bench.client import Answer
from chiasm.bench.images import photo
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import aggregated, encoder_and_pds, running
from chiasm.bench.vllm import on_vllm
from chiasm.launch import DeploymentConfig
from chiasm.launch.config import EngineKind

_WARM_UP = 2
_ANSWER_TOKENS = 24
_QUESTION = "What is shown?"
_ENGINES = ("built-in", "vLLM")


class Engines(Measurement):
    """One request at a time, the same to all four deployments, which take turns in who is first."""

    name = "engines"
    purpose = "Time to first token of an image and time per token: vLLM beside the built-in engine, aggregated and E+PD"
    target = "none: side by side"
    engine = EngineKind.VLLM

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        rounds = bench.samples(40, quick=2)
        await _compare(bench, outcome, bench.model.rstrip("/").rpartition("/")[2], bench.model, rounds)
        rounds = min(rounds, bench.samples(12, quick=2))
        await _compare(bench, outcome, "0.3 B", await third_of_a_billion(bench), rounds)
        outcome.notes.append(
            f"Answers of {_ANSWER_TOKENS} tokens; an image of 512 x 512 pixels, new each time. All in float32, with as many "
            "threads an instance."
        )
        return outcome


async def _compare(bench: Bench, outcome: Outcome, label: str, model: str, rounds: int) -> None:
    topologies = {"aggregated": aggregated(model), "E+PD": encoder_and_pds(model)}
    configs = [one for config in topologies.values() for one in (_built_in(config), on_vllm(config))]
    found: list[list[Answer]] = [[] for _ in configs]
    async with running(bench, *configs) as deployments:
        bench.step(label)
        bench.total(rounds + _WARM_UP)
        for index in range(-_WARM_UP, rounds):
            image = photo(f"engines {bench.seed} {label} {index}")
            body = prompts.ask(
                [image], _QUESTION, max_tokens=_ANSWER_TOKENS, stream=True, ignore_eos=True, logprobs=True
            )
            for turn in range(len(configs)):
                which = (turn + index) % len(configs)
                answer = await bench.client.chat(deployments[which].url, body)
                if index >= 0:
                    found[which].append(answer)
            bench.advance()
    for place, topology in enumerate(topologies):
        _report(outcome, f"{label}, {topology}", found[2 * place : 2 * place + 2], bench.seed)


def _built_in(config: DeploymentConfig) -> DeploymentConfig:
    return replace(config, settings={**config.settings, "dtype": "float32"})


def _report(outcome: Outcome, label: str, found: list[list[Answer]], seed: int) -> None:
    first = [[1000 * answer.ttft_seconds for answer in answers] for answers in found]
    later = [[1000 * answer.tpot_seconds for answer in answers] for answers in found]
    for what, values in (("first token", first), ("per token", later)):
        outcome.figures.append(
            Figure.of(f"{label}, {what}: vLLM / built-in", paired_ratio(values[0], values[1], seed=seed), "x")
        )
        outcome.figures += [
            Figure(f"{label}, {what}: {engine}, median", median(one), "ms")
            for engine, one in zip(_ENGINES, values, strict=True)
        ]
        series = [Series(engine, one) for engine, one in zip(_ENGINES, values, strict=True)]
        outcome.panels.append(Panel(f"engines: {what}, {label}", "ms", series))
