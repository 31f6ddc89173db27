"""Answers of the same requests through several topologies, token for token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from chiasm.bench.arrivals import at_most
from chiasm.bench.measurement import Bench
from chiasm.bench.outcome import Figure, Outcome
from chiasm.bench.requests import Request

AT_ONCE = 8
_SHOWN = 10

Answers = list[list[str]]
"""The tokens of each request's answer."""


async def ask_all(bench: Bench, url: str, bodies: Sequence[bytes]) -> Answers:
    """Send all, ``AT_ONCE`` at a time; bodies must ask for log probabilities, which have the tokens."""

    async def send(index: int) -> list[str]:
        _, _, answer = await bench.client.post(url, bodies[index])
        bench.advance()
        return [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]

    return await at_most(AT_ONCE, len(bodies), send)


def compare(
    outcome: Outcome,
    label: str,
    requests: Sequence[Request],
    by_topology: Mapping[str, Answers],
    references: Mapping[str, Answers],
) -> None:
    """Count and show the differences of each topology from each reference; any of them makes the outcome wrong.

    A topology that is itself a reference is not compared with itself. ``label`` says in the figures what was compared.
    """
    shown = 0
    for other, expected in references.items():
        for one, answers in by_topology.items():
            if one == other:
                continue
            together = list(zip(answers, expected, strict=True))
            differing = [index for index, (left, right) in enumerate(together) if left != right]
            outcome.figures.append(Figure(f"{label}, differ: {one} and {other}", len(differing), "", 0))
            outcome.wrong = outcome.wrong or bool(differing)
            for index in differing[: max(0, _SHOWN - shown)]:
                shown += 1
                left, right = together[index]
                outcome.notes.append(
                    f"request {index} ({requests[index].kind}, {requests[index].question!r}), {label}, {one} and {other}: "
                    f"{''.join(left)!r} and {''.join(right)!r}"
                )
    tokens = sum(map(len, next(iter(by_topology.values()))))
    outcome.notes.append(f"{label}: {len(requests)} requests, {AT_ONCE} at a time, {tokens} tokens a topology.")


def kinds(requests: Sequence[Request]) -> str:
    """A note of how many there are of each kind."""
    counted = Counter(request.kind for request in requests)
    return f"Of {len(requests)}: {', '.join(f'{number} {kind}' for kind, number in counted.items())}."
