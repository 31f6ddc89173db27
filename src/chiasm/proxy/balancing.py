"""Which language instance gets a call, and another one when that one is lost or full."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from types import TracebackType

from chiasm.errors import ChiasmError, Code, ModelNotFoundError, OverloadedError
from chiasm.http.timing import TimingEntry, duration_of
from chiasm.proxy.agreement import WHOLE_ROLES
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.job import Job
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.placement import Placement
from chiasm.proxy.placement_record import PlacementRecord
from chiasm.proxy.places import Places
from chiasm.proxy.probe import Prober
from chiasm.proxy.upstream import Call, InstanceLostError, RefusedError, Upstream
from chiasm.proxy.waiting import Comeback, WaitingLine, none_healthy
from chiasm.wire import Role

_SHOWN_CHARACTERS = 200


class Assignment:
    """The instance that a request is assigned to, which counts it as its work until the end of the ``with`` block."""

    def __init__(
        self,
        fleet: Fleet,
        placement: Placement,
        metrics: Metrics,
        places: Places,
        job: Job,
        roles: tuple[Role, ...],
        unfit: Collection[Instance],
        on_end: Callable[[Role], None],
    ) -> None:
        """``unfit`` instances never get the request. ``on_end`` is told the role of the one that has it at the end."""
        self._fleet = fleet
        self._placement = placement
        self._metrics = metrics
        self._places = places
        self._job = job
        self._unfit = unfit
        self._on_end = on_end
        self._cost: float | None = None
        """Of its work at the instance; None while it is nobody's."""
        self._record: PlacementRecord | None = None
        self.roles = roles
        """Of the instances that it may get."""
        self.instance: Instance

    @property
    def lacking(self) -> Role | None:
        """The role of which no instance is healthy that may get it; None if one is."""
        may_get = (one for one in self._fleet.healthy(*self.roles) if one not in self._unfit)
        return self.roles[0] if next(may_get, None) is None else None

    def keep_role(self) -> None:
        """Have none get it that has another role than the one at hand: its body is made for this role."""
        self.roles = (self.instance.role,)

    def take(self, *, avoid: Collection[Instance] = ()) -> bool:
        """Assign the best instance, one of ``avoid`` only if no other is healthy; return False if none is."""
        return self.take_other(avoid) or (bool(avoid) and self.take_other())

    def release(self) -> None:
        """Count it as nobody's work until an instance is taken again."""
        if self._cost is not None:
            self._fleet.end(self.instance, self._cost)
            self._cost = None
        if self._record is not None:
            self._record.end()
            self._record = None

    def take_other(self, excluded: Collection[Instance] = ()) -> bool:
        """Assign the best instance that isn't ``excluded``; if there is none, assign none and return False.

        Of decode instances, the one with the least load is best; of others, the one where the first token is earliest.
        """
        self.release()
        excluded = {*excluded, *self._unfit}
        model = self._job.request.model
        if self.roles == (Role.DECODE,):
            instance = self._fleet.choose(*self.roles, model=model, exclude=excluded)
            if instance is None:
                return False
            cost = 1.0
        else:
            now = time.monotonic()
            placed = self._placement.place(self._job.work, self.roles, now, model=model, exclude=excluded)
            if placed is None:
                return False
            instance, cost = placed.instance, placed.prompt.seconds
            self._record = PlacementRecord(self._placement, self._metrics, self._job, placed, now)
        self._places.tell(instance, self._job.places)
        self._fleet.begin(instance, cost)
        self.instance, self._cost = instance, cost
        return True

    def note_answer(self, timing: Sequence[TimingEntry], *, is_whole: bool = False, is_understood: bool = True) -> None:
        """Note that the instance's first token has come; with ``is_whole`` together with all others.

        ``timing`` is the ``Server-Timing`` of the instance. An answer that isn't ``is_understood`` may not be one to a prompt.
        """
        if (step_seconds := duration_of(timing, "step")) is not None:
            self.instance.costs.learn_step(step_seconds, time.monotonic())
        if self._record is not None:
            self._record.note_answer(timing, is_whole=is_whole, is_understood=is_understood)

    def embedded(self) -> None:
        """Note that all embeddings of the request have been published."""
        if self._record is not None:
            self._record.embedded()

    def __enter__(self) -> Assignment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
        self._on_end(self.instance.role)


class Balancer:
    """Assigns requests to language instances, and calls them."""

    def __init__(
        self,
        fleet: Fleet,
        placement: Placement,
        upstream: Upstream,
        prober: Prober,
        metrics: Metrics,
        places: Places,
        comeback: Comeback,
        *,
        max_refusal_bytes: int,
    ) -> None:
        self._fleet = fleet
        self._placement = placement
        self._upstream = upstream
        self._prober = prober
        self._metrics = metrics
        self._places = places
        self._comeback = comeback
        self._max_refusal_bytes = max_refusal_bytes
        self._lines: defaultdict[Role, WaitingLine] = defaultdict(WaitingLine)
        """By the first of the roles that requests in it may go to."""
        metrics.waiting.labels("room").set_function(lambda: sum(map(len, self._lines.values())))

    async def until_healthy(self, *, has_images: bool) -> None:
        """Wait until such a request can be answered. Raises OverloadedError if that is unlikely or takes too long."""
        if self._fleet.lacking(has_images=has_images) is not None:
            await self._comeback.wait(lambda: self._fleet.lacking(has_images=has_images))

    def check_model(self, model: str | None) -> None:
        """Raise ModelNotFoundError if this model isn't served."""
        if model is not None and model not in self._fleet.models:
            raise model_not_found(model, self._fleet)

    async def assign(
        self,
        job: Job,
        roles: tuple[Role, ...] = WHOLE_ROLES,
        *,
        avoid: Collection[Instance] = (),
        unfit: Collection[Instance] = (),
    ) -> Assignment:
        """Assign the request to the best instance of these roles.

        Those of ``avoid`` get it only if there is no other; ``unfit`` ones never get it, also when it is moved. Raises
        OverloadedError if none becomes healthy.
        """
        assignment = Assignment(
            self._fleet,
            self._placement,
            self._metrics,
            self._places,
            job,
            roles,
            unfit,
            on_end=lambda role: self._advance({roles[0], role}),
        )
        await self._take(assignment, avoid)
        return assignment

    async def move(self, assignment: Assignment) -> None:
        """Assign another instance; the same one only if no other is healthy. Raises OverloadedError if none becomes so."""
        assignment.release()
        await self._take(assignment, {assignment.instance})

    async def _take(self, assignment: Assignment, avoid: Collection[Instance] = ()) -> None:
        if assignment.take(avoid=avoid):
            return
        await self._comeback.wait(lambda: assignment.lacking)
        if not assignment.take():
            raise none_healthy(assignment.roles[0])

    def _advance(self, roles: Iterable[Role]) -> None:
        for role in roles:
            self._lines[role].advance()

    async def lost(self, instance: Instance, error: ChiasmError) -> bool:
        """Probe an instance whose response has failed; return whether it is healthy all the same."""
        return await self._prober.lost(instance, error)

    async def open(
        self,
        assignment: Assignment,
        job: Job,
        make_body: Callable[[bytes], bytes] = lambda body: body,
        *,
        waits_for_room: bool = True,
    ) -> Call:
        """Call the assigned instance and wait for the head of its response, whose status is 200.

        If it is full, another one is called, and if all are, they are called again when there may be room. Raises RefusedError
        for other refusals, InstanceLostError after it was probed, ResponseCutOffError in the middle of a refusal, and
        OverloadedError if there is no room until the deadline.
        """
        line = self._lines[assignment.roles[0]]
        full: set[Instance] = set()
        has_had_turn = False
        if waits_for_room and line.has(_kind(assignment, job)):
            await self._wait_for_room(line, assignment, job)
            has_had_turn = True
        while True:
            try:
                return await self._call(assignment.instance, job, make_body)
            except RefusedError as error:
                if not (waits_for_room and error.is_full):
                    raise
            if assignment.instance.role is Role.DECODE:
                self._metrics.decode_refusals.inc()
            else:
                self._metrics.language_refusals.inc()
            full.add(assignment.instance)
            if not assignment.take_other(full):
                await self._wait_for_room(line, assignment, job, first=has_had_turn)
                has_had_turn = True
                full.clear()

    async def _call(self, instance: Instance, job: Job, make_body: Callable[[bytes], bytes]) -> Call:
        body = make_body(await job.body_for(instance))
        job.note_instance(instance)
        job.trail.passed("place")
        trail = job.trail.call_language(instance.address, instance.role)
        try:
            call = await self._upstream.post(instance.url, job.path, body, job.headers())
        except InstanceLostError as error:
            await self.lost(instance, error)
            raise
        try:
            await call.check(self._max_refusal_bytes)
        except BaseException:
            call.close()
            raise
        job.trail.answered(trail, call.headers.get("server-timing"))
        return call

    async def _wait_for_room(self, line: WaitingLine, assignment: Assignment, job: Job, *, first: bool = False) -> None:
        """Wait for a turn and assign the best instance."""
        assignment.release()
        try:
            async with asyncio.timeout(job.seconds_to_wait):
                await line.wait(_kind(assignment, job), first=first or job.exchange.has_begun)
        except TimeoutError:
            raise OverloadedError(
                f"All {assignment.roles[0]} instances were full until the request's deadline; try again later.",
                code=Code.TOO_MANY_REQUESTS,
            ) from None
        await self._take(assignment)


def _kind(assignment: Assignment, job: Job) -> Hashable:
    """Return what decides, besides the instances, whether they are full for a request: whose it is, and which may get it."""
    health = assignment.instance.health
    checks_keys = not job.client and health is not None and health.needs_key
    client = job.exchange.headers.get("authorization", "") if checks_keys else job.client
    return client, job.request.model, assignment.roles


def model_not_found(model: str, fleet: Fleet) -> ModelNotFoundError:
    """Return the error for a request that names a model that isn't served."""
    return ModelNotFoundError(
        f"The model {model[:_SHOWN_CHARACTERS]!r} is not served here; served: {', '.join(fleet.models) or 'none'}.",
        param="model",
        code=Code.MODEL_NOT_FOUND,
    )
