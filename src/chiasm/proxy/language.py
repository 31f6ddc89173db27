"""Text to instances of the language model: a place at one of them, and calls of it.

A call whose connection is lost before an answer is made once more elsewhere; what P and D need beyond that is in
``handover``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextlib import ExitStack
from types import TracebackType

from chiasm.errors import ChiasmError, ModelNotFoundError, OverloadedError
from chiasm.proxy.context import RequestContext
from chiasm.proxy.fleet import WHOLE_ROLES, Fleet, Instance
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.probe import Prober
from chiasm.proxy.upstream import Call, InstanceLostError, Upstream
from chiasm.wire import Role

_ATTEMPTS = 2
_NAMES = {Role.PREFILL: "prefill instance", Role.DECODE: "decode instance"}


class Place:
    """The instance that a request goes to, counted as its work from the choice to the place's end."""

    def __init__(
        self, fleet: Fleet, model: str | None, cost: Callable[[Instance], float], roles: tuple[Role, ...]
    ) -> None:
        self._fleet = fleet
        self._model = model
        self._cost = cost
        self._roles = roles
        self._work = ExitStack()
        self.instance: Instance

    def take(self, *, avoid: Collection[Instance] = ()) -> None:
        """Take the instance with the least to do, one of ``avoid`` only if no other is healthy.

        Raises OverloadedError if none is.
        """
        if not self.take_other(avoid) and not self.take_other():
            raise none_healthy(self._roles[0])

    def take_other(self, excluded: Collection[Instance] = ()) -> bool:
        """Take the instance with the least to do that isn't ``excluded``; False, and nothing taken, if there is none."""
        self.leave()
        instance = self._fleet.choose(*self._roles, model=self._model, exclude=excluded)
        if instance is None:
            return False
        self._work.enter_context(self._fleet.working(instance, self._cost(instance)))
        self.instance = instance
        return True

    def move(self) -> None:
        """Take another instance of the same role; the same one only if it is the last. Raises OverloadedError."""
        self._roles = (self.instance.role,)
        self.take(avoid={self.instance})

    def leave(self) -> None:
        """Take up nothing."""
        self._work.close()

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()


class LanguageInstances:
    """Chooses among the instances that have the language model, and calls them."""

    def __init__(self, fleet: Fleet, upstream: Upstream, prober: Prober, metrics: Metrics) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._prober = prober
        self._metrics = metrics

    def check_healthy(self) -> None:
        """Raises OverloadedError if nothing can answer now."""
        if missing := self._fleet.missing:
            raise none_healthy(missing)

    def check_model(self, model: str | None) -> None:
        """Raises OverloadedError if nothing can answer now, ModelNotFoundError if nothing serves this model."""
        self.check_healthy()
        if model is not None and model not in self._fleet.models:
            raise ModelNotFoundError(
                f"the model {model[:200]!r} is not served here; served: {', '.join(self._fleet.models)}",
                param="model",
                code="model_not_found",
            )

    def place(
        self,
        model: str | None,
        cost: Callable[[Instance], float],
        roles: tuple[Role, ...] = WHOLE_ROLES,
        *,
        avoid: Collection[Instance] = (),
    ) -> Place:
        """A place at the instance with the least to do. Raises OverloadedError if there is none."""
        place = Place(self._fleet, model, cost, roles)
        place.take(avoid=avoid)
        return place

    async def ask(self, instance: Instance, path: str, body: bytes, context: RequestContext) -> Call:
        """One call, up to the head of the answer. Raises InstanceLostError, when the instance has been looked at anew."""
        try:
            return await self._upstream.post(instance.url + path, body, context.headers())
        except InstanceLostError as error:
            await self._prober.lost(instance, error)
            raise

    async def broke_off(self, instance: Instance, error: ChiasmError) -> None:
        """An answer ended in its middle: look at the instance anew."""
        await self._prober.lost(instance, error)

    async def open(
        self, place: Place, path: str, body_for: Callable[[Instance], Awaitable[bytes]], context: RequestContext
    ) -> Call:
        """Call the place's instance and wait for the head of its answer.

        Where the connection is lost before it, another instance of the same role is asked, or the same one if it is the
        last and well. ``body_for`` says what goes to an instance. Raises InstanceLostError if that was in vain.
        """
        lost: InstanceLostError | None = None
        for _ in range(_ATTEMPTS):
            if lost is not None:
                try:
                    place.move()
                except OverloadedError:
                    break
                self._metrics.language_retries.inc()
            try:
                return await self.ask(place.instance, path, await body_for(place.instance), context)
            except InstanceLostError as error:
                lost = error
        assert lost is not None
        raise lost


def none_healthy(role: Role) -> OverloadedError:
    """No instance of this role, or of those that do the same, can be used."""
    name = _NAMES.get(role, "PD")
    code = f"no_{role}" if role in _NAMES else "no_pd"
    return OverloadedError(f"no {name} is healthy; try again", code=code)
