"""What it costs to bring a prompt's KV from the instance that prefilled it to the one that decodes."""

from __future__ import annotations

from chiasm.bench import prompts
from chiasm.bench.checkpoints import synthetic
from chiasm.bench.handover_gap import PROMPT_TOKENS, HandoverParts
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median_of
from chiasm.bench.topology import NIXL, NO_NIXL, kv_connectors, prefill_and_decode, running
from chiasm.engine.config import Role

_WARM_UP = 3
_QUICK_WARM_UP = 1
_ANSWER_TOKENS = 8
_PARTS = {
    "gap": "gap of tokens 1 and 2",
    "handle": "P's handle after its token",
    "call": "proxy calls D",
    "queue": "D waits for blocks",
    "load": "D waits for KV",
    "step": "D reads, first step",
    "later": "D's later steps",
    "claim": "D's claim",
    "copy": "D's copying",
    "first_token": "P reads, token out",
}


class Kv(Measurement):
    """Transfers by themselves, then requests through P and D, one at a time."""

    name = "kv"
    purpose = "Where the time from prefill's last layer to decode's first step goes"
    target = "none of its own: split has the one for all of it"

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        for connector in kv_connectors():
            await _hand_over(bench, connector, outcome)
        if NIXL not in kv_connectors():
            outcome.notes.append(NO_NIXL)
        return outcome


async def _hand_over(bench: Bench, connector: str, outcome: Outcome) -> None:
    """Where the time between P and D goes in real requests."""
    rounds, warm_up = bench.samples(40, quick=3), _QUICK_WARM_UP if bench.quick else _WARM_UP
    found: list[HandoverParts] = []
    config = prefill_and_decode(await synthetic(bench), encoders=0, kv_connector=connector)
    async with running(bench, config) as (deployment,):
        texts = prompts.Texts(deployment.folder, bench.seed)
        (decode,) = deployment.urls(Role.DECODE)
        bench.step(f"{connector}, {PROMPT_TOKENS} tokens")
        bench.total(rounds)
        for index in range(-warm_up, rounds):
            before = await bench.client.metrics(decode)
            answer = await bench.client.chat(deployment.url, prompts.stream(texts.of(PROMPT_TOKENS), _ANSWER_TOKENS))
            after = await bench.client.metrics(decode)
            if index >= 0:
                found.append(HandoverParts.of(answer, before, after))
            bench.advance()
    series = []
    for part, label in _PARTS.items():
        milliseconds = [1000 * float(getattr(one, part)) for one in found]
        estimate = median_of(milliseconds, seed=bench.seed)
        outcome.figures.append(Figure.of(f"{connector.removesuffix('Connector')}: {label}", estimate, "ms"))
        series.append(Series(label, milliseconds))
    outcome.panels.append(Panel(f"kv: from P to D, {PROMPT_TOKENS} tokens, {connector}", "ms", series))
