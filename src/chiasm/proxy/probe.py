"""Asks instances how they are, at intervals and whenever a connection failed."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from chiasm.errors import ChiasmError
from chiasm.proxy.fleet import Fleet, Instance, Report
from chiasm.proxy.upstream import NoAnswerInTimeError, NoConnectionError, Upstream, UpstreamError
from chiasm.wire import InstanceState

_log = logging.getLogger(__name__)
_MAX_ANSWER_BYTES = 1 << 20
_SHOWN_CHARACTERS = 200
_WAITING_INTERVAL_SECONDS = 0.25
"""Between probes of an instance that isn't healthy: it is wanted as soon as it is."""
_MISSES = 2
"""Probes in a row that a healthy instance leaves unanswered before it is out; on a busy machine one may come late."""


class _Health(msgspec.Struct):
    role: str
    model: str
    status: str = "ok"
    fingerprint: str = ""
    ec_store: str = ""
    version: str = ""
    engine: str = ""
    dtype: str = ""
    takes_image_size: bool = True
    max_model_len: int | None = None
    max_items: int | None = None
    kv_connector: str | None = None
    kv_blocks_total: int | None = None
    kv_blocks_free: int | None = None
    max_num_seqs: int | None = None


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Trouble(msgspec.Struct):
    status: str = ""
    message: str = ""


_trouble = msgspec.json.Decoder(_Trouble)
_health = msgspec.json.Decoder(_Health)
_models = msgspec.json.Decoder(_Models)


class Prober:
    """One task per instance; each tells the fleet what it finds."""

    def __init__(self, fleet: Fleet, upstream: Upstream, *, interval_seconds: float, timeout_seconds: float) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._interval_seconds = interval_seconds
        self._timeout_seconds = timeout_seconds
        self._watches: dict[Instance, asyncio.Task[None]] = {}
        self._checks: dict[Instance, asyncio.Task[None]] = {}
        fleet.on_remove = self.forget

    def watch(self, instance: Instance) -> None:
        if instance not in self._watches:
            self._watches[instance] = asyncio.create_task(self._watch(instance))

    def forget(self, instance: Instance) -> None:
        for tasks in (self._watches, self._checks):
            if task := tasks.pop(instance, None):
                task.cancel()

    async def close(self) -> None:
        tasks = [*self._watches.values(), *self._checks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def lost(self, instance: Instance, error: ChiasmError) -> bool:
        """A call failed with its connection, or the instance gave it up: out at once if it is out of reach, else asked anew.

        True if the instance is well all the same: an idle connection was closed, or it has been restarted.
        """
        if isinstance(error, NoConnectionError):
            self._note(instance, error.message)
        if running := self._checks.get(instance):
            await asyncio.wait({running})  # its answer may be older than the failure
        await self.check(instance)
        return instance.state is InstanceState.HEALTHY

    async def check(self, instance: Instance) -> None:
        """Probe it now; callers at the same time share one probe."""
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
            report = await self._ask(instance.url)
        except NoAnswerInTimeError as error:
            instance.missed_probes += 1
            if instance.missed_probes >= _MISSES or instance.state is not InstanceState.HEALTHY:
                self._note(instance, error.message)
            return
        except UpstreamError as error:
            self._note(instance, error.message)
            return
        instance.missed_probes = 0
        self._fleet.succeed(instance, report)
        if instance.state is not before:
            _log.info("%s %s is %s%s", instance.role, instance.url, instance.state, _because(instance))

    def _note(self, instance: Instance, reason: str) -> None:
        before = instance.state
        self._fleet.fail(instance, reason)
        if instance.state is not before:
            _log.warning("%s %s is %s%s", instance.role, instance.url, instance.state, _because(instance))

    async def _ask(self, url: str) -> Report:
        answer = await self._upstream.get(
            f"{url}/health", timeout_seconds=self._timeout_seconds, max_bytes=_MAX_ANSWER_BYTES
        )
        if answer.status != 200:
            raise UpstreamError(f"/health answered with status {answer.status}{_said(answer.body)}")
        if answer.body.strip():
            try:
                health = _health.decode(answer.body)
            except msgspec.MsgspecError as error:
                raise UpstreamError(f"/health answered something that isn't understood: {error}") from error
            if health.status != "ok":
                raise UpstreamError(f"/health says {health.status[:40]!r}")
            return Report(
                models=(health.model,),
                role=health.role,
                fingerprint=health.fingerprint,
                ec_store=health.ec_store,
                version=health.version,
                engine=health.engine,
                dtype=health.dtype,
                takes_image_size=health.takes_image_size,
                max_model_len=health.max_model_len,
                max_items=health.max_items
                or None,  # vLLM without a vision tower says 0, and takes embeddings all the same
                kv_connector=health.kv_connector or "",
                kv_blocks_total=health.kv_blocks_total,
                kv_blocks_free=health.kv_blocks_free,
                max_num_seqs=health.max_num_seqs,
            )
        answer = await self._upstream.get(
            f"{url}/v1/models", timeout_seconds=self._timeout_seconds, max_bytes=_MAX_ANSWER_BYTES
        )
        try:
            models = _models.decode(answer.body).data
        except msgspec.MsgspecError:
            models = []
        if answer.status != 200 or not models:
            raise UpstreamError("/v1/models names no model")
        return Report(
            models=tuple(model.id for model in models), takes_image_size=False, max_model_len=models[0].max_model_len
        )


def _said(body: bytes) -> str:
    """What an instance says of why it isn't well."""
    try:
        trouble = _trouble.decode(body)
    except msgspec.MsgspecError:
        return ""
    said = ": ".join(part for part in (trouble.status, trouble.message) if part)
    return f" ({said[:_SHOWN_CHARACTERS]})" if said else ""


def _because(instance: Instance) -> str:
    return f": {instance.reason}" if instance.reason else ""
