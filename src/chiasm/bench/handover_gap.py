"""The gap between the tokens of prefill and of decode, and what it consists of, in one streamed answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chiasm.bench.client import Answer
from chiasm.bench.statistics import median
from chiasm.errors import ChiasmError

PROMPT_TOKENS = 1000
"""Of the requests that the gap is measured with."""
_CLAIM, _TRANSFER = "chiasm_kv_claim_seconds_total", "chiasm_kv_transfer_seconds_total"


@dataclass(frozen=True)
class HandoverParts:
    """Seconds. Client, proxy and instances each measure their own, on clocks of their own, so ``handle`` may be below 0."""

    gap: float
    """Between tokens one and two, for the client: ``handle``, ``call``, ``queue``, ``load`` and ``step`` together."""
    handle: float
    """From P's token to the end of its answer, which is the handle; less the way of D's token through the proxy."""
    call: float
    """The proxy's call of D, as far as D doesn't have it: from the handle to D, and D's answer back."""
    queue: float
    """D: until it has blocks."""
    load: float
    """D: until their KV is there, from then on."""
    step: float
    """D: reading the request, and the first step."""
    later: float
    """For comparison: the median of the gaps after, each a step without anything else."""
    claim: float
    """D: from the request to P's permission. It begins before the queue, and only its end may be in ``load``."""
    copy: float
    """D: from the first to the last byte, in ``load``."""
    first_token: float
    """P, before the gap: reading the request, and from the end of prefill until the token is out."""

    @classmethod
    def of(cls, answer: Answer, before: Mapping[str, float], after: Mapping[str, float]) -> HandoverParts:
        """``before`` and ``after`` the request: D's metrics. Raises ChiasmError if D had no part in the answer."""
        at_p, at_d = answer.timing_at_start, answer.timing
        if "handover" not in at_d or "kv" not in at_d:
            raise ChiasmError("an answer was not handed over from a prefill to a decode instance")
        (gap, later), handover = first_and_later_gaps(answer), at_d["handover"]
        prefill = sum(at_p.get(name, 0.0) for name in ("queue", "wait", "transfer", "prefill"))
        return cls(
            gap=gap,
            handle=gap - handover,
            call=handover - at_d["ttft"],
            queue=at_d["queue"],
            load=at_d["kv"],
            step=at_d["ttft"] - at_d["queue"] - at_d["kv"],
            later=later,
            claim=after[_CLAIM] - before[_CLAIM],
            copy=after[_TRANSFER] - before[_TRANSFER],
            first_token=at_p["ttft"] - prefill,
        )


def first_and_later_gaps(answer: Answer) -> tuple[float, float]:
    """Seconds between tokens one and two, and the median of those between all others. Raises ChiasmError."""
    first, *others = answer.gaps_seconds
    if len(others) < 2:
        raise ChiasmError(f"an answer came in {len(answer.token_times)} events, too few to compare their distances")
    return first, median(others)
