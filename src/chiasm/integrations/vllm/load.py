"""What an instance of vLLM tells proxies about its load, which its engines know (``work.py``)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from chiasm.integrations.vllm.engines import ask_engines
from chiasm.integrations.vllm.messages import LOAD_METHOD
from chiasm.wire import Load

_logger = logging.getLogger(__name__)
_WAIT_SECONDS = 0.05
"""How long a question to the engines is waited for; an engine answers between two steps."""


class ToldLoad:
    """The load of all engines of an instance as they last told it. On the event loop of the server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told = Load()
        self._told_at = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._has_failed = False

    def last(self) -> Load:
        """Return what was told last. What it says of time has passed since then."""
        seconds = self._told.outstanding_seconds - (self._clock() - self._told_at)
        return replace(self._told, outstanding_seconds=max(0.0, seconds))

    async def ask(self, state: Any) -> None:
        """Ask the engines of vLLM's application with this ``state``, and give them a moment to answer.

        An answer that comes later counts when it has come.
        """
        if self._has_failed:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(state))
        await asyncio.wait({self._asking}, timeout=_WAIT_SECONDS)

    async def _ask(self, state: Any) -> None:
        try:
            answers = await ask_engines(state, LOAD_METHOD)
        except Exception as error:  # vLLM's own, such as that of an engine that has no such method, or is dead
            self._has_failed = True
            _logger.warning(
                "This instance doesn't tell proxies how much work it has, so that several don't see each other's: %s. Is "
                "chiasm among VLLM_PLUGINS?",
                error,
            )
            return
        self._told, self._told_at = _sum([msgspec.json.decode(answer, type=Load) for answer in answers]), self._clock()


def _sum(loads: Sequence[Load]) -> Load:
    blocks = [load.kv_blocks_free for load in loads if load.kv_blocks_free is not None]
    return Load(
        outstanding_seconds=sum(load.outstanding_seconds for load in loads),
        kv_blocks_free=sum(blocks) if blocks else None,
    )
