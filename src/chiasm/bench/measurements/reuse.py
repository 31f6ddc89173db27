"""Whether an image that was encoded once is encoded again when another PD prefills it."""

from __future__ import annotations

from typing import Any

from chiasm.bench.client import StreamedAnswer
from chiasm.bench.load import turns
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.requests import Texts, ask, chat, photo
from chiasm.bench.servers import chiasm_proxy
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import colocated, encoder_and_pds, on_vllm, running
from chiasm.errors import ChiasmError
from chiasm.launch import Deployment, DeploymentConfig, EngineKind
from chiasm.prometheus import total
from chiasm.wire import Role

_AT_MOST = 1.2
_WARM_UP = 3
_TEMPLATE_PROBE_TOKENS = 40
_USAGE: dict[str, Any] = {"max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
_EVERY_TOKEN: dict[str, Any] = {"max_tokens": 2, "stream": True, "ignore_eos": True, "logprobs": True}


class Reuse(Measurement):
    """An image is asked about twice, first at one PD and then at the other; with the built-in engine, a text with as many
    tokens then goes to the second PD.

    Each PD has a proxy of its own: one proxy would send the second request to the PD whose prefix cache holds the prompt.
    All prompts are new to the PD that gets them.
    """

    name = "reuse"

    def __init__(self, engine: EngineKind) -> None:
        self._over_vllm = engine is EngineKind.VLLM
        self.purpose = "A second request with the same image, to another PD"
        if self._over_vllm:
            self.target = "no encode for the second request, and each PD loads each image"
        else:
            self.purpose += ", against text of the same length"
            self.target = f"no encode for the second request; time to first token at most {_AT_MOST} times the text's"

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(40 if self._over_vllm else 60, quick=3)
        found: tuple[list[float], list[float], list[float]] = ([], [], [])
        async with running(bench, self._topology(bench.model)) as (deployment,):
            one, other = deployment.urls(Role.PD)
            async with (
                chiasm_proxy(bench, deployment, one) as to_one,
                chiasm_proxy(bench, deployment, other) as to_other,
            ):
                urls = (to_one, to_other)
                texts = None if self._over_vllm else await _EqualTexts.for_deployment(bench, deployment)
                bench.phase("the same image, another PD", rounds + _WARM_UP)
                for index in range(-_WARM_UP, rounds):
                    if index == 0:
                        before = await self._counts(bench, deployment)
                    body = ask([photo(f"reuse {bench.seed} {index}")], **(_EVERY_TOKEN if texts is None else _USAGE))
                    first, second = turns(index, 2)
                    answers = [await bench.client.chat(urls[which], body) for which in (first, second)]
                    if texts is not None:
                        answers.append(await texts.ask(urls[second], answers[0].prompt_tokens))
                    if index >= 0:
                        for taken, answer in zip(found, answers, strict=False):
                            taken.append(1000 * answer.ttft_seconds)
                    bench.advance()
                after = await self._counts(bench, deployment)
        encoded, *loaded = (now - then for now, then in zip(after, before, strict=True))
        return judge(*found, encoded=encoded, loaded=loaded, seed=bench.seed)

    def _topology(self, model: str) -> DeploymentConfig:
        if self._over_vllm:
            return on_vllm(encoder_and_pds(model, pds=2))
        return colocated(model, {Role.ENCODER: 1, Role.PD: 2})

    async def _counts(self, bench: Bench, deployment: Deployment) -> list[float]:
        """Return how many images the encoder has encoded, and how many embeddings each PD has loaded or found at once."""
        (encoder,) = deployment.urls(Role.ENCODER)
        at_encoder = await bench.client.metrics(encoder)
        at_pds = [await bench.client.metrics(url) for url in deployment.urls(Role.PD)]
        if self._over_vllm:
            encoded = total(at_encoder, "vllm:chiasm_ec_saves_total")
            loaded = [total(one, "vllm:chiasm_ec_loads_total") for one in at_pds]
        else:
            encoded = total(at_encoder, "chiasm_images_encoded_total")
            loaded = [total(one, "chiasm_items_total", outcome="hit") for one in at_pds]
        return [encoded or 0.0, *(number or 0.0 for number in loaded)]


class _EqualTexts:
    """Texts whose prompts have as many tokens as another prompt."""

    def __init__(self, bench: Bench, deployment: Deployment) -> None:
        self._bench = bench
        self._texts = Texts(deployment.folder, bench.seed)
        self._template_tokens = 0

    @classmethod
    async def for_deployment(cls, bench: Bench, deployment: Deployment) -> _EqualTexts:
        """Find out how many tokens the chat template adds to a text."""
        texts = cls(bench, deployment)
        probe = await texts._chat(deployment.url, _TEMPLATE_PROBE_TOKENS)
        texts._template_tokens = probe.prompt_tokens - _TEMPLATE_PROBE_TOKENS
        return texts

    async def ask(self, url: str, prompt_tokens: int) -> StreamedAnswer:
        """Send ``url`` a new text whose prompt has ``prompt_tokens`` tokens. Raises ChiasmError if it turns out otherwise."""
        answer = await self._chat(url, prompt_tokens - self._template_tokens)
        if answer.prompt_tokens != prompt_tokens:
            raise ChiasmError("The prompts with the text and with the image have different numbers of tokens.")
        return answer

    async def _chat(self, url: str, tokens: int) -> StreamedAnswer:
        return await self._bench.client.chat(url, chat(self._texts.of(tokens), **_USAGE))


def judge(
    first: list[float], second: list[float], of_text: list[float], *, encoded: float, loaded: list[float], seed: int
) -> Outcome:
    """Return the outcome for times to first token in milliseconds. Without those of texts, each PD must load each image.

    ``loaded`` has the number of embeddings that each PD loaded.
    """
    rounds = len(first)
    outcome = Outcome()
    outcome.figures.append(Figure("encodes beyond one per image", encoded - rounds, "", 0))
    series = [Series("first request", first), Series("second request", second)]
    if of_text:
        ratio = paired_ratio(of_text, second, seed=seed)
        outcome.figures.append(Figure.of("second request / text of the same length", ratio, "x", at_most=_AT_MOST))
        series = [series[0], Series("second request", second, _AT_MOST * median(of_text)), Series("text", of_text)]
    else:
        missing = 2 * rounds - sum(min(one, rounds) for one in loaded)
        outcome.figures.append(Figure("images that a PD did not load", missing, "", 0))
        ratio = paired_ratio(first, second, seed=seed)
        outcome.figures.append(Figure.of("first token: second request / first", ratio, "x"))
    outcome.figures += [Figure(f"{one.label}, median", median(one.values), "ms") for one in series]
    numbers = " and ".join(f"{number:.0f}" for number in loaded)
    how = "found at once" if of_text else "loaded"
    outcome.notes.append(f"{rounds} images, {encoded:.0f} encodes; the PDs {how} {numbers} embeddings.")
    outcome.panels.append(Panel("reuse: time to first token", "ms", series))
    return outcome
