"""What vLLM's HTTP server asks its engines, which run in other processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any

import msgspec

from chiasm.integrations.vllm.messages import AWAITED_METHOD, LOST_METHOD, MISSING_METHOD, UNFETCHED_METHOD
from chiasm.integrations.vllm.settings import settings_of

_logger = logging.getLogger(__name__)
_LOOK_SECONDS = 0.05
_ALIVE_SECONDS = 0.5
"""From one look whether an engine that has not answered is alive to the next."""


async def ask_engines(state: Any, method: str, *arguments: str) -> list[Any]:
    """Call a method of all engines; return what each answers. ``state`` is that of vLLM's application.

    Raises vLLM's error of a dead engine also if one dies before it has answered. vLLM itself lets such a call wait for ever,
    and its server doesn't end before it has answered all that it was asked.
    """
    client = state.engine_client
    asking = asyncio.ensure_future(_asked(client.engine_core, method, *arguments))
    try:
        while not (await asyncio.wait({asking}, timeout=_ALIVE_SECONDS))[0]:
            if client.errored:
                raise client.dead_error
        return asking.result()
    finally:
        asking.cancel()


async def _asked(core: Any, method: str, *arguments: str) -> list[Any]:
    if hasattr(core, "call_utility_all_async"):
        answers: list[Any] = await core.call_utility_all_async(method, *arguments)
        return answers
    return [await core.call_utility_async(method, *arguments)]


async def awaited_embeddings(state: Any) -> list[str]:
    """Return the identifiers that requests need next and that are neither in memory nor on their way, each once.

    It is as of some moment after the call, and waits for the end of a step.
    """
    awaited = await ask_engines(state, AWAITED_METHOD)
    if not any(awaited):
        return []
    missing = await ask_engines(state, MISSING_METHOD)  # what came meanwhile isn't on its way any more either
    named = ({*names}.intersection(still) for names, still in zip(awaited, missing, strict=True))
    return sorted(frozenset().union(*named))


async def lost_embeddings(state: Any, asker: str, published: Collection[str]) -> list[str]:
    """Return which of these embeddings requests need next that are neither in memory nor on their way, once there are any.

    For an instance with one engine: of several, the one that has nothing to say would hold back the others. Cancelling it ends
    the question at the engine, for which vLLM has no way of its own.
    """
    asking = asyncio.ensure_future(ask_engines(state, LOST_METHOD, asker, _json(published)))
    try:
        (lost,) = await asyncio.shield(asking)
    except asyncio.CancelledError:
        await ask_engines(state, LOST_METHOD, asker, _json(()))
        await asking
        raise
    return list(lost)


def _json(names: Collection[str]) -> str:
    return msgspec.json.encode(list(names)).decode()


def has_several_servers(state: Any) -> bool:
    """Whether other API servers share the engines."""
    return (getattr(state.args, "api_server_count", None) or 1) > 1


async def others_have_fetched(state: Any) -> None:
    """Return when nobody has anything to fetch from the engines any more. Nothing may run in them, and nothing new may come.

    An engine has work as long as its KV connector holds the KV of a finished request, until a decode instance has fetched it or
    its lease is over; a pause that waits for all work is vLLM's own way to wait for that. It is left out if other API servers
    share the engines, since it would stop what they have queued. An engine that fails has nothing to fetch.
    """
    try:
        if settings_of(state.vllm_config) is not None:
            while any(await ask_engines(state, UNFETCHED_METHOD)):  # noqa: ASYNC110, what it waits for is in another process
                await asyncio.sleep(_LOOK_SECONDS)
        if not has_several_servers(state):
            await state.engine_client.pause_generation(mode="wait", clear_cache=False)
    except Exception as error:  # vLLM's own, such as that of a dead engine; the server ends all the same
        _logger.warning("Others may not have fetched all that this instance holds for them: %r", error)
