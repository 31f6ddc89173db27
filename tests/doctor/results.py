"""Results of checks, as tests look at them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from chiasm.doctor import Result, Verdict


async def collected(results: AsyncIterator[Result]) -> list[Result]:
    return [result async for result in results]


def verdicts(results: Iterable[Result], check: str | None = None) -> list[str]:
    return [one.verdict.value for one in results if check in (None, one.check)]


def the_one(results: Iterable[Result], verdict: Verdict) -> Result:
    """Return the only result with this verdict."""
    (found,) = [one for one in results if one.verdict is verdict]
    return found


def problem(results: Iterable[Result]) -> Result:
    """Return the only problem, which says why it is one and what to do."""
    found = the_one(results, Verdict.PROBLEM)
    assert found.why
    assert found.do
    return found


def warning(results: Iterable[Result]) -> Result:
    """Return the only warning, which says why it is one and what to do."""
    found = the_one(results, Verdict.WARNING)
    assert found.why
    assert found.do
    return found
