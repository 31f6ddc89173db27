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


class LanguageCall:
    """A call whose answer's head is here; close it to end the call and the instance's load."""

    def __init__(self, call: Call, load: ExitStack) -> None:
        self.call = call
        self._load = load

    def close(self) -> None:
        self.call.close()
        self._load.close()

    def __enter__(self) -> LanguageCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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

    def choose(self, model: str | None, *, roles: tuple[Role, ...] = LANGUAGE_ROLES) -> Instance | None:
        return self._fleet.choose(*roles, model=model)

    async def open(
        self,
        path: str,
        body_for: Callable[[Instance], Awaitable[bytes]],
        context: RequestContext,
        *,
        cost: float,
        roles: tuple[Role, ...] = LANGUAGE_ROLES,
    ) -> LanguageCall:
        """Call the instance with the least to do and wait for its answer's head.

        ``body_for`` says what goes to it. Raises OverloadedError if none is left, InstanceLostError if two were lost.
        """
        lost: InstanceLostError | None = None
        for _ in range(_ATTEMPTS):
            instance = self.choose(context.model, roles=roles)
            if instance is None:
                raise lost or OverloadedError("no PD is healthy; try again", code="no_pd")
            if lost is not None:
                self._metrics.language_retries.inc()
            with ExitStack() as load:
                load.enter_context(self._fleet.working(instance, cost))
                body = await body_for(instance)
                try:
                    call = await self._upstream.post(instance.url + path, body, context.headers())
                except InstanceLostError as error:
                    lost = error
                else:
                    return LanguageCall(call, load.pop_all())
            await self._prober.lost(instance, lost.message)
        assert lost is not None
        raise lost
