"""Whether instances can join and leave a running fleet without any request failing."""

from __future__ import annotations

from chiasm.bench import requests
from chiasm.bench.churn import Churned, churning
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.statistics import median, quantile
from chiasm.bench.synthetic import make
from chiasm.wire import Role

_CHANGES, _QUICK_CHANGES = 1000, 12
_CLIENTS = 4
FLEETS = ((Role.ENCODER, Role.PREFILL, Role.DECODE), (Role.ENCODER, Role.PD, Role.AGGREGATED))
"""All roles, in fleets of both kinds."""
_SIDE = 96
_TOKENS = 24
_SHOWN = 10


class ChurnMeasurement(Measurement):
    """Joins an instance and drains another one of its role, of all roles in turn, while clients ask; in two fleets, one after
    the other."""

    name = "churn"
    purpose = "1 000 instances join and 1 000 drain, of all roles, while clients ask through two proxies"
    target = "no request fails, no answer differs; an instance that is ready is used within a second"
    only_by_name = True

    async def run(self, bench: Bench) -> Outcome:
        changes = bench.samples(_CHANGES, quick=_QUICK_CHANGES)
        model = make("qwen3_vl", bench.scratch / "churn")
        found = Churned()
        for roles in FLEETS:
            names = ", ".join(roles)
            bench.phase(f"starting a fleet that can be changed: {names}")
            async with churning(model, bench.client, bench.forks, roles=roles, proxies=2, each=2) as churn:
                part = changes // len(FLEETS)
                bench.phase(f"joins and drains: {names}", part)
                found.add(await churn.run(part, bodies(bench.seed), _CLIENTS, bench.advance))
        return judge(found)


def bodies(seed: int) -> list[bytes]:
    """Return what clients ask: text and images, whole answers and streams."""
    content = [
        requests.ask([requests.photo(f"churn {seed} {number}", _SIDE)], max_tokens=_TOKENS, ignore_eos=True)
        for number in range(3)
    ]
    streamed = [requests.stream(f"{number}: tell me more.", _TOKENS) for number in range(3)]
    return [body for pair in zip(content, streamed, strict=True) for body in pair]


def judge(found: Churned) -> Outcome:
    """Return the outcome."""
    outcome = Outcome(wrong=bool(found.differences))
    outcome.figures = [
        Figure("requests that failed", len(found.failures), at_most=0),
        Figure("answers that differ", len(found.differences), at_most=0),
        Figure("instances that ended with another exit code than 0", sum(map(bool, found.exit_codes)), at_most=0),
        Figure("answers", found.answers),
        Figure("joins and drains", len(found.exit_codes)),
        Figure("from ready to used, 99th percentile", 1000 * quantile(found.join_seconds, 0.99), "ms", at_most=1000),
        Figure("from ready to used, median", 1000 * median(found.join_seconds), "ms"),
        Figure("drain, median", 1000 * median(found.drain_seconds), "ms"),
        Figure("drain, longest", 1000 * max(found.drain_seconds), "ms"),
    ]
    steps = {"from ready to used": found.join_seconds, "drain": found.drain_seconds}
    series = [Series(label, [1000 * value for value in values]) for label, values in steps.items()]
    outcome.panels.append(Panel("churn", "ms", series, logarithmic=True))
    outcome.notes += [f"A request failed: {message}" for message in found.failures[:_SHOWN]]
    outcome.notes += [f"An answer differs, {difference}." for difference in found.differences[:_SHOWN]]
    return outcome
