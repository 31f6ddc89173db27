"""What computing each prompt has cost one of vLLM's engines, told with the outputs of its request.

A step computes rows of several prompts, and decodes other requests. What it takes longer than one that only decodes as many is
the cost of its prompts, and each has the share of its rows. So a prompt costs the same whatever runs beside it, and proxies can
learn from that what a prompt costs here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from chiasm.engine.pace import Undisturbed
from chiasm.integrations.vllm.outputs import PREFILL_WORK, tell

_FORGOTTEN_AT = 64
"""Requests beyond those that the scheduler has of which something is remembered: they have ended without an output."""


class PromptWork:
    """The cost of prompts in one engine, in seconds."""

    def __init__(self) -> None:
        self.is_wanted = False
        """Whether the server has asked for it."""
        self._decoding: dict[int, Undisturbed] = {}
        """What steps take that only decode, by powers of two of their requests."""
        self._begun: dict[str, float] = {}
        self._computed: dict[str, float] = {}
        """Those that are computed, until the request ends."""
        self._untold: set[str] = set()

    def note(self, rows: Mapping[str, int], decodes: int, seconds: float, computed: Iterable[str]) -> None:
        """Note a step with so many rows of each prompt, which also decoded; ``computed`` prompts have their first token."""
        if not self.is_wanted:
            return
        if not rows:
            if decodes:
                self._decoding.setdefault(decodes.bit_length(), Undisturbed()).note(seconds)
            return
        per_row = max(0.0, seconds - self._decode_seconds(decodes)) / sum(rows.values())
        for request_id, number in rows.items():
            if request_id not in self._computed:  # one that was preempted is computed again
                self._begun[request_id] = self._begun.get(request_id, 0.0) + number * per_row
        for request_id in computed:
            if request_id in self._begun:
                self._computed[request_id] = self._begun.pop(request_id)
                self._untold.add(request_id)

    def tell(self, outputs: Iterable[Any]) -> None:
        """Put costs into the first output and the last one (of vLLM's ``EngineCoreOutputs``) of each request."""
        if self._computed:
            tell(outputs, PREFILL_WORK, self._news_of)

    def _news_of(self, output: Any) -> float | None:
        request_id = output.request_id
        if output.finished:
            self._untold.discard(request_id)
            return self._computed.pop(request_id, None)
        if request_id not in self._untold:
            return None
        self._untold.discard(request_id)
        return self._computed[request_id]

    def forget_others(self, requests: Mapping[str, object]) -> None:
        """Forget requests that are not among these any more, once there are many."""
        if len(self._begun) + len(self._computed) > len(requests) + _FORGOTTEN_AT:
            self._begun = _among(requests, self._begun)
            self._computed = _among(requests, self._computed)
            self._untold.intersection_update(self._computed)

    def _decode_seconds(self, decodes: int) -> float:
        """Return what a step takes that only decodes so many requests; of the nearest number that is known, or 0."""
        if not decodes or not self._decoding:
            return 0.0
        wanted = decodes.bit_length()
        return self._decoding[min(self._decoding, key=lambda known: abs(known - wanted))].value


def _among(requests: Container[str], costs: Mapping[str, float]) -> dict[str, float]:
    return {request_id: cost for request_id, cost in costs.items() if request_id in requests}
