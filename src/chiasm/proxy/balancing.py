"""Which language instance gets a call, and another one when the connection is lost before an answer."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import ExitStack
from types import TracebackType

from chiasm.errors import ChiasmError, Code, ModelNotFoundError, OverloadedError
from chiasm.proxy.agreement import WHOLE_ROLES
from chiasm.proxy.fleet import Fleet, Instance
from chiasm.proxy.job import Job
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.placement import Placement
from chiasm.proxy.placement_record import PlacementRecord
from chiasm.proxy.probe import Prober
from chiasm.proxy.upstream import Call, InstanceLostError, Upstream
from chiasm.wire import Role

_ATTEMPTS = 2
_SHOWN_CHARACTERS = 200
_UNAVAILABLE = {
    Role.PREFILL: ("No prefill instance is healthy; try again.", Code.NO_PREFILL),
    Role.DECODE: ("No decode instance is healthy; try again.", Code.NO_DECODE),
}


class Assignment:
    """The instance that a request is assigned to, which counts it as its work until the end of the ``with`` block."""

    def __init__(self, fleet: Fleet, placement: Placement, metrics: Metrics, job: Job, roles: tuple[Role, ...]) -> None:
        self._fleet = fleet
        self._placement = placement
        self._metrics = metrics
        self._job = job
        self._roles = roles
        self._work = ExitStack()
        self._record: PlacementRecord | None = None
        self.instance: Instance

    def take(self, *, avoid: Collection[Instance] = ()) -> None:
        """Assign the best instance; one of ``avoid`` only if no other is healthy. Raises OverloadedError."""
        if not self.take_other(avoid) and not self.take_other():
            raise none_healthy(self._roles[0])

    def take_other(self, excluded: Collection[Instance] = ()) -> bool:
        """Assign the best instance that isn't ``excluded``; if there is none, assign none and return False.

        Of decode instances, the one with the least load is best; of others, the one where the first token is earliest.
        """
        self._work.close()
        self._record = None
        model = self._job.request.model
        if self._roles == (Role.DECODE,):
            instance = self._fleet.choose(*self._roles, model=model, exclude=excluded)
            if instance is None:
                return False
            cost = 1.0
        else:
            now = time.monotonic()
            placed = self._placement.place(self._job.work, self._roles, now, model=model, exclude=excluded)
            if placed is None:
                return False
            instance, cost = placed.instance, placed.prompt.seconds
            self._record = PlacementRecord(self._placement, self._metrics, self._job, placed, now)
            self._work.callback(self._record.end)
        self._work.enter_context(self._fleet.working(instance, cost))
        self.instance = instance
        return True

    def note_answer(self, timing: str | None, *, is_whole: bool = False) -> None:
        """Note that the first token has come; with ``is_whole`` together with all others.

        ``timing`` is the ``Server-Timing`` of the instance.
        """
        if self._record is not None:
            self._record.note_answer(timing, is_whole=is_whole)

    def embedded(self) -> None:
        """Note that all embeddings of the request have been published."""
        if self._record is not None:
            self._record.embedded()

    def move(self) -> None:
        """Assign another instance of the same role; the same one only if it is the last. Raises OverloadedError."""
        self._roles = (self.instance.role,)
        self.take(avoid={self.instance})

    def __enter__(self) -> Assignment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._work.close()


class Balancer:
    """Assigns requests to language instances, and calls them."""

    def __init__(
        self, fleet: Fleet, placement: Placement, upstream: Upstream, prober: Prober, metrics: Metrics
    ) -> None:
        self._fleet = fleet
        self._placement = placement
        self._upstream = upstream
        self._prober = prober
        self._metrics = metrics

    def check_healthy(self) -> None:
        """Raise OverloadedError if text can't be answered now."""
        if missing := self._fleet.missing:
            raise none_healthy(missing)

    def check_model(self, model: str | None) -> None:
        """Raise OverloadedError if text can't be answered now, ModelNotFoundError if this model isn't served."""
        self.check_healthy()
        if model is not None and model not in self._fleet.models:
            raise model_not_found(model, self._fleet)

    def assign(
        self, job: Job, roles: tuple[Role, ...] = WHOLE_ROLES, *, avoid: Collection[Instance] = ()
    ) -> Assignment:
        """Assign the request to the best instance of these roles. Raises OverloadedError if none is healthy."""
        assignment = Assignment(self._fleet, self._placement, self._metrics, job, roles)
        assignment.take(avoid=avoid)
        return assignment

    async def post(self, instance: Instance, job: Job, body: bytes) -> Call:
        """Call an instance and wait for the head of its response. Raises InstanceLostError after it was probed."""
        try:
            return await self._upstream.post(instance.url + job.path, body, job.headers())
        except InstanceLostError as error:
            await self.lost(instance, error)
            raise

    async def lost(self, instance: Instance, error: ChiasmError) -> None:
        """Probe an instance whose response has failed."""
        await self._prober.lost(instance, error)

    async def open(self, assignment: Assignment, job: Job) -> Call:
        """Call the assigned instance and wait for the head of its response.

        If the connection is lost before that, another instance of the same role is called, or the same one if it is the last
        and healthy. Raises InstanceLostError if that fails too.
        """
        lost: InstanceLostError | None = None
        for _ in range(_ATTEMPTS):
            if lost is not None:
                try:
                    assignment.move()
                except OverloadedError:
                    break
                self._metrics.language_retries.inc()
            try:
                return await self.post(assignment.instance, job, await job.body_for(assignment.instance))
            except InstanceLostError as error:
                lost = error
        assert lost is not None
        raise lost


def none_healthy(role: Role) -> OverloadedError:
    """Return the error for a request that needs an instance of this role, or one that does the same."""
    message, code = _UNAVAILABLE.get(role, ("No PD or aggregated instance is healthy; try again.", Code.NO_PD))
    return OverloadedError(message, code=code)


def model_not_found(model: str, fleet: Fleet) -> ModelNotFoundError:
    """Return the error for a request that names a model that isn't served."""
    return ModelNotFoundError(
        f"The model {model[:_SHOWN_CHARACTERS]!r} is not served here; served: {', '.join(fleet.models) or 'none'}.",
        param="model",
        code=Code.MODEL_NOT_FOUND,
    )
