"""What checks have found, as tests look at it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from chiasm.doctor import Finding, Verdict


async def collected(findings: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in findings]


def verdicts(findings: Iterable[Finding], check: str | None = None) -> list[str]:
    return [one.verdict.value for one in findings if check in (None, one.check)]


def the_one(findings: Iterable[Finding], verdict: Verdict) -> Finding:
    """The only finding with this verdict."""
    (found,) = [one for one in findings if one.verdict is verdict]
    return found


def problem(findings: Iterable[Finding]) -> Finding:
    """The only problem, which says why it is one and what to do."""
    found = the_one(findings, Verdict.PROBLEM)
    assert found.why
    assert found.do
    return found


def warning(findings: Iterable[Finding]) -> Finding:
    """The only warning, which says why it is one and what to do."""
    found = the_one(findings, Verdict.WARNING)
    assert found.why
    assert found.do
    return found
