"""What it costs a single request that its prefill and its decode are two processes."""

from __future__ import annotations

from chiasm.bench import prompts
from chiasm.bench.checkpoints import synthetic
from chiasm.bench.client import Answer
from chiasm.bench.handover_gap import PROMPT_TOKENS, first_and_later_gaps
from chiasm.bench.images import photo
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import encoder_and_pds, prefill_and_decode, running

_TTFT_AT_MOST = 1.05
_GAP_AT_MOST = 3.0
_WARM_UP = 3
_QUICK_WARM_UP = 1
_QUESTION = "What is shown?"
_ANSWER_TOKENS = 24
_LABELS = ("E+PD", "E+P+D")


class Split(Measurement):
    """One request at a time, the same to both topologies, which take turns in who is first."""

    name = "split"
    purpose = "E+P+D against E+PD on an idle machine: time to first token of one image, and the gap that follows it"
    target = (
        f"time to first token at most {_TTFT_AT_MOST} times E+PD's; between tokens one and two of a {PROMPT_TOKENS}-token "
        f"prompt at most {_GAP_AT_MOST:g} times the median of the gaps after"
    )

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        label = bench.model.rstrip("/").rpartition("/")[2]
        await self._compare(bench, bench.model, label, outcome, judged=False)
        await self._compare(bench, await synthetic(bench), "synthetic", outcome, judged=True)
        outcome.notes.append(
            "The synthetic checkpoint is judged: a small one's tokens come faster than processes can talk to each other."
        )
        return outcome

    @staticmethod
    async def _compare(bench: Bench, model: str, label: str, outcome: Outcome, *, judged: bool) -> None:
        pairs, warm_up = bench.samples(60, quick=3), _QUICK_WARM_UP if bench.quick else _WARM_UP
        async with running(bench, encoder_and_pds(model), prefill_and_decode(model)) as deployments:
            urls = [deployment.url for deployment in deployments]
            texts = prompts.Texts(deployments[0].folder, bench.seed)

            def image_body(index: int) -> bytes:
                image = photo(f"split {bench.seed} {label} {index}")
                return prompts.ask([image], _QUESTION, max_tokens=2, stream=True, ignore_eos=True)

            def text_body(index: int) -> bytes:
                return prompts.stream(texts.of(PROMPT_TOKENS), _ANSWER_TOKENS)

            found: dict[str, list[list[Answer]]] = {"image": [[], []], "text": [[], []]}
            for kind, body_of in (("image", image_body), ("text", text_body)):
                bench.step(f"{label}, {kind}")
                bench.total(pairs + warm_up)
                for index in range(-warm_up, pairs):
                    body = body_of(index)
                    for which in (0, 1) if index % 2 else (1, 0):
                        answer = await bench.client.chat(urls[which], body)
                        if index >= 0:
                            found[kind][which].append(answer)
                    bench.advance()
        _report_ttft(outcome, label, found["image"], bench.seed, judged=judged)
        _report_gap(outcome, label, found["text"], bench.seed, judged=judged)


def _report_ttft(outcome: Outcome, label: str, found: list[list[Answer]], seed: int, *, judged: bool) -> None:
    whole, apart = ([1000 * answer.ttft_seconds for answer in answers] for answers in found)
    limit = _TTFT_AT_MOST if judged else None
    outcome.figures += [
        Figure.of(
            f"{label}, image, first token: E+P+D / E+PD", paired_ratio(whole, apart, seed=seed), "x", at_most=limit
        ),
        Figure(f"{label}, image, first token: E+PD, median", median(whole), "ms"),
        Figure(f"{label}, image, first token: E+P+D, median", median(apart), "ms"),
    ]
    series = [Series("E+PD", whole), Series("E+P+D", apart, None if limit is None else limit * median(whole))]
    outcome.panels.append(Panel(f"split: image, first token, {label}", "ms", series))


def _report_gap(outcome: Outcome, label: str, found: list[list[Answer]], seed: int, *, judged: bool) -> None:
    series: list[Series] = []
    for topology, answers in zip(_LABELS, found, strict=True):
        pairs = [first_and_later_gaps(answer) for answer in answers]
        firsts = [1000 * first for first, _ in pairs]
        others = [1000 * other for _, other in pairs]
        limit = _GAP_AT_MOST if judged and topology == "E+P+D" else None
        outcome.figures += [
            Figure.of(
                f"{label}, {topology}: gap of tokens 1 and 2 / later gaps",
                paired_ratio(others, firsts, seed=seed),
                "x",
                at_most=limit,
            ),
            Figure(f"{label}, {topology}: gap of tokens 1 and 2, median", median(firsts), "ms"),
            Figure(f"{label}, {topology}: later gaps, median", median(others), "ms"),
        ]
        series += [
            Series(f"{topology}, 1 to 2", firsts, None if limit is None else limit * median(others)),
            Series(f"{topology}, later", others),
        ]
    outcome.panels.append(Panel(f"split: gaps of a {PROMPT_TOKENS}-token prompt, {label}", "ms", series))
