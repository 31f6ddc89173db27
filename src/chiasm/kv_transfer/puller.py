"""The consumer's side of the control channel: claims blocks, has them copied, and gives them back.

One thread talks to all producers and does nothing else, so that a claim never waits for a copy. Other threads copy, resolve
names and map memory.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVarTuple

import msgspec

from chiasm.kv_transfer.base import (
    FinishedTransfers,
    KVClaim,
    KVConnectorMetadata,
    KVConnectorStats,
    KVLayout,
    KVLoad,
    KVTransferConfig,
    ReachedMemory,
    TransferError,
)
from chiasm.kv_transfer.control import (
    MAX_CLAIM_SECONDS,
    PROTOCOL_VERSION,
    READ_AHEAD_BYTES,
    Channel,
    ChannelClosed,
    Claim,
    ControlThread,
    Copied,
    Granted,
    Hello,
    ProducerMessage,
    Refused,
    Release,
    Welcome,
    Whole,
)

_logger = logging.getLogger(__name__)

MAX_IDLE_PRODUCERS = 16
"""Producers whose connection and memory are kept although nothing is pulled from them."""
_MAX_CONNECTING = 32  # threads that resolve names and map memory
_DECODER: msgspec.msgpack.Decoder[ProducerMessage] = msgspec.msgpack.Decoder(ProducerMessage)
_Arguments = TypeVarTuple("_Arguments")


class _Address(NamedTuple):
    host: str
    port: int
    engine_id: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(eq=False)
class _Producer:
    """One producer, from the first request for its blocks until its connection is lost."""

    address: _Address
    channel: Channel[ProducerMessage] | None = None
    memory: ReachedMemory | None = None
    task: asyncio.Task[None] | None = None
    """Connects, and then receives the answers."""
    welcomed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once there are a channel and memory, or it is lost."""
    lost: bool = False
    questions: deque[tuple[Granted | Whole, asyncio.Future[None]]] = field(default_factory=deque)
    """In the order of the answers, the good one of which is the first element."""
    pulls: set[_Pull] = field(default_factory=set)
    """Those whose blocks haven't been given back."""
    num_copying: int = 0

    def refuse_all(self, reason: str) -> None:
        """Answer all open questions, since nobody else will."""
        for _, answer in self.questions:
            if not answer.done():
                answer.set_exception(TransferError(reason))
        self.questions.clear()

    @property
    def is_idle(self) -> bool:
        return self.welcomed.is_set() and not self.pulls

    def ask(self, question: Claim | Copied, good_answer: Granted | Whole) -> asyncio.Future[None]:
        """Ask, and return what gets the answer: no result, or TransferError. Raises TransferError if it can't be asked."""
        if self.lost or self.channel is None:
            raise TransferError("the connection was closed")
        self.channel.send(question)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.questions.append((good_answer, answer))
        return answer

    async def receive_answers(self, channel: Channel[ProducerMessage]) -> None:
        """Hand out the answers until the connection ends. Raises ChannelClosed."""
        while True:
            message = await channel.receive()
            if not self.questions:
                raise ChannelClosed("it answered what was not asked")
            good_answer, answer = self.questions.popleft()
            is_refusal = isinstance(message, Refused) and message.claim == good_answer.claim
            if message != good_answer and not is_refusal:
                raise ChannelClosed("it answered another question than the one that was asked")
            if answer.done():
                continue
            if isinstance(message, Refused):
                answer.set_exception(TransferError(message.reason))
            else:
                answer.set_result(None)


@dataclass(eq=False)
class _Pull:
    """One request's blocks, on their way."""

    claim: KVClaim
    number: int
    """Of the claim, on this connection."""
    producer: _Producer
    begun: float
    remote_blocks: frozenset[int]
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the grant, or at the end."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when all is loaded, when it failed, or when the request was dropped."""
    num_loaded: int = 0
    waiting: dict[int, KVLoad] = field(default_factory=dict)
    """By index: the loads that have not ended and into whose blocks nothing is being copied."""
    copies: set[asyncio.Future[float | None]] = field(default_factory=set)

    def should_stop(self) -> bool:
        """Return whether a copy is of no use any more. Called on transfer threads too."""
        return self.over.is_set() or time.monotonic() >= self.claim.deadline


class Puller:
    """Pulls the blocks of this consumer's requests from any number of producers.

    ``reach`` makes a producer's memory readable, given its Welcome; it runs on any thread and raises TransferError if it
    can't. ``wake`` is called, on the control thread, when :meth:`take_finished` has something new.
    """

    def __init__(
        self,
        config: KVTransferConfig,
        layout: KVLayout,
        num_blocks: int,
        reach: Callable[[Welcome], ReachedMemory],
        stats: KVConnectorStats,
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._layout = layout
        self._num_blocks = num_blocks
        self._reach = reach
        self._stats = stats
        self._wake = wake
        self._lock = threading.Lock()  # guards _finished
        self._finished = FinishedTransfers()
        self._will_wake = False
        self._producers: dict[_Address, _Producer] = {}  # the least recently used comes first
        self._pulls: dict[str, _Pull] = {}
        self._next_number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._pool = ThreadPoolExecutor(max(1, config.max_parallel_transfers), thread_name_prefix="kv-transfer")
        self._control = ControlThread("kv-pull", self._run)

    def begin(self, metadata: KVConnectorMetadata) -> None:
        """Begin what the metadata says. Any thread; returns at once."""
        self._control.call(self._begin, metadata)

    def take_finished(self) -> FinishedTransfers:
        """Return what ended since the last call. Any thread."""
        with self._lock:
            finished, self._finished = self._finished, FinishedTransfers()
        return finished

    def close(self) -> None:
        """Break everything off. When this returns nothing is written any more; idempotent."""
        self._control.close()
        self._pool.shutdown()

    # ---- the control thread -----------------------------------------------------------------------------------------

    async def _run(self, closing: asyncio.Event) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MAX_CONNECTING, "kv-connect"))
        await closing.wait()
        self._closing = True
        for producer in list(self._producers.values()):
            self._lose(producer, "this instance stops")
            if producer.channel is None and producer.task is not None:
                producer.task.cancel()  # it connects
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(
        self, producer: _Producer, work: Callable[[*_Arguments], Coroutine[Any, Any, None]], *args: *_Arguments
    ) -> asyncio.Task[None]:
        """Start a task. An error that it doesn't expect loses the producer."""

        async def run() -> None:
            try:
                await work(*args)
            except Exception as error:
                _logger.exception("An error in the KV control thread ends one connection.")
                self._lose(producer, f"an unexpected error: {error}")

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self, metadata: KVConnectorMetadata) -> None:
        if self._closing:
            return
        for claim in metadata.claims:
            self._begin_pull(claim)
        for load in metadata.loads:
            self._begin_load(load)
        for request_id in metadata.dropped:
            pull = self._pulls.get(request_id)
            if pull is not None:
                self._end(pull)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _begin_pull(self, claim: KVClaim) -> None:
        params = claim.params
        address = _Address(params.remote_host or "", params.remote_port or 0, params.remote_engine_id or "")
        producer = self._producers.pop(address, None) or self._meet(address)
        self._producers[address] = producer
        self._next_number += 1
        blocks = frozenset(params.remote_block_ids or ())
        pull = _Pull(claim, self._next_number, producer, time.monotonic(), blocks)
        self._pulls[claim.request_id] = pull
        producer.pulls.add(pull)
        self._start(producer, self._pull, pull)

    async def _pull(self, pull: _Pull) -> None:
        """Claim a request's blocks, and give them back when the pull is over and nothing reads them.

        Some transports need the producer's part in a read until its end. The blocks of a request that was dropped early are
        claimed nevertheless: giving them back frees them before their lease ends.
        """
        producer, params = pull.producer, pull.claim.params
        await producer.welcomed.wait()
        seconds = min(max(0.0, pull.claim.deadline - time.monotonic()), MAX_CLAIM_SECONDS)
        claim = Claim(pull.number, params.remote_request_id or "", params.remote_block_ids or [], seconds)
        if await self._ask(pull, claim, Granted(pull.number)):
            self._stats.claim_seconds += time.monotonic() - pull.begun
            pull.granted.set()
        await pull.over.wait()
        if pull.copies:
            await asyncio.wait(pull.copies)
        producer.pulls.discard(pull)
        if producer.channel is not None and not producer.lost:
            try:
                producer.channel.send(Release(pull.number))
            except ChannelClosed as error:
                self._lose(producer, f"the connection broke: {error}")

    async def _ask(self, pull: _Pull, question: Claim | Copied, good_answer: Granted | Whole) -> bool:
        """Return whether the producer says yes; otherwise the pull has failed."""
        try:
            async with asyncio.timeout(self._config.connect_timeout_seconds):
                await pull.producer.ask(question, good_answer)
        except TimeoutError:
            self._lose(pull.producer, self._late("answer"))
        except ChannelClosed as error:
            self._lose(pull.producer, f"the connection broke: {error}")
        except TransferError as error:
            self._fail(pull, str(error))
        else:
            return True
        return False

    def _begin_load(self, load: KVLoad) -> None:
        pull = self._pulls.get(load.request_id)
        if pull is None:  # it failed already
            self._note(FinishedTransfers(broken_off={load.key}))
        elif not load.local:
            self._end_load(pull, load)
        elif not self._fits(pull, load):
            self._note(FinishedTransfers(broken_off={load.key}))
            self._fail(pull, "the load names blocks that the handle or this instance doesn't have")
        else:
            pull.waiting[load.index] = load
            self._start(pull.producer, self._load, pull, load)

    def _fits(self, pull: _Pull, load: KVLoad) -> bool:
        return (
            len(load.local) == len(load.remote)
            and pull.remote_blocks.issuperset(load.remote)
            and min(load.local) >= 0
            and max(load.local) < self._num_blocks
        )

    async def _load(self, pull: _Pull, load: KVLoad) -> None:
        """Copy the blocks of one load, and ask the producer whether what was copied is what it offered."""
        await pull.granted.wait()
        if pull.over.is_set():
            return  # it was broken off
        del pull.waiting[load.index]
        producer = pull.producer
        assert producer.memory is not None, "nothing is granted before the producer's memory is reached"
        copying = asyncio.get_running_loop().run_in_executor(self._pool, _copy, producer.memory, pull, load)
        pull.copies.add(copying)
        producer.num_copying += 1
        seconds, failure = None, "the request's deadline passed"
        try:
            seconds = await copying
        except TransferError as error:
            failure = str(error)
            self._lose(producer, failure)
        pull.copies.discard(copying)
        producer.num_copying -= 1
        self._close_memory_if_lost(producer)
        if pull.over.is_set() or seconds is None:
            self._note(FinishedTransfers(broken_off={load.key}))
            self._fail(pull, failure)
            return
        pull.waiting[load.index] = load
        if await self._ask(pull, Copied(pull.number, load.index), Whole(pull.number, load.index)):
            if pull.waiting.pop(load.index, None) is None:
                return  # it was broken off
            self._stats.transfers += 1
            self._stats.transferred_bytes += len(load.local) * self._layout.bytes_per_block
            self._stats.transfer_seconds += seconds
            self._end_load(pull, load)

    def _end_load(self, pull: _Pull, load: KVLoad) -> None:
        """Note that a load is whole."""
        self._note(FinishedTransfers(loaded={load.key}))
        pull.num_loaded += 1
        if pull.num_loaded == pull.claim.num_loads:
            self._end(pull)

    def _fail(self, pull: _Pull, reason: str) -> None:
        if not pull.over.is_set():
            self._stats.failures += 1
            self._end(pull, f"Could not fetch KV from the prefill instance at {pull.producer.address}: {reason}.")

    def _end(self, pull: _Pull, failure: str | None = None) -> None:
        """Break off the loads that wait, and have the others stop copying. ``failure`` is a sentence for the client."""
        self._pulls.pop(pull.claim.request_id, None)
        pull.over.set()
        pull.granted.set()
        failed = {} if failure is None else {pull.claim.request_id: failure}
        self._note(FinishedTransfers(broken_off={load.key for load in pull.waiting.values()}, failed=failed))
        pull.waiting.clear()

    def _note(self, ended: FinishedTransfers) -> None:
        """Keep this for the engine, and wake it soon."""
        with self._lock:
            self._finished.loaded |= ended.loaded
            self._finished.broken_off |= ended.broken_off
            self._finished.failed |= ended.failed
        if ended != FinishedTransfers() and not self._will_wake:
            self._will_wake = True
            asyncio.get_running_loop().call_soon(self._wake_engine)

    def _wake_engine(self) -> None:
        self._will_wake = False
        if not self._closing:
            self._wake()

    # ---- producers --------------------------------------------------------------------------------------------------

    def _meet(self, address: _Address) -> _Producer:
        idle = [producer for producer in self._producers.values() if producer.is_idle]
        for producer in idle[: max(0, len(idle) - MAX_IDLE_PRODUCERS + 1)]:
            self._lose(producer, "it was idle")
        producer = _Producer(address)
        producer.task = self._start(producer, self._converse, producer)
        return producer

    async def _converse(self, producer: _Producer) -> None:
        """Connect to a producer, reach its memory, and hand out its answers until the connection is lost."""
        try:
            producer.channel = channel = await self._connect(producer.address)
            welcome = await self._greet(channel, producer.address.engine_id)
            memory = await asyncio.get_running_loop().run_in_executor(None, self._reach, welcome)
            if producer.lost:
                memory.close()
                return
            producer.memory = memory
            producer.welcomed.set()
            await producer.receive_answers(channel)
        except ChannelClosed as error:
            self._lose(producer, f"the connection broke: {error}")
        except TransferError as error:
            self._lose(producer, str(error))

    async def _connect(self, address: _Address) -> Channel[ProducerMessage]:
        try:
            async with asyncio.timeout(self._config.connect_timeout_seconds):
                streams = await asyncio.open_connection(address.host, address.port, limit=READ_AHEAD_BYTES)
        except TimeoutError:
            raise TransferError(self._late("accept a connection")) from None
        except (OSError, ValueError) as error:  # ValueError: a host that can't be one
            raise TransferError(f"it cannot be reached: {error}") from error
        return Channel(*streams, _DECODER)

    async def _greet(self, channel: Channel[ProducerMessage], engine_id: str) -> Welcome:
        config = self._config
        try:
            channel.send(Hello(PROTOCOL_VERSION, config.connector, engine_id, config.fingerprint, self._layout))
            async with asyncio.timeout(config.connect_timeout_seconds):
                answer = await channel.receive()
        except TimeoutError:
            raise TransferError(self._late("answer")) from None
        except ChannelClosed as error:
            raise TransferError(f"it does not speak the control protocol: {error}") from error
        if isinstance(answer, Refused):
            raise TransferError(answer.reason)
        if not isinstance(answer, Welcome):
            raise TransferError("it does not speak the control protocol: it answered before it was asked")
        return answer

    def _lose(self, producer: _Producer, reason: str) -> None:
        """End the connection to a producer, and fail what was to come over it."""
        if producer.lost:
            return
        producer.lost = True
        if self._producers.get(producer.address) is producer:
            del self._producers[producer.address]
        if producer.channel is not None:
            producer.channel.close()
        if producer.pulls and not self._closing:
            _logger.warning(
                "Gave up prefill instance %s at %s: %s.", producer.address.engine_id, producer.address, reason
            )
        for pull in producer.pulls:
            self._fail(pull, reason)
        producer.welcomed.set()
        producer.refuse_all(reason)
        self._close_memory_if_lost(producer)

    def _close_memory_if_lost(self, producer: _Producer) -> None:
        if producer.lost and not producer.num_copying and producer.memory is not None:
            producer.memory.close()
            producer.memory = None

    def _late(self, what: str) -> str:
        return f"it did not {what} within {self._config.connect_timeout_seconds:g} seconds"


def _copy(memory: ReachedMemory, pull: _Pull, load: KVLoad) -> float | None:
    """Copy the blocks of a load, on a transfer thread. Return the seconds it took, None if it was stopped.

    Raises TransferError if no blocks of this producer can be read any more.
    """
    started = time.perf_counter()
    try:
        if pull.should_stop() or not memory.read(load.local, load.remote, pull.should_stop):
            return None
    except TransferError:
        raise
    except Exception as error:
        _logger.exception("A transfer failed.")
        raise TransferError(f"the transfer failed: {error}") from error
    return time.perf_counter() - started
