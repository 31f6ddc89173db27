"""What is wrong with a machine or a configuration, and what to do about it.

A check that instances make when they start, and that ``chiasm doctor`` makes too, is one function that returns findings: the
instance raises an error with their messages, and the doctor reports them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    problem: str
    """What is wrong: begins with a capital letter or a path, and has no full stop."""
    advice: str
    """What to do about it, as an imperative: begins with a lower-case letter, and has no full stop."""

    @property
    def message(self) -> str:
        """Both as one sentence."""
        return f"{self.problem}; {self.advice}."
