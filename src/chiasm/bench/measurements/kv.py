"""What it costs to move a prompt's KV from the instance that prefilled it to the one that decodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prometheus_client.samples import Sample

from chiasm.bench.checkpoints import synthetic
from chiasm.bench.client import StreamedAnswer
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.measurements.latency import PROMPT_TOKENS
from chiasm.bench.requests import Texts, stream
from chiasm.bench.statistics import median, median_of, paired_ratio
from chiasm.bench.topology import NIXL, NO_NIXL, SHARED_MEMORY, kv_connectors, prefill_and_decode, running
from chiasm.errors import ChiasmError
from chiasm.memory import free_memory
from chiasm.prometheus import total
from chiasm.wire import Role

_MEGABYTE = 1_000_000
_LARGEST = "1 GB"
_SIZES_BYTES = {"1 MB": _MEGABYTE, "10 MB": 10 * _MEGABYTE, "100 MB": 100 * _MEGABYTE, _LARGEST: 1000 * _MEGABYTE}
_BLOCK_BYTES = 1 << 16
"""As small as the blocks of the shipped checkpoint; those of models of billions of parameters have a megabyte or two."""
_REPEATS = 5
_TCP = "TcpConnector"
_LEAST_SPEEDS = {SHARED_MEMORY: 0.7, NIXL: 0.8}
_WARM_UP = 3
_QUICK_WARM_UP = 1
_ANSWER_TOKENS = 8
_CLAIM, _TRANSFER = "chiasm_kv_claim_seconds_total", "chiasm_kv_transfer_seconds_total"


class Kv(Measurement):
    """Transfers by themselves, then requests through P and D, one at a time.

    ``kv_transfers.measure_transfers`` says how transfers are measured.
    """

    name = "kv"
    purpose = "Speed at which KV moves, and where the time between prefill's last layer and decode's first step goes"
    target = (
        f"{SHARED_MEMORY} at least {_LEAST_SPEEDS[SHARED_MEMORY]} of the speed of one memcpy, which is "
        f"{1 / _LEAST_SPEEDS[SHARED_MEMORY]:.2f} times its time; {NIXL} at least {_LEAST_SPEEDS[NIXL]} of the speed of NIXL "
        f"alone, which is {1 / _LEAST_SPEEDS[NIXL]:.2f} times its time"
    )

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        connectors = (*kv_connectors(), _TCP)
        for connector in connectors:
            await _transfer(bench, connector, outcome)
        for connector in connectors:
            await _hand_over(bench, connector, outcome)
        if NIXL not in kv_connectors():
            outcome.notes.append(NO_NIXL)
        return outcome


async def _transfer(bench: Bench, connector: str, outcome: Outcome) -> None:
    """Measure blocks alone, in rounds: each makes two new caches and takes the median of a few transfers of each size."""
    from chiasm.bench.measurements.kv_transfers import TransferResult, measure_transfers

    rounds, labels = bench.samples(5, quick=2), list(_SIZES_BYTES)
    if bench.quick or not _has_room(_SIZES_BYTES[_LARGEST]):
        labels.remove(_LARGEST)
        if not bench.quick:
            outcome.notes.append(f"{connector}: {_LARGEST} is left out, because there isn't enough free memory.")
    found: dict[str, list[TransferResult]] = {label: [] for label in labels}
    bench.phase(f"{connector}, transfers", rounds)
    for _ in range(rounds):
        sizes = [_SIZES_BYTES[label] for label in labels]
        results = await asyncio.to_thread(measure_transfers, connector, sizes, _BLOCK_BYTES, _REPEATS)
        for label, result in zip(labels, results, strict=True):
            found[label].append(result)
        bench.advance()
    name, least = connector.removesuffix("Connector"), _LEAST_SPEEDS.get(connector)
    allowed = None if least is None else 1 / least
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
        limit = None if allowed is None else allowed * 1000 * median(bare or memcpys)
        series += [
            Series(f"{label}, copy", [1000 * value for value in copies], limit),
            Series(f"{label}, with claim", transfers),
        ]
    outcome.panels.append(Panel(f"kv: transfers, {connector}", "ms", series, logarithmic=True))


def _has_room(size_bytes: int) -> bool:
    """Tell whether two caches of that size and the memory that memcpy reads fit, with some to spare."""
    return free_memory() > 4 * size_bytes


async def _hand_over(bench: Bench, connector: str, outcome: Outcome) -> None:
    """Measure where the time between P and D goes in real requests."""
    rounds, warm_up = bench.samples(40, quick=3), _QUICK_WARM_UP if bench.quick else _WARM_UP
    found: list[dict[str, float]] = []
    config = prefill_and_decode(await synthetic(bench), encoders=0, kv_connector=connector)
    async with running(bench, config) as (deployment,):
        texts = Texts(deployment.folder, bench.seed)
        (decode,) = deployment.urls(Role.DECODE)
        bench.phase(f"{connector}, {PROMPT_TOKENS} tokens", rounds + warm_up)
        for index in range(-warm_up, rounds):
            before = await bench.client.metrics(decode)
            answer = await bench.client.chat(deployment.url, stream(texts.of(PROMPT_TOKENS), _ANSWER_TOKENS))
            after = await bench.client.metrics(decode)
            if index >= 0:
                found.append(handover_parts(answer, before, after))
            bench.advance()
    series = []
    for label in found[0]:
        milliseconds = [1000 * parts[label] for parts in found]
        estimate = median_of(milliseconds, seed=bench.seed)
        outcome.figures.append(Figure.of(f"{connector.removesuffix('Connector')}: {label}", estimate, "ms"))
        series.append(Series(label, milliseconds))
    outcome.panels.append(Panel(f"kv: from P to D, {PROMPT_TOKENS} tokens, {connector}", "ms", series))


def handover_parts(answer: StreamedAnswer, before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, float]:
    """Return the gap between tokens one and two, and what it consists of, in seconds.

    ``before`` and ``after`` are D's metrics before and after the answer. Client, proxy and instances measure their parts on
    clocks of their own, so the time of P's handle may be below 0. Raises ChiasmError if D had no part in the answer.
    """
    at_p, at_d = answer.timing_at_start, answer.timing
    if "handover" not in at_d or "kv" not in at_d:
        raise ChiasmError("An answer was not handed over from a prefill to a decode instance.")
    (gap, later), handover = answer.first_and_later_gaps(), at_d["handover"]
    prefill = sum(at_p.get(name, 0.0) for name in ("queue", "wait", "transfer", "prefill"))
    claim, copy = ((total(after, name) or 0.0) - (total(before, name) or 0.0) for name in (_CLAIM, _TRANSFER))
    return {
        "gap of tokens 1 and 2": gap,
        # The gap is the sum of these five. The first is from P's token to the end of P's response, less the way of D's token
        # through the proxy; the second is the part of the proxy's call of D that D doesn't account for.
        "P: handle after token": gap - handover,
        "proxy: call of D": handover - at_d["ttft"],
        "D: wait for blocks": at_d["queue"],
        "D: wait for KV": at_d["kv"],
        "D: read, first step": at_d["ttft"] - at_d["queue"] - at_d["kv"],
        "D: later steps": later,
        # The claim begins before D waits for blocks; only its end may be part of the wait for KV, as all of the copy is.
        "D: claim": claim,
        "D: copy": copy,
        # Before the gap, and without prefill itself.
        "P: read, token out": at_p["ttft"] - prefill,
    }
