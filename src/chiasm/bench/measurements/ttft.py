"""What it costs a single image that its encoder is another process."""

from __future__ import annotations

from chiasm.bench import prompts
from chiasm.bench.checkpoints import synthetic
from chiasm.bench.images import photo
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import aggregated, encoder_and_pds, running

_AT_MOST = 1.10
_WARM_UP = 3
_QUESTION = "What is shown?"
_TEXT_TOKENS = 64
_ANSWER_TOKENS = 2


class Ttft(Measurement):
    """One request at a time, the same to both topologies, which take turns in who is first."""

    name = "ttft"
    purpose = "Time to first token of one image on an idle machine: E+PD against aggregated"
    target = f"at most {_AT_MOST} times aggregated, same threads"

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        await self._compare(bench, bench.model, bench.model.rstrip("/").rpartition("/")[2], outcome)
        await self._compare(bench, await synthetic(bench), "synthetic", outcome)
        outcome.notes.append(
            "The synthetic checkpoint takes the image as 256 tokens; other checkpoints may scale it down first."
        )
        return outcome

    async def _compare(self, bench: Bench, model: str, label: str, outcome: Outcome) -> None:
        pairs = bench.samples(60, quick=3)
        async with running(bench, aggregated(model), encoder_and_pds(model)) as deployments:
            urls = [deployment.url for deployment in deployments]
            texts = prompts.Texts(deployments[0].folder, bench.seed)
            for kind, limit in (("image", _AT_MOST), ("text", None)):
                bench.step(f"{label}, {kind}")
                bench.total(pairs + _WARM_UP)
                found: list[list[float]] = [[], []]
                for index in range(-_WARM_UP, pairs):
                    if kind == "image":
                        image = photo(f"ttft {bench.seed} {label} {index}")
                        body = prompts.ask([image], _QUESTION, max_tokens=_ANSWER_TOKENS, stream=True)
                    else:
                        body = prompts.chat(texts.of(_TEXT_TOKENS), max_tokens=_ANSWER_TOKENS, stream=True)
                    for which in (0, 1) if index % 2 else (1, 0):
                        answer = await bench.client.chat(urls[which], body)
                        if index >= 0:
                            found[which].append(1000 * answer.ttft_seconds)
                    bench.advance()
                self._report(outcome, label, kind, found, limit, bench.seed)

    @staticmethod
    def _report(
        outcome: Outcome, label: str, kind: str, found: list[list[float]], limit: float | None, seed: int
    ) -> None:
        before, after = found
        outcome.figures += [
            Figure.of(
                f"{label}, {kind}: E+PD / aggregated", paired_ratio(before, after, seed=seed), "x", at_most=limit
            ),
            Figure(f"{label}, {kind}: aggregated, median", median(before), "ms"),
            Figure(f"{label}, {kind}: E+PD, median", median(after), "ms"),
        ]
        outcome.panels.append(
            Panel(
                f"ttft: {kind}, {label}",
                "ms",
                [
                    Series("aggregated", before),
                    Series("E+PD", after, None if limit is None else limit * median(before)),
                ],
            )
        )
