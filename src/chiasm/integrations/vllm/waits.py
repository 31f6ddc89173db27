"""How long requests have waited for embeddings, as the engine tells vLLM's HTTP server.

A request's waits go with its first output and with its last (``outputs.py``): a stream is told at the first, a whole answer has
only the last. Until the server has asked for them, nothing is noted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from chiasm.integrations.vllm.outputs import WAITS, tell

_MAX_WAITS = 16
"""Of a request, that are told."""


class Wait(NamedTuple):
    """One wait of a request. Seconds on the engine's clock."""

    began: float
    ended: float
    item: int
    """Index of the item that it waited for."""


class Waits:
    """The waits of the requests that an engine has."""

    def __init__(self) -> None:
        self.are_wanted = False
        """Whether the server has asked for them."""
        self._begun: dict[str, tuple[float, int]] = {}
        self._ended: dict[str, list[Wait]] = {}
        self._untold: set[str] = set()

    def begin(self, request_id: str, item: int, now: float) -> None:
        """Note that a request can't go on without an item."""
        if not self.are_wanted:
            return
        begun = self._begun.get(request_id)
        if begun is None or begun[1] != item:
            self.end(request_id, now)
            self._begun[request_id] = now, item

    def end(self, request_id: str, now: float) -> None:
        """Note that it can."""
        begun = self._begun.pop(request_id, None)
        if begun is None:
            return
        waits = self._ended.setdefault(request_id, [])
        if len(waits) < _MAX_WAITS:
            waits.append(Wait(begun[0], now, begun[1]))
            self._untold.add(request_id)

    def tell(self, outputs: Iterable[Any]) -> None:
        """Put waits into the outputs (vLLM's ``EngineCoreOutputs``) of those requests that have waited since they were told."""
        if self._untold:
            tell(outputs, WAITS, self._news_of)

    def _news_of(self, output: Any) -> list[Wait] | None:
        if output.request_id not in self._untold:
            return None
        self._untold.discard(output.request_id)
        return self._ended[output.request_id]

    def finish(self, request_id: str) -> list[Wait]:
        """Forget a request, and return its waits."""
        self._begun.pop(request_id, None)
        self._untold.discard(request_id)
        return self._ended.pop(request_id, [])
