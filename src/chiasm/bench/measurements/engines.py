"""The built-in engine beside vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from chiasm.bench import requests
from chiasm.bench.checkpoints import THIRD_OF_A_BILLION, make_once
from chiasm.bench.client import StreamedAnswer
from chiasm.bench.load import turns
from chiasm.bench.measurement import Bench, Measurement, Outcome
from chiasm.bench.requests import Texts, photo
from chiasm.bench.topology import aggregated, encoder_and_pds, on_vllm, running
from chiasm.cores import cpu_flags, has_native_bfloat16
from chiasm.launch import DeploymentConfig

_WARM_UP = 2
_ANSWER_TOKENS = 24
_TEXT_TOKENS = 64
_BATCH = 8
_VLLM, _BUILT_IN = "vLLM", "built-in"


class _Targets(NamedTuple):
    """What the built-in engine's times may be at most, as shares of vLLM's."""

    first_token: float
    per_token: float


class Engines(Measurement):
    """The same weights in vLLM and in the built-in engine, behind the same proxy; all four deployments run at once."""

    name = "engines"
    _small, _large = _Targets(first_token=0.8, per_token=0.5), _Targets(first_token=1.0, per_token=1.0)
    purpose = (
        "Time to first token of an image and time per token, one request and eight at a time: built-in engine / vLLM"
    )
    target = (
        f"with --model, first token at most {_small.first_token} times vLLM's and time per token at most {_small.per_token} "
        f"times; with 0.3 billion parameters both at most {_large.first_token:g} times"
    )

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        rounds = bench.samples(40, quick=2)
        large = await make_once(bench, "qwen3_vl-300m", THIRD_OF_A_BILLION)
        dtypes = ["float32", "bfloat16"] if has_native_bfloat16(cpu_flags()) else ["float32"]
        for dtype in dtypes:
            await self._compare(bench, outcome, f"{bench.model_name}, {dtype}", bench.model, dtype, self._small, rounds)
            fewer = min(rounds, bench.samples(12, quick=2))
            await self._compare(bench, outcome, f"0.3 B, {dtype}", large, dtype, self._large, fewer)
        outcome.notes.append(
            f"One image: one request at a time about a new image of 512 x 512 pixels, answered in {_ANSWER_TOKENS} tokens. "
            f"{_BATCH} texts: as many requests at a time with new texts of {_TEXT_TOKENS} tokens, and as long answers. All "
            "instances have the same number of threads."
        )
        if len(dtypes) == 1:
            outcome.notes.append("bfloat16 is left out, because this CPU has no instructions for it.")
        return outcome

    async def _compare(
        self, bench: Bench, outcome: Outcome, label: str, model: str, dtype: str, targets: _Targets, rounds: int
    ) -> None:
        topologies = {"aggregated": aggregated(model), "E+PD": encoder_and_pds(model)}
        # The first of each pair is what the other is divided by.
        engines: dict[str, Callable[[DeploymentConfig], DeploymentConfig]] = {
            _VLLM: lambda config: on_vllm(config, dtype=dtype),
            _BUILT_IN: lambda config: replace(config, settings={**config.settings, "dtype": dtype}),
        }
        names = [(topology, engine) for topology in topologies for engine in engines]
        async with running(
            bench, *(engines[engine](topologies[topology]) for topology, engine in names)
        ) as deployments:
            urls = [deployment.url for deployment in deployments]
            texts = Texts(deployments[0].folder, bench.seed)

            def image(index: int) -> list[bytes]:
                fields: dict[str, Any] = {
                    "max_tokens": _ANSWER_TOKENS,
                    "stream": True,
                    "ignore_eos": True,
                    "logprobs": True,
                }
                return [requests.ask([photo(f"engines {bench.seed} {label} {index}")], **fields)]

            def batch(_: int) -> list[bytes]:
                return [requests.stream(texts.of(_TEXT_TOKENS), _ANSWER_TOKENS) for _ in range(_BATCH)]

            for what, bodies_of in (("one image", image), (f"{_BATCH} texts", batch)):
                bench.phase(f"{label}, {what}", rounds + _WARM_UP)
                found = await _in_turns(bench, urls, bodies_of, rounds)
                by_name = dict(zip(names, found, strict=True))
                for topology in topologies:
                    taken = {engine: by_name[topology, engine] for engine in engines}
                    name = f"{label}, {topology}, {what}"
                    firsts = {engine: [_mean(_first, answers) for answers in given] for engine, given in taken.items()}
                    later = {engine: [_mean(_later, answers) for answers in given] for engine, given in taken.items()}
                    for kind, samples, limit in (
                        ("first token", firsts, targets.first_token if what == "one image" else None),
                        ("per token", later, targets.per_token),
                    ):
                        outcome.compare(
                            f"{name}, {kind}", samples, title=f"engines: {kind}, {name}", seed=bench.seed, at_most=limit
                        )


async def _in_turns(
    bench: Bench, urls: list[str], bodies_of: Callable[[int], list[bytes]], rounds: int
) -> list[list[list[StreamedAnswer]]]:
    """Send the requests of a round at once to one server after the other; return the answers by server and round."""
    found: list[list[list[StreamedAnswer]]] = [[] for _ in urls]
    for index in range(-_WARM_UP, rounds):
        bodies = bodies_of(index)
        for which in turns(index, len(urls)):
            answers = await asyncio.gather(*(bench.client.chat(urls[which], body) for body in bodies))
            if index >= 0:
                found[which].append(list(answers))
        bench.advance()
    return found


def _mean(of: Callable[[StreamedAnswer], float], answers: list[StreamedAnswer]) -> float:
    return sum(map(of, answers)) / len(answers)


def _first(answer: StreamedAnswer) -> float:
    return 1000 * answer.ttft_seconds


def _later(answer: StreamedAnswer) -> float:
    return 1000 * answer.tpot_seconds
