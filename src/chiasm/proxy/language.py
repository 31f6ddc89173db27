"""Text to PD (or to an aggregated instance): one call, and one more elsewhere if the connection was lost before an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from types import TracebackType

from chiasm.errors import ModelNotFoundError, OverloadedError
from chiasm.proxy.context import RequestContext
from chiasm.proxy.fleet import LANGUAGE_ROLES, Fleet, Instance, Role
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.probe import Prober
from chiasm.proxy.upstream import Call, InstanceLostError, Upstream

_ATTEMPTS = 2


class Place:
    """The instance that a request goes to, counted as its work from the choice to the request's end."""

    def __init__(self, fleet: Fleet, model: str | None, cost: Callable[[Instance], float]) -> None:
        self._fleet = fleet
        self._model = model
        self._cost = cost
        self._work = ExitStack()
        self.instance: Instance

    def take(self, *roles: Role) -> None:
        """Take the instance with the least to do. Raises OverloadedError if there is none."""
        self._take(self._fleet.choose(*roles, model=self._model))

    def move(self) -> None:
        """Take another instance of the same role; the same one only if it is the last. Raises OverloadedError."""
        self._work.close()
        others = self._fleet.choose(self.instance.role, model=self._model, exclude={self.instance})
        self._take(others or self._fleet.choose(self.instance.role, model=self._model))

    def _take(self, instance: Instance | None) -> None:
        if instance is None:
            raise OverloadedError("no PD is healthy; try again", code="no_pd")
        self._work.enter_context(self._fleet.working(instance, self._cost(instance)))
        self.instance = instance

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._work.close()


class LanguageInstances:
    """Chooses among PDs and aggregated instances, and calls them."""

    def __init__(self, fleet: Fleet, upstream: Upstream, prober: Prober, metrics: Metrics) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._prober = prober
        self._metrics = metrics

    def check_model(self, model: str | None) -> None:
        """Raises OverloadedError if nothing can answer now, ModelNotFoundError if nothing serves this model."""
        if not self._fleet.healthy(*LANGUAGE_ROLES):
            raise OverloadedError("no PD is healthy; try again", code="no_pd")
        if model is not None and model not in self._fleet.models:
            raise ModelNotFoundError(
                f"the model {model[:200]!r} is not served here; served: {', '.join(self._fleet.models)}",
                param="model",
                code="model_not_found",
            )

    def place(
        self, model: str | None, cost: Callable[[Instance], float], roles: tuple[Role, ...] = LANGUAGE_ROLES
    ) -> Place:
        """A place at the instance with the least to do. Raises OverloadedError if there is none."""
        place = Place(self._fleet, model, cost)
        place.take(*roles)
        return place

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
            instance = place.instance
            body = await body_for(instance)
            try:
                return await self._upstream.post(instance.url + path, body, context.headers())
            except InstanceLostError as error:
                lost = error
            await self._prober.lost(instance, lost)
        assert lost is not None
        raise lost
