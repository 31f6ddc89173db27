"""What a single request takes with prefill and decode apart, and with vLLM: one at a time, to several topologies in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chiasm.bench import requests
from chiasm.bench.checkpoints import synthetic
from chiasm.bench.client import StreamedAnswer
from chiasm.bench.load import stream_in_turns
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import Texts, photo
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import encoder_and_pds, prefill_and_decode, running
from chiasm.launch import DeploymentConfig

PROMPT_TOKENS = 1000
"""Length of the prompts by which the gap between prefill and decode is measured."""
_WARM_UP = 3
_ANSWER_TOKENS = 24
_SYNTHETIC = "synthetic"

Bodies = Callable[[int], bytes]
"""Gives the body of a round."""


async def _answers(
    bench: Bench,
    label: str,
    topologies: dict[str, DeploymentConfig],
    bodies: Callable[[Texts], dict[str, Bodies]],
    *,
    rounds: int,
    warm_up: int,
) -> dict[str, dict[str, list[StreamedAnswer]]]:
    """Return the answers to each kind of body, by topology. ``bodies`` is given texts for the checkpoint's tokenizer."""
    found: dict[str, dict[str, list[StreamedAnswer]]] = {}
    async with running(bench, *topologies.values()) as deployments:
        urls = [deployment.url for deployment in deployments]
        for kind, body_of in bodies(Texts(deployments[0].folder, bench.seed)).items():
            bench.phase(f"{label}, {kind}", rounds + warm_up)
            answers = await stream_in_turns(bench, urls, body_of, rounds=rounds, warm_up=warm_up)
            found[kind] = dict(zip(topologies, answers, strict=True))
    return found


async def _checkpoints(bench: Bench) -> list[tuple[str, str]]:
    """Return labels and folders of the checkpoints that are measured."""
    return [(bench.model_name, bench.model), (_SYNTHETIC, await synthetic(bench))]


def _ttfts(answers: dict[str, list[StreamedAnswer]]) -> dict[str, list[float]]:
    """Return milliseconds to the first token, by topology."""
    return {label: [1000 * answer.ttft_seconds for answer in given] for label, given in answers.items()}


class Split(Measurement):
    """A photo, then a long text whose gap between tokens one and two is compared with later gaps, to E+PD and E+P+D."""

    name = "split"
    _ttft_at_most = 1.05
    _gap_at_most = 3.0
    purpose = "E+P+D against E+PD on an idle machine: time to first token of one image, and the gap after a first token"
    target = (
        f"time to first token at most {_ttft_at_most} times that of E+PD; gap between tokens one and two of a "
        f"{PROMPT_TOKENS}-token prompt at most {_gap_at_most:g} times the median of the later gaps"
    )

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        for label, model in await _checkpoints(bench):
            await self._compare(bench, outcome, label, model, judged=label == _SYNTHETIC)
        outcome.notes.append(
            "Only the synthetic checkpoint has targets: a small one generates tokens faster than processes can exchange "
            "messages."
        )
        return outcome

    async def _compare(self, bench: Bench, outcome: Outcome, label: str, model: str, *, judged: bool) -> None:
        def bodies(texts: Texts) -> dict[str, Bodies]:
            fields: dict[str, Any] = {"max_tokens": 2, "stream": True, "ignore_eos": True}
            return {
                "image": lambda index: requests.ask([photo(f"split {bench.seed} {label} {index}")], **fields),
                "text": lambda index: requests.stream(texts.of(PROMPT_TOKENS), _ANSWER_TOKENS),
            }

        topologies = {"E+PD": encoder_and_pds(model), "E+P+D": prefill_and_decode(model)}
        rounds, warm_up = bench.samples(60, quick=3), 1 if bench.quick else _WARM_UP
        found = await _answers(bench, label, topologies, bodies, rounds=rounds, warm_up=warm_up)
        outcome.compare(
            f"{label}, image, first token",
            _ttfts(found["image"]),
            title=f"split: image, first token, {label}",
            seed=bench.seed,
            at_most=self._ttft_at_most if judged else None,
        )
        series: list[Series] = []
        for topology, answers in found["text"].items():
            gaps = [answer.first_and_later_gaps() for answer in answers]
            firsts, others = [1000 * first for first, _ in gaps], [1000 * later for _, later in gaps]
            limit = self._gap_at_most if judged and topology == "E+P+D" else None
            ratio, name = paired_ratio(others, firsts, seed=bench.seed), f"{label}, {topology}"
            outcome.figures += [
                Figure.of(f"{name}: gap of tokens 1 and 2 / later gaps", ratio, "x", at_most=limit),
                Figure(f"{name}: gap of tokens 1 and 2, median", median(firsts), "ms"),
                Figure(f"{name}: later gaps, median", median(others), "ms"),
            ]
            series += [
                Series(f"{topology}, 1 to 2", firsts, None if limit is None else limit * median(others)),
                Series(f"{topology}, later", others),
            ]
        outcome.panels.append(Panel(f"split: gaps of a {PROMPT_TOKENS}-token prompt, {label}", "ms", series))
