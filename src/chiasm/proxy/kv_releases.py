"""KV that no decode instance will come for: the prefill instance that holds it is told, so that its blocks are free at once.

A client may leave between prefill and decode, or the deadline may pass there. Best effort: what a prefill instance isn't told,
it holds until its lease ends.
"""

from __future__ import annotations

import asyncio
import logging
from weakref import WeakKeyDictionary

import msgspec

from chiasm.proxy.instance import Instance
from chiasm.proxy.job import Job
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.upstream import Upstream, UpstreamError
from chiasm.tasks import Tasks
from chiasm.wire import KV_RELEASE_PATH, MAX_RELEASED, KVRelease

_log = logging.getLogger(__name__)
_ATTEMPTS = 2
_MAX_WAITING = 16 * MAX_RELEASED
"""Leases of one instance that wait to be given back; further ones end by themselves."""
_MAX_RESPONSE_BYTES = 64 << 10
_CLOSE_SECONDS = 1.0


class KVReleases:
    """Gives leases back, those of one instance together and in one call at a time. Made and used on one event loop."""

    def __init__(self, upstream: Upstream, metrics: Metrics, *, timeout_seconds: float) -> None:
        """``timeout_seconds`` is for one call."""
        self._upstream = upstream
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds
        self._waiting: WeakKeyDictionary[Instance, dict[str, str]] = WeakKeyDictionary()
        """The leases that are to be given back, each with the ``Authorization`` of its request."""
        self._tasks = Tasks()

    async def close(self) -> None:
        """Send what waits, if that takes no longer than a second."""
        await self._tasks.close(patience_seconds=_CLOSE_SECONDS)

    def give_back(self, instance: Instance, lease: str, job: Job) -> None:
        """Have a lease of a request ended at this prefill instance; returns at once."""
        is_sending = instance in self._waiting
        waiting = self._waiting.setdefault(instance, {})
        if len(waiting) < _MAX_WAITING:
            waiting[lease] = job.exchange.headers.get("authorization", "")
        if not is_sending:
            self._tasks.start(self._send_all(instance, waiting))

    async def _send_all(self, instance: Instance, waiting: dict[str, str]) -> None:
        try:
            while waiting:
                leases = list(waiting)[:MAX_RELEASED]
                authorization = waiting[leases[0]]  # as good as any other: the instance has accepted all of them
                for lease in leases:
                    del waiting[lease]
                await self._send(instance, leases, {"Authorization": authorization} if authorization else {})
        finally:
            self._waiting.pop(instance, None)

    async def _send(self, instance: Instance, leases: list[str], headers: dict[str, str]) -> None:
        body = msgspec.json.encode(KVRelease(leases=leases))
        for _ in range(_ATTEMPTS):
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    with await self._upstream.post(instance.url, KV_RELEASE_PATH, body, headers) as call:
                        await call.read(_MAX_RESPONSE_BYTES)
            except (UpstreamError, TimeoutError):
                continue
            if call.status < 300:
                self._metrics.leases_given_back.inc(len(leases))
            else:
                _log.debug("%s answers %d when KV is given back.", instance.url, call.status)
            return
        _log.info("%s could not be told that nobody fetches the KV of %d requests.", instance.url, len(leases))
