"""How a connector tells the scheduler that an entry has arrived."""

from __future__ import annotations

from typing import Protocol


class Wake(Protocol):
    """Has the scheduler look for entries again. Any thread may call it; it returns at once and raises nothing."""

    def __call__(self, arrived: str = "", /) -> None:
        """``arrived`` is the identifier of the entry that has arrived; without it, the scheduler asks for all it needs."""
