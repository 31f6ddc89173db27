"""What a connector has to know of memory: how a producer offers its blocks, and how a consumer reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence


class OfferedMemory(ABC):
    """A producer's blocks, for all its consumers."""

    progress_seconds: float | None = None
    """How often the transport wants :meth:`progress` while somebody may be reading; None if it never does."""

    @abstractmethod
    def description(self) -> bytes:
        """What a consumer needs to reach the blocks; it goes into the handshake, and holds for the producer's life."""

    def progress(self) -> None:
        """Do the producer's part of transfers that consumers have begun. Called on the control thread alone."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Offer the blocks no longer. Called once, when nobody claims them any more."""


class ReachedMemory(ABC):
    """One producer's blocks, as a consumer reaches them."""

    @abstractmethod
    def read(self, local: Sequence[int], remote: Sequence[int], stop: Callable[[], bool]) -> bool:
        """Copy block ``remote[i]`` of the producer to block ``local[i]`` here; returns when nothing is written any more.

        Called on several transfer threads at once, for ids that exist. False: ``stop`` said so, and some blocks may
        be missing; it is asked every few megabytes. Raises KVUnavailableError when this producer's blocks can't be read
        any more, these or others.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the producer's memory. Called once, when nobody reads."""
