"""What all requests of an instance share: its engine, its state, its bounds, its threads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

from chiasm.cores import ENCODER_NICE, lower_priority
from chiasm.errors import (
    ChiasmError,
    Code,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PathNotFoundError,
)
from chiasm.fleet_key import read_fleet_key
from chiasm.http import Admission, Exchange
from chiasm.media import Fetcher
from chiasm.media.decoder import Decoder
from chiasm.models.base import LoadProgress
from chiasm.server.config import ServerConfig
from chiasm.server.joining import Joiner
from chiasm.server.metrics import Metrics
from chiasm.wire import CLIENT_HEADER, DrainState, ECPlace, Lease, Load, Role

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.engine.base import Engine
    from chiasm.engine.config import EngineConfig
    from chiasm.engine.grammar import GrammarCompiler
    from chiasm.engine.request import EncodedItem, EncodeItem, GenerateRequest, Output
    from chiasm.models.base import Processor

State = Literal["starting", "ok", "failed", "draining"]
_T = TypeVar("_T")
_SHOWN_CHARACTERS = 200
_GRAMMAR_THREADS = 4
"""Grammars that take long to compile shall not keep the others from being compiled."""
_GRAMMAR_STACK_BYTES = 128 << 20
"""The compiler takes up to 6 KiB for each of the levels that a grammar may have. Only what is used takes memory."""


@runtime_checkable
class GeneratingEngine(Protocol):
    """What requests use of the engine of a pd, aggregated, prefill or decode instance (``LanguageEngine``)."""

    config: EngineConfig
    model_fingerprint: str
    max_model_len: int

    @property
    def processor(self) -> Processor: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]: ...

    async def awaited_embeddings(self) -> list[str]: ...

    async def lost_embeddings(self, asker: str, published: Collection[str]) -> list[str]: ...

    def expect_embeddings(self, places: Mapping[str, ECPlace], stored: Collection[str]) -> None: ...

    def give_back_kv(self, leases: Collection[str]) -> None: ...


@runtime_checkable
class EncodingEngine(Protocol):
    """What requests use of the engine of an encoder instance (``EncoderEngine``)."""

    config: EngineConfig
    model_fingerprint: str

    async def encode(self, request_id: str, items: Sequence[EncodeItem], deadline: float) -> list[EncodedItem]: ...


class ServerContext:
    """One instance, from the moment its port is open."""

    def __init__(self, model: str, config: ServerConfig, engine: Engine | None = None, role: str = "") -> None:
        """``role`` is needed while there is no engine, if it joins proxies."""
        self.role = str(engine.config.role) if engine is not None else role
        self.model = model
        """The name by which requests ask for it."""
        self.config = config
        self.fleet_key = read_fleet_key(config.fleet_key_file)
        """Which signatures count; None: who calls from this machine belongs to the fleet."""
        self.created = int(time.time())
        self.loaded_engine = engine
        """None while the model loads."""
        self.progress = LoadProgress()
        """How far loading is."""
        self.failure: ChiasmError | None = None
        """Why the model could not be loaded."""
        self.incarnation = secrets.token_hex(16)
        """Names this process among all that are or were at its URL."""
        self.url = ""
        """Where proxies reach it, if it joins any."""
        self.is_draining = False
        """Whether it is about to end."""
        self.drains = asyncio.Event()
        """Set when it is told to; ends what waits for nothing but news."""
        self.on_drain: Callable[[], None] = self.drain
        """Ends the server when nothing is left to do."""
        self._refuses_new = False
        self._telling: asyncio.Task[None] | None = None
        self.joiner = Joiner(config.join, self.fleet_key, self.lease) if config.join else None
        self.metrics = Metrics(self)
        self.admission = Admission(
            config.max_inflight_requests, config.max_inflight_body_bytes, config.http, self.metrics.refusals
        )
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="chiasm-server")
        self._grammar_pool = ThreadPoolExecutor(
            _GRAMMAR_THREADS,
            thread_name_prefix="chiasm-grammar",
            initializer=lower_priority,
            initargs=(ENCODER_NICE,),
        )
        self._making_grammars = threading.Lock()
        self._grammars: GrammarCompiler | None = None
        self._fetcher: Fetcher | None = None
        self._decoder = Decoder(config.media)

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """A block in which requests are served, on the event loop of the server."""
        self._fetcher = Fetcher(self.config.media)
        if self.joiner is not None:
            self.joiner.start()
        try:
            yield
        finally:
            if self.joiner is not None:
                await self.joiner.close()
            await self._fetcher.close()
            self._decoder.close()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._grammar_pool.shutdown(wait=False, cancel_futures=True)
            if self._grammars is not None:
                self._grammars.close()

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The ``status`` of /health."""
        if self.failure is not None:
            return "failed"
        if self.is_draining:
            return "draining"
        if self.loaded_engine is None:
            return "starting"
        return "ok" if self.loaded_engine.healthy else "failed"

    def note_ready(self, engine: Engine) -> None:
        """Serve with this engine from now on. Any thread."""
        self.loaded_engine = engine
        if self.joiner is not None:
            self.joiner.change()

    def drain(self) -> None:
        """Refuse new requests as soon as the proxies that this instance has joined know of it. On the event loop."""
        if self.is_draining:
            return
        self.is_draining = True
        self.drains.set()
        if self.joiner is None:
            self._refuses_new = True
        else:
            self._telling = asyncio.create_task(self._tell(self.joiner))

    async def _tell(self, joiner: Joiner) -> None:
        try:
            await joiner.tell()
        finally:
            self._refuses_new = True

    @property
    def left(self) -> DrainState:
        """What is left to do before this instance can end without anybody noticing."""
        engine = self.loaded_engine if self.loaded_engine is not None and self.loaded_engine.healthy else None
        kv = engine.stats().kv if engine is not None else None
        return DrainState(
            incarnation=self.incarnation,
            requests=self.admission.requests,
            kv=kv.leases_held if kv is not None else 0,
            embeddings=engine.unfetched_embeddings() if engine is not None else 0,
        )

    @property
    def is_idle(self) -> bool:
        """Whether it refuses new requests and nothing is left to do."""
        left = self.left
        return self._refuses_new and not (left.requests or left.kv or left.embeddings)

    @property
    def load(self) -> Load:
        """What it has to do and has room for."""
        requests, engine = self.admission.requests, self.loaded_engine
        if engine is None or not engine.healthy:
            return Load(requests=requests)
        stats = engine.stats()
        return Load(
            outstanding_seconds=engine.outstanding_seconds(),
            requests=requests,
            kv_blocks_free=stats.kv_blocks_total - stats.kv_blocks_used if stats.kv_blocks_total else None,
            free_bytes=engine.free_bytes(),
        )

    def lease(self) -> Lease:
        """Return what proxies that this instance joins are told."""
        return Lease(url=self.url, role=self.role, incarnation=self.incarnation, status=self.state, load=self.load)

    def interrupt_all(self) -> None:
        """End all requests with an error, because the instance stops."""
        self.admission.interrupt_all(_stopping())

    def check_ready(self) -> None:
        """Raise OverloadedError unless requests can be taken now."""
        match self.state:
            case "starting":
                raise OverloadedError("This instance is still loading its model; try again later.", code=Code.STARTING)
            case "failed":
                raise OverloadedError("The engine of this instance has failed; restart the instance.", code=Code.FAILED)
            case "draining" if self._refuses_new:
                raise _stopping()

    def check_model(self, model: str | None) -> None:
        """Raise ModelNotFoundError if a request names a model that is not served here."""
        if model is not None and model != self.model:
            raise ModelNotFoundError(
                f"The model {model[:_SHOWN_CHARACTERS]!r} is not served here; this instance serves {self.model!r}.",
                param="model",
                code=Code.MODEL_NOT_FOUND,
            )

    # ---- what requests use -------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine. Raises OverloadedError unless it is ready."""
        self.check_ready()
        assert self.loaded_engine is not None
        return self.loaded_engine

    @property
    def reading_engine(self) -> GeneratingEngine:
        """The engine that reads embeddings of others, also while it drains, since its requests still wait for them.

        Raises PathNotFoundError if this instance reads none.
        """
        engine = self.loaded_engine
        if not isinstance(engine, GeneratingEngine) or engine.config.role not in (Role.PD, Role.PREFILL):
            raise PathNotFoundError("This instance reads no embeddings of others; PD and prefill instances do.")
        return engine

    @property
    def generating_engine(self) -> GeneratingEngine:
        """The engine. Raises InvalidRequestError on an encoder, OverloadedError unless it is ready."""
        engine = self.engine
        if not isinstance(engine, GeneratingEngine):
            raise InvalidRequestError("This instance is an encoder and generates no text; send text to the proxy.")
        return engine

    @property
    def fetcher(self) -> Fetcher:
        """Fetches images."""
        assert self._fetcher is not None
        return self._fetcher

    def unique_id(self, request_id: str) -> str:
        """Return an id that is unique in this process even if clients repeat theirs."""
        return f"{request_id}-{next(self._numbers)}"

    def key_of(self, exchange: Exchange) -> str:
        """Return what names the request's API key; empty if neither this instance nor the proxy checks keys.

        The proxy's word counts, and nobody else's."""
        if exchange.key is not None:
            return exchange.key.id
        if not exchange.caller.is_of_fleet:
            return ""
        client: str = exchange.headers.get(CLIENT_HEADER, "")
        return client[:_SHOWN_CHARACTERS]

    async def in_thread(self, function: Callable[[], _T]) -> _T:
        """Call a slow function outside the event loop; at most ``config.threads`` run at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def decode(self, data: bytes, max_pixels: int, use: Callable[[Image], _T]) -> _T:
        """Decode an image and call ``use`` with it, outside the event loop. Raises MediaError."""
        result, _ = await self._decoder.decode(data, max_pixels, use, self._pool)
        return result

    async def with_grammars(self, processor: Processor, function: Callable[[GrammarCompiler], _T]) -> _T:
        """Call a function that compiles grammars, in one of a few threads that give way to the engine's."""

        def call() -> _T:
            with self._making_grammars:
                if self._grammars is None:
                    from chiasm.engine.grammar import GrammarCompiler

                    self._grammars = GrammarCompiler(processor)
            return function(self._grammars)

        usual = threading.stack_size(_GRAMMAR_STACK_BYTES)
        try:
            # This starts a thread, as long as there may be more.
            called = asyncio.get_running_loop().run_in_executor(self._grammar_pool, call)
        finally:
            threading.stack_size(usual)
        return await called


def _stopping() -> OverloadedError:
    return OverloadedError("This instance is stopping; send the request to another one.", code=Code.STOPPING)
