"""Whether an image that was encoded once is encoded again when another vLLM prefills it."""

from __future__ import annotations

from chiasm.bench import prompts
from chiasm.bench.client import total
from chiasm.bench.images import photo
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_ratio
from chiasm.bench.topology import encoder_and_pds, running
from chiasm.bench.vllm import on_vllm
from chiasm.launch import Deployment
from chiasm.launch.config import EngineKind
from chiasm.wire import Role

_WARM_UP = 2
_QUESTION = "What is shown?"
_COUNTERS = "vllm:chiasm_ec_"


class VllmReuse(Measurement):
    """Each image is asked about twice, one request after the other; the proxy's two PDs take turns."""

    name = "vllm-reuse"
    purpose = "A second request with the same image, to another PD, over vLLM"
    target = "no encode for it, and each PD loads each image"
    engine = EngineKind.VLLM

    async def run(self, bench: Bench) -> Outcome:
        rounds = bench.samples(40, quick=3)
        found: list[list[float]] = [[], []]
        async with running(bench, on_vllm(encoder_and_pds(bench.model, pds=2))) as (deployment,):
            bench.step("the same image, another PD")
            bench.total(rounds + _WARM_UP)
            before = await _counts(bench, deployment)
            for index in range(-_WARM_UP, rounds):
                if index == 0:
                    before = await _counts(bench, deployment)
                image = photo(f"vllm-reuse {bench.seed} {index}")
                body = prompts.ask([image], _QUESTION, max_tokens=2, stream=True, ignore_eos=True, logprobs=True)
                for times in found:
                    answer = await bench.client.chat(deployment.url, body)
                    if index >= 0:
                        times.append(1000 * answer.ttft_seconds)
                bench.advance()
            after = await _counts(bench, deployment)
        encoded, *loaded = (now - then for now, then in zip(after, before, strict=True))
        return judged(found, rounds, encoded=encoded, loaded=loaded, seed=bench.seed)


async def _counts(bench: Bench, deployment: Deployment) -> list[float]:
    """Embeddings that the encoder has made, then those that each PD has read from the store."""
    (encoder,) = deployment.urls(Role.ENCODER)
    made = total(await bench.client.metrics(encoder), f"{_COUNTERS}saves_total")
    read = [total(await bench.client.metrics(url), f"{_COUNTERS}loads_total") for url in deployment.urls(Role.PD)]
    return [made, *read]


def judged(found: list[list[float]], rounds: int, *, encoded: float, loaded: list[float], seed: int) -> Outcome:
    """``found``: milliseconds of the first and of the second requests; ``loaded``: embeddings that each PD has read."""
    first, second = found
    outcome = Outcome()
    outcome.figures += [
        Figure("encodes beyond one an image", encoded - rounds, "", 0),
        Figure("images that a PD did not load", 2 * rounds - sum(min(one, rounds) for one in loaded), "", 0),
        Figure.of("first token: second request / first", paired_ratio(first, second, seed=seed), "x"),
        Figure("first request, median", median(first), "ms"),
        Figure("second request, median", median(second), "ms"),
    ]
    outcome.notes.append(
        f"{rounds} images, {encoded:.0f} encodes; embeddings read by the PDs: "
        + " and ".join(f"{number:.0f}" for number in loaded)
    )
    series = [Series("first request", first), Series("second request", second)]
    outcome.panels.append(Panel("vllm-reuse: time to first token", "ms", series))
    return outcome
