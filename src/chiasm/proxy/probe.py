"""Asks instances how they are, at intervals and whenever a connection to one fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import msgspec

from chiasm.errors import ChiasmError
from chiasm.proxy.fleet import Fleet, Instance
from chiasm.proxy.upstream import (
    NoResponseInTimeError,
    UnreachableError,
    Upstream,
    UpstreamError,
    UpstreamResponse,
)
from chiasm.wire import UNREADABLE, Health, InstanceState, ModelList

_log = logging.getLogger(__name__)
_MAX_RESPONSE_BYTES = 1 << 20
_SHOWN_CHARACTERS = 200
_WAITING_INTERVAL_SECONDS = 0.25
"""Between probes of an instance that isn't healthy, so that it is used as soon as it is."""
_MISSES = 2
"""Unanswered probes in a row that make a healthy instance unhealthy: on a busy machine, one may come late."""


_health = msgspec.json.Decoder(Health)
_models = msgspec.json.Decoder(ModelList)


class Prober:
    """One task per instance; each tells the fleet what it finds."""

    def __init__(
        self,
        fleet: Fleet,
        upstream: Upstream,
        *,
        interval_seconds: float,
        timeout_seconds: float,
        key: str | None = None,
    ) -> None:
        """``key`` is the API key with which instances are asked what only they say who have one."""
        self._fleet = fleet
        self._upstream = upstream
        self._interval_seconds = interval_seconds
        self._timeout_seconds = timeout_seconds
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}
        self._watches: dict[Instance, asyncio.Task[None]] = {}
        self._checks: dict[Instance, asyncio.Task[None]] = {}
        fleet.on_remove = self.forget

    def watch(self, instance: Instance) -> None:
        """Probe it at intervals from now on."""
        if instance not in self._watches:
            self._watches[instance] = asyncio.create_task(self._watch(instance))

    def forget(self, instance: Instance) -> None:
        """Stop probing it."""
        for tasks in (self._watches, self._checks):
            if task := tasks.pop(instance, None):
                task.cancel()

    async def close(self) -> None:
        tasks = [*self._watches.values(), *self._checks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def lost(self, instance: Instance, error: ChiasmError) -> bool:
        """Probe an instance to which a call failed; if it is unreachable, it is unhealthy at once.

        Return whether it is healthy all the same: an idle connection was closed, or it has been restarted.
        """
        if isinstance(error, UnreachableError):
            self._fail(instance, error.message)
        if running := self._checks.get(instance):
            await asyncio.wait({running})  # its response may be older than the failure
        await self.check(instance)
        return instance.state is InstanceState.HEALTHY

    async def check(self, instance: Instance) -> None:
        """Probe it now; simultaneous callers share one probe."""
        task = self._checks.get(instance)
        if task is None:
            task = self._checks[instance] = asyncio.create_task(self._check(instance))
            task.add_done_callback(lambda done: self._checks.pop(instance, None))
        await asyncio.wait({task})

    async def _watch(self, instance: Instance) -> None:
        while True:
            await self.check(instance)
            absent = instance.state in {InstanceState.STARTING, InstanceState.UNHEALTHY}
            await asyncio.sleep(
                min(self._interval_seconds, _WAITING_INTERVAL_SECONDS) if absent else self._interval_seconds
            )

    async def _check(self, instance: Instance) -> None:
        before = instance.state
        try:
            health, models = await self._ask(instance.url)
        except NoResponseInTimeError as error:
            instance.missed_probes += 1
            if instance.missed_probes >= _MISSES or instance.state is not InstanceState.HEALTHY:
                self._fail(instance, error.message)
            return
        except UpstreamError as error:
            self._fail(instance, error.message)
            return
        instance.missed_probes = 0
        self._fleet.succeed(instance, health, models)
        if instance.state is not before:
            _log.info("%s %s is %s%s", instance.role, instance.url, instance.state, _because(instance))

    def _fail(self, instance: Instance, reason: str) -> None:
        before = instance.state
        self._fleet.fail(instance, reason)
        if instance.state is not before:
            _log.warning("%s %s is %s%s", instance.role, instance.url, instance.state, _because(instance))

    async def _ask(self, url: str) -> tuple[Health, tuple[str, ...]]:
        """Return an instance's health and the names that it serves. Raises UpstreamError if it isn't healthy."""
        response = await self._get(f"{url}/health")
        if response.status != 200:
            raise UpstreamError(f"/health answered with status {response.status}{_explanation(response.body)}")
        if not response.body.strip():
            return await self._ask_models(url)
        try:
            health = _health.decode(response.body)
        except UNREADABLE as error:
            raise UpstreamError(f"/health answered with an unexpected body: {error}") from error
        if health.status != "ok":
            raise UpstreamError(f"/health reports the status {health.status[:40]!r}")
        if not health.model:
            raise UpstreamError("/health doesn't name the model")
        return health, (health.model,)

    async def _ask_models(self, url: str) -> tuple[Health, tuple[str, ...]]:
        """The same of vLLM without chiasm's middleware, whose /health is empty."""
        response = await self._get(f"{url}/v1/models", self._authorization)
        if response.status == 401:
            raise UpstreamError("/v1/models needs an API key; give the proxy one with --api-key")
        try:
            models = [model for model in _models.decode(response.body).data if model.id]
        except UNREADABLE:
            models = []
        if response.status != 200 or not models:
            raise UpstreamError("/v1/models names no model")
        health = Health(model=models[0].id, takes_image_size=False, max_model_len=models[0].max_model_len)
        return health, tuple(model.id for model in models)

    async def _get(self, url: str, headers: Mapping[str, str] | None = None) -> UpstreamResponse:
        return await self._upstream.get(
            url, timeout_seconds=self._timeout_seconds, max_bytes=_MAX_RESPONSE_BYTES, headers=headers
        )


def _explanation(body: bytes) -> str:
    """What an instance says about why it isn't healthy."""
    try:
        health = _health.decode(body)
    except UNREADABLE:
        return ""
    status = health.status if health.status != "ok" else ""
    text = ": ".join(part for part in (status, health.message) if part)
    return f" ({text[:_SHOWN_CHARACTERS]})" if text else ""


def _because(instance: Instance) -> str:
    return f": {instance.reason}" if instance.reason else ""
