"""Tells language instances where the embeddings are that they need, or will be.

An encoder that serves embeddings from its memory has a place, which is known as soon as an image goes to it. The instances that
need the embedding are told then, before it is encoded, so that they can ask the encoder for it. An instance that can't be told
says that it awaits the embedding, by which the proxy finds it lost (:mod:`chiasm.proxy.lost_embeddings`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import msgspec

from chiasm.proxy.instance import Instance
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.upstream import Upstream, UpstreamError
from chiasm.tasks import Tasks
from chiasm.wire import MAX_PLACES, PLACES_PATH, ECPlace, EmbeddingPlaces, Role

_log = logging.getLogger(__name__)
_ATTEMPTS = 3
_MAX_WAITING = 16 * MAX_PLACES
"""Embeddings of which one instance isn't told yet; of further ones it isn't told at all."""
_MAX_RESPONSE_BYTES = 64 << 10


class _Desk:
    """What one instance is to be told."""

    def __init__(self) -> None:
        self.waiting: dict[str, ECPlace | None] = {}
        self.sending: Mapping[str, ECPlace | None] = {}


class Places:
    """Sends one message at a time to an instance, with all that came up meanwhile. Made and used on one event loop."""

    def __init__(self, upstream: Upstream, metrics: Metrics, *, timeout_seconds: float) -> None:
        """``timeout_seconds`` is for one message."""
        self._upstream = upstream
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds
        self._desks: WeakKeyDictionary[Instance, _Desk] = WeakKeyDictionary()
        """Of instances that don't know everything yet."""
        self._tasks = Tasks()

    async def close(self) -> None:
        await self._tasks.close()

    def tell(self, instance: Instance | None, places: Mapping[str, ECPlace | None]) -> None:
        """Tell an instance where embeddings are, by identifier; None stands for the fleet's shared cache. Returns at once.

        It replaces what the instance was told of them before. Nothing is sent if there is no instance, or one that reads no
        embeddings.
        """
        if not places or instance is None or not reads_embeddings(instance):
            return
        desk = self._desks.get(instance)
        if desk is None:
            desk = self._desks[instance] = _Desk()
            self._tasks.start(self._send_all(instance, desk))
        for name, place in places.items():
            if name in desk.waiting or len(desk.waiting) < _MAX_WAITING:
                desk.waiting[name] = place
            else:
                self._count("untold", 1)

    def untold(self, instance: Instance) -> frozenset[str]:
        """Return the embeddings of which an instance is being told and may not know yet."""
        desk = self._desks.get(instance)
        return frozenset() if desk is None else frozenset((*desk.waiting, *desk.sending))

    async def _send_all(self, instance: Instance, desk: _Desk) -> None:
        try:
            while desk.waiting:
                names = list(itertools.islice(desk.waiting, MAX_PLACES))
                desk.sending = {name: desk.waiting.pop(name) for name in names}
                problem = await self._send(instance, desk.sending)
                self._count("untold" if problem else "told", len(names))
                if problem:
                    _log.warning(
                        "%s %s could not be told where %d embedding(s) are: %s",
                        instance.role,
                        instance.url,
                        len(names),
                        problem,
                    )
        finally:
            self._desks.pop(instance, None)

    async def _send(self, instance: Instance, places: Mapping[str, ECPlace | None]) -> str:
        """Send one message; return why the instance hasn't taken it, or nothing."""
        message = EmbeddingPlaces(
            places={name: place for name, place in places.items() if place is not None},
            stored=[name for name, place in places.items() if place is None],
        )
        body = msgspec.json.encode(message)
        problem = ""
        for _ in range(_ATTEMPTS):
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    with await self._upstream.post(instance.url, PLACES_PATH, body, {}) as call:
                        await call.read(_MAX_RESPONSE_BYTES)
            except UpstreamError as error:
                problem = error.message
            except TimeoutError:
                problem = f"it took longer than {self._timeout_seconds:g} s."
            else:
                problem = "" if call.status < 300 else f"it answered with status {call.status}."
                if call.status < 500:
                    break
        return problem

    def _count(self, outcome: str, number: int) -> None:
        self._metrics.places.labels(outcome).inc(number)


def reads_embeddings(instance: Instance) -> bool:
    """Whether an instance reads embeddings. A decode instance does if it has a connector: vLLM's recomputes prompts itself."""
    if instance.role is Role.DECODE:
        return instance.health is not None and bool(instance.health.ec_connector)
    return instance.role in (Role.PD, Role.PREFILL)
