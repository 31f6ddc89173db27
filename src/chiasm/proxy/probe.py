"""Asks instances how they are: at intervals, whenever a connection to one fails, and when one that has work is quiet.

A frozen instance takes connections and requests and never answers, as does one behind a network that drops everything. So a
connection proves nothing. Only what an instance sends does: an answer to a probe, or a byte of any other answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from chiasm.errors import ChiasmError, Code
from chiasm.fleet_key import FleetKey
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.upstream import (
    NoResponseInTimeError,
    UnreachableError,
    Upstream,
    UpstreamError,
    UpstreamResponse,
)
from chiasm.tasks import end_tasks
from chiasm.wire import DRAINING, UNREADABLE, Health, InstanceState, ModelList, Role

_log = logging.getLogger(__name__)
_MAX_RESPONSE_BYTES = 1 << 20
_SHOWN_CHARACTERS = 200
_WAITING_INTERVAL_SECONDS = 0.25
"""Between probes of an instance that isn't healthy, so that it is used as soon as it is."""
_PROBES = 2
"""Unanswered in a row, they show that an instance is gone: on a busy machine, one may come late."""
_QUIET_SECONDS = 0.5
"""An instance that has work and has sent nothing for so long is probed at once."""
_TICK_SECONDS = 0.1
_LEAVING = (DRAINING, "stopping")
"""The second is what versions before 0.4 say."""


class UnhealthyError(UpstreamError):
    """An instance has answered that it isn't healthy."""

    def __init__(self, message: str, health: Health) -> None:
        super().__init__(message)
        self.says_starting = health.status == Code.STARTING
        self.says_draining = health.status in _LEAVING
        self.incarnation = health.incarnation


_health = msgspec.json.Decoder(Health)
_models = msgspec.json.Decoder(ModelList)


class Prober:
    """One task per instance; each tells the fleet what it finds."""

    def __init__(
        self,
        fleet: Fleet,
        upstream: Upstream,
        metrics: Metrics,
        *,
        interval_seconds: float,
        timeout_seconds: float,
        busy_timeout_seconds: float,
        key: Callable[[], str] = lambda: "",
    ) -> None:
        """``key`` returns the API key with which instances are asked now what they tell only those who have one."""
        self._fleet = fleet
        self._upstream = upstream
        self._metrics = metrics
        self._interval_seconds = interval_seconds
        self._timeout_seconds = timeout_seconds
        self._busy_timeout_seconds = busy_timeout_seconds
        self._key = key
        self._watches: dict[Instance, asyncio.Task[None]] = {}
        self._checks: dict[Instance, asyncio.Task[None]] = {}
        self._urgent: set[Instance] = set()
        """Instances whose state a call waits for."""
        fleet.on_add = self.watch
        fleet.on_remove = self.forget
        fleet.listeners.append(_log_change)

    def watch(self, instance: Instance) -> None:
        """Probe it at intervals from now on."""
        if instance not in self._watches:
            self._watches[instance] = asyncio.create_task(self._watch(instance))

    def forget(self, instance: Instance) -> None:
        """Stop probing it."""
        _log.info("%s %s is removed", instance.role, instance.url)
        self._upstream.forget(instance.url)
        for tasks in (self._watches, self._checks):
            if task := tasks.pop(instance, None):
                task.cancel()

    async def close(self) -> None:
        await end_tasks(*self._watches.values(), *self._checks.values())

    async def lost(self, instance: Instance, error: ChiasmError) -> bool:
        """Probe an instance to which a call failed; if it is unreachable, it is unhealthy at once.

        Return whether it is healthy all the same: an idle connection was closed, or it has been restarted.
        """
        if instance.is_silent:
            return False  # which is why the call failed
        if isinstance(error, UnreachableError):
            self._fleet.fail(instance, error.message, time.monotonic())
        self._urgent.add(instance)
        try:
            if running := self._checks.get(instance):
                await asyncio.wait({running})  # its response may be older than the failure
            if not instance.is_silent:
                await self.check(instance)
        finally:
            self._urgent.discard(instance)
        return instance.state is InstanceState.HEALTHY

    async def check(self, instance: Instance) -> None:
        """Probe it now; simultaneous callers share one probe."""
        task = self._checks.get(instance)
        if task is None:
            task = self._checks[instance] = asyncio.create_task(self._check(instance))
            task.add_done_callback(lambda done: self._checks.pop(instance, None))
        await asyncio.wait({task})

    async def role_at(self, url: str) -> Role:
        """Return the role that what answers at a URL says it has. Raises UpstreamError."""
        response = await self._get(f"{url}/health")
        try:
            return Role(_health.decode(response.body).role)
        except (*UNREADABLE, ValueError):
            raise UpstreamError("/health doesn't say its role") from None

    async def _watch(self, instance: Instance) -> None:
        while True:
            await self.check(instance)
            waited = 0.0
            # Looked at again and again: a call may show meanwhile that it is lost.
            while (left := self._interval(instance) - waited) > 0:
                await asyncio.sleep(min(left, _TICK_SECONDS))
                waited += _TICK_SECONDS

    def _interval(self, instance: Instance) -> float:
        """Return the seconds from one probe to the next."""
        if instance.state in {InstanceState.STARTING, InstanceState.UNHEALTHY} or instance.says_draining:
            return min(self._interval_seconds, _WAITING_INTERVAL_SECONDS)
        return min(self._interval_seconds, _TICK_SECONDS) if self._is_quiet(instance) else self._interval_seconds

    def _is_quiet(self, instance: Instance) -> bool:
        """Whether it has work, and has sent nothing lately."""
        line = self._upstream.line(instance.url)
        return len(line) > 0 and time.monotonic() - line.heard_at > _QUIET_SECONDS

    async def _check(self, instance: Instance) -> None:
        line = self._upstream.line(instance.url)
        try:
            health, models = await self._answer(instance)
        except NoResponseInTimeError as error:
            now = time.monotonic()
            silent_seconds = now - line.heard_at
            is_silent = silent_seconds >= self._busy_timeout_seconds
            self._fleet.fail(instance, error.message, now, is_silent=is_silent)
            # Where its work can't go elsewhere, nothing is won by ending it early: it may only be busy.
            can_wait = not self._fleet.has_substitute(instance) and silent_seconds < _PROBES * self._timeout_seconds
            if is_silent and not can_wait and (ended := line.break_off()):
                self._metrics.calls_given_up.inc(ended)
                _log.warning("%s %s has sent nothing; its %d calls are ended", instance.role, instance.url, ended)
            return
        except UnhealthyError as error:
            self._fleet.fail(
                instance,
                error.message,
                time.monotonic(),
                says_starting=error.says_starting,
                says_draining=error.says_draining,
                incarnation=error.incarnation,
            )
            line.hear()
            return
        except UpstreamError as error:
            self._fleet.fail(instance, error.message, time.monotonic())
            return
        line.hear()
        line.clock.set(health.clock_milliseconds)
        if instance.is_silent and instance.seen_healthy:
            self._metrics.instances_returned.labels(instance.role.value).inc()
            _log.warning(
                "%s %s responds again after %.1f s: it was frozen, cut off or too slow, but not restarted",
                instance.role,
                instance.url,
                time.monotonic() - (instance.lost_at or 0.0),
            )
        self._fleet.succeed(instance, health, models)

    async def _answer(self, instance: Instance) -> tuple[Health, tuple[str, ...]]:
        """Return what it answers to one of two probes, of which the second is sent when the first isn't answered in time.

        Raises UpstreamError if it isn't healthy, NoResponseInTimeError if neither is answered in time.
        """
        probes = [asyncio.ensure_future(self._ask(instance.url))]
        waited = 0.0
        try:
            while True:
                began = time.monotonic()
                done, _ = await asyncio.wait(probes, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return done.pop().result()
                # When this process itself stood still, the answers may be there unread.
                waited += min(time.monotonic() - began, 2 * _TICK_SECONDS)
                timeout = self._timeout(instance)
                if waited < timeout:
                    continue
                if len(probes) == _PROBES:
                    raise NoResponseInTimeError(f"no response to {_PROBES} probes within {timeout:g} s each")
                probes.append(asyncio.ensure_future(self._ask(instance.url)))
                waited = 0.0
        finally:
            await end_tasks(*probes)

    def _timeout(self, instance: Instance) -> float:
        is_urgent = instance in self._urgent or self._is_quiet(instance)
        return self._busy_timeout_seconds if is_urgent else self._timeout_seconds

    async def _ask(self, url: str) -> tuple[Health, tuple[str, ...]]:
        """Return an instance's health and the names that it serves. Raises UpstreamError if it isn't healthy."""
        response = await self._get(f"{url}/health")
        if response.status != 200:
            raise _unhealthy(response)
        if not response.body.strip():
            return await self._ask_models(url)
        try:
            health = _health.decode(response.body)
        except UNREADABLE as error:
            raise UpstreamError(f"/health answered with an unexpected body: {error}") from error
        if health.status != "ok":
            raise UnhealthyError(f"/health reports the status {health.status[:40]!r}", health)
        if not health.model:
            raise UpstreamError("/health doesn't name the model")
        if mismatch := _mismatch(self._upstream.fleet_key, health):
            raise UpstreamError(mismatch)
        return health, (health.model,)

    async def _ask_models(self, url: str) -> tuple[Health, tuple[str, ...]]:
        """The same of vLLM without chiasm's middleware, whose /health is empty."""
        key = self._key()
        response = await self._get(f"{url}/v1/models", {"Authorization": f"Bearer {key}"} if key else None)
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
        return await self._upstream.get(url, max_bytes=_MAX_RESPONSE_BYTES, headers=headers)


def _mismatch(key: FleetKey | None, health: Health) -> str | None:
    """Return why an instance would refuse what this proxy signs; None if it wouldn't."""
    if not health.fleet_keys or (key is not None and key.names[0] in health.fleet_keys):
        return None
    what = "it has a fleet key, and this proxy has none" if key is None else "it has another fleet key than this proxy"
    return f"{what}; give both the same with --fleet-key-file"


def _unhealthy(response: UpstreamResponse) -> UnhealthyError:
    """Return the error for an instance that says that it isn't healthy, with its explanation."""
    try:
        health = _health.decode(response.body)
    except UNREADABLE:
        health = Health()
    status = health.status if health.status != "ok" else ""
    text = ": ".join(part for part in (status, health.message) if part)
    explanation = f" ({text[:_SHOWN_CHARACTERS]})" if text else ""
    return UnhealthyError(f"/health answered with status {response.status}{explanation}", health)


def _log_change(instance: Instance) -> None:
    level = logging.INFO if instance.state in {InstanceState.HEALTHY, InstanceState.DRAINING} else logging.WARNING
    because = f": {instance.reason}" if instance.reason else ""
    _log.log(level, "%s %s is %s%s", instance.role, instance.url, instance.state, because)
