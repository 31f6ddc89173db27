"""What it costs to bring a prompt's KV from the instance that prefilled it to the one that decodes."""

from __future__ import annotations

import asyncio

from chiasm.bench import prompts
from chiasm.bench.checkpoints import synthetic
from chiasm.bench.handover_gap import PROMPT_TOKENS, HandoverParts
from chiasm.bench.measurement import Bench, Measurement
from chiasm.bench.outcome import Figure, Outcome, Panel, Series
from chiasm.bench.statistics import median, median_of, paired_ratio
from chiasm.bench.topology import NIXL, NO_NIXL, SHARED_MEMORY, kv_connectors, prefill_and_decode, running
from chiasm.wire import Role

_MEGABYTE = 1_000_000
_LARGEST = "1 GB"
_SIZES_BYTES = {"1 MB": _MEGABYTE, "10 MB": 10 * _MEGABYTE, "100 MB": 100 * _MEGABYTE, _LARGEST: 1000 * _MEGABYTE}
_BLOCK_BYTES = 1 << 16
"""As small as those of the shipped checkpoint; a block of a model of billions of parameters has a megabyte or two."""
_REPEATS = 5
_LEAST_SPEEDS = {SHARED_MEMORY: 0.7, NIXL: 0.8}
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
    """Transfers by themselves, then requests through P and D, one at a time.

    ``chiasm.kv_transfer.transfer_benchmark`` says how transfers are measured.
    """

    name = "kv"
    purpose = "Speed at which KV moves, and where the time from prefill's last layer to decode's first step goes"
    target = (
        f"{SHARED_MEMORY} at least {_LEAST_SPEEDS[SHARED_MEMORY]} of the speed of one memcpy, {NIXL} "
        f"{_LEAST_SPEEDS[NIXL]} of that of NIXL alone: at most "
        + " and ".join(f"{1 / speed:.2f}" for speed in _LEAST_SPEEDS.values())
        + " times their time"
    )

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        for connector in kv_connectors():
            await _transfer(bench, connector, outcome)
        for connector in kv_connectors():
            await _hand_over(bench, connector, outcome)
        if NIXL not in kv_connectors():
            outcome.notes.append(NO_NIXL)
        return outcome


async def _transfer(bench: Bench, connector: str, outcome: Outcome) -> None:
    """Blocks alone, in rounds: each makes two caches anew and takes the median of a few transfers of each size."""
    from chiasm.kv_transfer.transfer_benchmark import TransferResult, measure_transfers

    rounds, labels = bench.samples(5, quick=2), list(_SIZES_BYTES)
    if bench.quick or not _has_room(_SIZES_BYTES[_LARGEST]):
        labels.remove(_LARGEST)
        if not bench.quick:
            outcome.notes.append(f"{connector}: {_LARGEST} is left out, there isn't enough free memory for it.")
    found: dict[str, list[TransferResult]] = {label: [] for label in labels}
    bench.step(f"{connector}, transfers")
    bench.total(rounds)
    for _ in range(rounds):
        sizes = [_SIZES_BYTES[label] for label in labels]
        results = await asyncio.to_thread(measure_transfers, connector, sizes, _BLOCK_BYTES, _REPEATS)
        for label, result in zip(labels, results, strict=True):
            found[label].append(result)
        bench.advance()
    name, allowed = connector.removesuffix("Connector"), 1 / _LEAST_SPEEDS[connector]
    series: list[Series] = []
    for label, results in found.items():
        copies, memcpys = [one.copy_seconds for one in results], [one.memcpy_seconds for one in results]
        bare = [one.bare_nixl_seconds for one in results if one.bare_nixl_seconds is not None]
        for other, seconds, is_judged in (
            ("one memcpy", memcpys, connector == SHARED_MEMORY),
            ("NIXL alone", bare, True),
        ):
            if seconds:
                ratio = paired_ratio(seconds, copies, seed=bench.seed)
                limit = allowed if is_judged else None
                outcome.figures.append(Figure.of(f"{name}, {label}: copy / {other}", ratio, "x", at_most=limit))
                milliseconds = [1000 * value for value in seconds]
                outcome.figures.append(Figure(f"{name}, {label}: {other}, median", median(milliseconds), "ms"))
                series.append(Series(f"{label}, {other}", milliseconds))
        transfers = [1000 * one.transfer_seconds for one in results]
        outcome.figures += [
            Figure(f"{name}, {label}: copy, median", 1000 * median(copies), "ms"),
            Figure(f"{name}, {label}: copy, claim and confirmation, median", median(transfers), "ms"),
        ]
        limit = allowed * 1000 * median(bare or memcpys)
        series += [
            Series(f"{label}, copy", [1000 * value for value in copies], limit),
            Series(f"{label}, with claim", transfers),
        ]
    outcome.panels.append(Panel(f"kv: transfers, {connector}", "ms", series, logarithmic=True))


def _has_room(size_bytes: int) -> bool:
    """For two caches of that size and the memory that memcpy reads, with some to spare."""
    import psutil

    return int(psutil.virtual_memory().available) > 4 * size_bytes


async def _hand_over(bench: Bench, connector: str, outcome: Outcome) -> None:
    """Where the time between P and D goes in real requests."""
    rounds, warm_up = bench.samples(40, quick=3), _QUICK_WARM_UP if bench.quick else _WARM_UP
    found: list[HandoverParts] = []
    config = prefill_and_decode(await synthetic(bench), encoders=0, kv_connector=connector)
    async with running(bench, config) as (deployment,):
        texts = prompts.Texts(deployment.folder, bench.seed)
        (decode,) = deployment.urls(Role.DECODE)
        bench.step(f"{connector}, {PROMPT_TOKENS} tokens")
        bench.total(rounds + warm_up)
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
