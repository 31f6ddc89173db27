"""The instance behind the endpoints: its engine, its state, and what requests share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeVar

from chiasm.errors import ChiasmError, InvalidRequestError, ModelNotFoundError, OverloadedError
from chiasm.media import Fetcher
from chiasm.server.config import ServerConfig
from chiasm.server.metrics import Metrics

if TYPE_CHECKING:
    from chiasm.engine.base import Engine
    from chiasm.engine.encoder import EncoderEngine
    from chiasm.engine.engine import LanguageEngine
    from chiasm.server.exchange import Exchange

State = Literal["starting", "ok", "failed", "stopping"]
_T = TypeVar("_T")
_ENCODER = "encoder"
INLINE_BYTES = 256 << 10
"""Bodies up to this size are parsed on the event loop: a thread would take longer to be woken."""


class Instance:
    """One instance from the moment at which its port is open."""

    def __init__(self, model: str, config: ServerConfig, engine: Engine | None = None) -> None:
        self.model = model
        self.config = config
        self.created = int(time.time())
        self.loaded_engine = engine
        """None while the model loads."""
        self.failure: ChiasmError | None = None
        """Why the model could not be loaded."""
        self.stopping = False
        self.metrics = Metrics(self)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="chiasm-server")
        self._fetcher: Fetcher | None = None
        self._exchanges: set[Exchange] = set()
        self._inflight_body_bytes = 0

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What /health says."""
        if self.stopping:
            return "stopping"
        if self.failure is not None:
            return "failed"
        if self.loaded_engine is None:
            return "starting"
        return "ok" if self.loaded_engine.healthy else "failed"

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """While the server runs, on its event loop."""
        self._fetcher = Fetcher(self.config.media)
        try:
            yield
        finally:
            await self._fetcher.close()
            self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def fetcher(self) -> Fetcher:
        """The one way to the bytes behind a URL."""
        assert self._fetcher is not None
        return self._fetcher

    def check_ready(self) -> None:
        """Raise OverloadedError unless requests can be taken now."""
        match self.state:
            case "starting":
                raise OverloadedError("This instance is still loading its model; try again shortly.", code="starting")
            case "failed":
                raise OverloadedError("The engine of this instance has failed; it must be restarted.", code="failed")
            case "stopping":
                raise OverloadedError("This instance is stopping.", code="stopping")

    def check_model(self, model: str | None) -> None:
        """Raise ModelNotFoundError where a request names another model than the one served."""
        if model is not None and model != self.model:
            raise ModelNotFoundError(
                f"The model {model[:200]!r} is not served here; this instance serves {self.model!r}.",
                param="model",
                code="model_not_found",
            )

    @property
    def engine(self) -> Engine:
        """The engine, ready. Raises OverloadedError."""
        self.check_ready()
        assert self.loaded_engine is not None
        return self.loaded_engine

    @property
    def is_encoder(self) -> bool:
        return self.engine.config.role == _ENCODER

    @property
    def language_engine(self) -> LanguageEngine:
        """The engine of a pd or aggregated instance. Raises InvalidRequestError on an encoder."""
        engine = self.engine
        if engine.config.role == _ENCODER:
            raise InvalidRequestError(
                "This instance is an encoder and holds no language model; send text to the proxy."
            )
        return engine  # type: ignore[return-value]

    @property
    def encoder_engine(self) -> EncoderEngine:
        """The engine of an encoder instance."""
        return self.engine  # type: ignore[return-value]

    # ---- bounds ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def admitted(self, exchange: Exchange) -> Iterator[None]:
        """Hold one of the places for requests. Raises OverloadedError when all are taken."""
        if len(self._exchanges) >= self.config.max_inflight_requests:
            raise OverloadedError(
                f"This instance is answering {len(self._exchanges)} requests already; try again later."
            )
        self._exchanges.add(exchange)
        try:
            yield
        finally:
            self._exchanges.remove(exchange)

    def interrupt_all(self) -> None:
        """Break off all requests, since the instance stops."""
        for exchange in list(self._exchanges):
            exchange.interrupt(OverloadedError("This instance is stopping.", code="stopping"))

    def hold_body_bytes(self, num_bytes: int) -> None:
        """Count bytes of a body that is kept; a negative number gives them back. Raises OverloadedError."""
        if num_bytes > 0 and self._inflight_body_bytes + num_bytes > self.config.max_inflight_body_bytes:
            raise OverloadedError("The requests in flight fill this instance's memory for bodies; try again later.")
        self._inflight_body_bytes += num_bytes

    async def parse(self, function: Callable[[], _T], num_bytes: int) -> _T:
        """Run code whose time grows with ``num_bytes``: here if they are few, else in a thread."""
        return function() if num_bytes <= INLINE_BYTES else await self.in_thread(function)

    async def in_thread(self, function: Callable[[], _T]) -> _T:
        """Run plain code that takes long outside the event loop; at most ``config.threads`` at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)
