"""Whether an image that was encoded once is as cheap as text for every PD."""

from __future__ import annotations

from chiasm.bench import prompts
from chiasm.bench.images import photo
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import encoder_and_pds, running
from chiasm.errors import ChiasmError
from chiasm.launch import Deployment
from chiasm.wire import Role

_AT_MOST = 1.2
_WARM_UP = 3
_QUESTION = "What is shown?"
_ANSWER_TOKENS = 2
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


class Reuse(Measurement):
    """An image goes to one PD, then to the other, then a text of as many tokens to each; all prompts are new to both."""

    name = "reuse"
    purpose = "A second request with the same image, to another PD, against text of the same length"
    target = f"no encode; time to first token at most {_AT_MOST} times the text's"

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(60, quick=3)
        firsts: list[float] = []
        seconds: list[float] = []
        of_text: list[float] = []
        async with running(bench, encoder_and_pds(bench.model, pds=2)) as (deployment,):
            texts = prompts.Texts(deployment.folder, bench.seed)
            extra = await self._template_tokens(bench, deployment, texts)
            bench.step("the same image, another PD")
            bench.total(rounds + _WARM_UP)
            before = await self._counts(bench, deployment)
            for index in range(-_WARM_UP, rounds):
                if index == 0:
                    before = await self._counts(bench, deployment)
                image = photo(f"reuse {bench.seed} {index}")
                body = prompts.ask([image], _QUESTION, max_tokens=_ANSWER_TOKENS, **_USAGE)
                first = await bench.client.chat(deployment.url, body)
                second = await bench.client.chat(deployment.url, body)
                text = texts.of(first.prompt_tokens - extra)
                words = [
                    await bench.client.chat(deployment.url, prompts.chat(content, max_tokens=_ANSWER_TOKENS, **_USAGE))
                    for content in (text, texts.of(first.prompt_tokens - extra))
                ]
                if {answer.prompt_tokens for answer in words} != {first.prompt_tokens}:
                    raise ChiasmError("the text and the image came to different numbers of tokens")
                if index >= 0:
                    firsts.append(1000 * first.ttft_seconds)
                    seconds.append(1000 * second.ttft_seconds)
                    # The PDs take turns, so the second text went where the second image did.
                    of_text.append(1000 * words[1].ttft_seconds)
                bench.advance()
            after = await self._counts(bench, deployment)
        encoded, *hits = (now - then for now, then in zip(after, before, strict=True))
        outcome = Outcome()
        outcome.figures += [
            Figure("encodes beyond one an image", encoded - rounds, "", 0),
            Figure.of(
                "second request / text of the same length",
                paired_ratio(of_text, seconds, seed=bench.seed),
                "x",
                at_most=_AT_MOST,
            ),
            Figure("first request, median", median(firsts), "ms"),
            Figure("second request, median", median(seconds), "ms"),
            Figure("text, median", median(of_text), "ms"),
        ]
        outcome.notes.append(
            f"{rounds} images, {encoded:.0f} encodes; embeddings found at once by the PDs: "
            + " and ".join(f"{number:.0f}" for number in hits)
        )
        outcome.panels.append(
            Panel(
                "reuse: time to first token",
                "ms",
                [
                    Series("first request", firsts),
                    Series("second request", seconds, _AT_MOST * median(of_text)),
                    Series("text of the same length", of_text),
                ],
            )
        )
        return outcome

    @staticmethod
    async def _template_tokens(bench: Bench, deployment: Deployment, texts: prompts.Texts) -> int:
        """Tokens that the chat template adds to a text."""
        tokens = 40
        answer = await bench.client.chat(deployment.url, prompts.chat(texts.of(tokens), max_tokens=1, **_USAGE))
        return answer.prompt_tokens - tokens

    @staticmethod
    async def _counts(bench: Bench, deployment: Deployment) -> list[float]:
        """Images that the encoder has encoded, then items that each PD found at once."""
        (encoder,) = deployment.urls(Role.ENCODER)
        counts = [(await bench.client.metrics(encoder))["chiasm_images_encoded_total"]]
        for url in deployment.urls(Role.PD):
            counts.append((await bench.client.metrics(url)).get('chiasm_items_total{outcome="hit"}', 0.0))
        return counts
