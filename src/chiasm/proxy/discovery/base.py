"""The interface of what finds instances for a proxy, besides options and leases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from chiasm.wire import Role

MAX_LISTED = 1024
"""Instances that one source may list."""


class Found(NamedTuple):
    """One instance that a source lists."""

    url: str
    role: Role | None = None
    """None if the source doesn't know it; then the instance is asked."""
    is_ending: bool = False
    """Whether it is about to end, so that it gets no new work."""


Tell = Callable[[Sequence[Found]], None]


class Source(ABC):
    """Lists instances, and says so again whenever the list has changed.

    The proxy makes it from an argument of ``--discover`` and runs it on its event loop. What a source lists belongs to the
    fleet; what it lists no more is removed when its last call has ended. Probes say which instances work, not the source.
    """

    keeps = False
    """Whether what it lists no more stays until it is unhealthy, because the source may be wrong for a while."""

    def __init__(self, argument: str) -> None:
        self.name = argument
        """The argument, which names the source in logs and in /instances."""

    @abstractmethod
    async def run(self, tell: Tell) -> None:
        """Call ``tell`` with all instances, at first and after each change, until cancelled.

        While nothing can be learned, it logs why, calls ``tell`` no more, and tries again.
        """
