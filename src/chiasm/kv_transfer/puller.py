"""The consumer's side of the control channel: claims blocks, has them copied, and gives them back.

One thread talks to all producers and does nothing else, so that a claim never waits for a copy. Other threads copy, resolve
names and map memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import msgspec

from chiasm.kv_transfer.base import (
    FinishedTransfers,
    KVClaim,
    KVConnectorMetadata,
    KVConnectorStats,
    KVLayout,
    KVLoad,
    KVTransferConfig,
)
from chiasm.kv_transfer.blocks import runs_of
from chiasm.kv_transfer.leases import LeaseRefused
from chiasm.kv_transfer.messages import (
    MAX_CLAIM_SECONDS,
    Claim,
    Copied,
    Granted,
    ProducerMessage,
    Refused,
    Release,
    Welcome,
    Whole,
    terms_of,
)
from chiasm.transfer.channel import Channel, ChannelClosed, ControlThread, start_task
from chiasm.transfer.errors import TransferError
from chiasm.transfer.greeting import open_channel
from chiasm.transfer.memory import Peer, ReachedMemory

_logger = logging.getLogger(__name__)

MAX_IDLE_PRODUCERS = 16
"""Producers whose connection and memory are kept although nothing is pulled from them."""
_MAX_CONNECTING = 32  # threads that resolve names and map memory
_DECODER: msgspec.msgpack.Decoder[ProducerMessage] = msgspec.msgpack.Decoder(ProducerMessage)


class _Address(NamedTuple):
    host: str
    port: int
    engine_id: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(eq=False)
class _Producer:
    """One producer, from the first request for its blocks until the connection is lost."""

    address: _Address
    task: asyncio.Task[None] | None = None
    """Connects, and then receives the answers."""
    channel: Channel[ProducerMessage] | None = None
    memory: ReachedMemory | None = None
    num_blocks: int = 0
    """Number of blocks in its memory."""
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there are a channel and memory, or when it is lost."""
    lost: bool = False
    questions: deque[tuple[Granted | Whole, asyncio.Future[None]]] = field(default_factory=deque)
    """The good answer to each open question, in order, and what waits for it."""
    pulls: set[_Pull] = field(default_factory=set)
    """The pulls whose blocks have not been given back."""


@dataclass(eq=False)
class _Pull:
    """The transfer of one request's blocks."""

    claim: KVClaim
    number: int
    """Number of the claim on the connection to the producer."""
    producer: _Producer
    begun: float
    remote_blocks: frozenset[int]
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the grant, or at the end."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when everything is loaded, when it failed, or when the request was dropped."""
    num_loaded: int = 0
    waiting: dict[int, KVLoad] = field(default_factory=dict)
    """The loads, by index, that have not ended and into whose blocks nothing is being copied."""
    copies: set[asyncio.Future[float | None]] = field(default_factory=set)

    def should_stop(self) -> bool:
        """Return whether copying is of no use any more. Called on transfer threads."""
        return self.over.is_set() or time.monotonic() >= self.claim.deadline


class Puller:
    """Pulls the blocks of this consumer's requests from any number of producers.

    ``reach`` makes a producer's memory readable, given its place and description; it runs on any thread and raises
    TransferError if it can't. ``wake`` is called, on the control thread, when :meth:`take_finished` has something new.
    """

    def __init__(
        self,
        config: KVTransferConfig,
        layout: KVLayout,
        num_blocks: int,
        reach: Callable[[Peer, bytes], ReachedMemory],
        stats: KVConnectorStats,
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._block_bytes = layout.bytes_per_block
        self._terms = terms_of(config, layout)
        self._num_blocks = num_blocks
        self._reach = reach
        self._stats = stats
        self._wake = wake
        self._lock = threading.Lock()  # guards _finished
        self._finished = FinishedTransfers()
        self._will_wake = False
        self._producers: dict[_Address, _Producer] = {}  # the least recently used comes first
        self._pulls: dict[str, _Pull] = {}
        self._claim_numbers = itertools.count(1)
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

    def _start(self, producer: _Producer, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` as a task. If it raises, the producer is lost."""
        return start_task(self._tasks, work, partial(self._lose, producer), thread="KV control thread")

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
        blocks = frozenset(params.remote_block_ids or ())
        pull = _Pull(claim, next(self._claim_numbers), producer, time.monotonic(), blocks)
        self._pulls[claim.request_id] = pull
        producer.pulls.add(pull)
        self._start(producer, self._pull(pull))

    async def _pull(self, pull: _Pull) -> None:
        """Claim a request's blocks, and give them back when the pull is over and nothing reads them.

        Some transports need the producer's part in a read until its end. A request that was dropped early is claimed all
        the same: giving its blocks back frees them before their lease ends.
        """
        producer, params = pull.producer, pull.claim.params
        await producer.reached.wait()
        if producer.channel is None or producer.lost:
            return
        seconds = min(max(0.0, pull.claim.deadline - time.monotonic()), MAX_CLAIM_SECONDS)
        claim = Claim(pull.number, params.remote_request_id or "", params.remote_block_ids or [], seconds)
        if await self._ask(pull, claim, Granted(pull.number)):
            self._stats.claim_seconds += time.monotonic() - pull.begun
            pull.granted.set()
        await pull.over.wait()
        if pull.copies:
            await asyncio.wait(pull.copies)
        producer.pulls.discard(pull)
        producer.channel.send(Release(pull.number))

    async def _ask(self, pull: _Pull, question: Claim | Copied, good_answer: Granted | Whole) -> bool:
        """Return whether the producer gives this answer. If it doesn't, the pull has failed."""
        producer, answer = pull.producer, asyncio.get_running_loop().create_future()
        assert producer.channel is not None
        try:
            producer.channel.send(question)
            producer.questions.append((good_answer, answer))
            async with asyncio.timeout(self._config.connect_timeout_seconds):
                await answer
        except (LeaseRefused, ValueError) as error:
            self._fail(pull, str(error))
        except TimeoutError:
            self._lose(producer, self._no_answer)
        except TransferError as error:
            self._lose(producer, str(error))
        else:
            return True
        return False

    def _begin_load(self, load: KVLoad) -> None:
        pull = self._pulls.get(load.request_id)
        if pull is None:  # it failed already
            self._note(FinishedTransfers(broken_off={load.key}))
        elif not load.local:
            self._end_load(pull, load)
        else:
            pull.waiting[load.index] = load
            if (
                len(load.local) == len(load.remote)
                and pull.remote_blocks.issuperset(load.remote)
                and min(load.local) >= 0
                and max(load.local) < self._num_blocks
            ):
                self._start(pull.producer, self._load(pull, load))
            else:
                self._fail(pull, "the load names blocks that the handle or this instance doesn't have")

    async def _load(self, pull: _Pull, load: KVLoad) -> None:
        """Copy the blocks of one load, and ask the producer whether it still held them at the end."""
        await pull.granted.wait()
        if pull.over.is_set():
            return  # the load is broken off
        producer = pull.producer
        if max(load.remote) >= producer.num_blocks:
            raise TransferError("it granted a block that it does not have")
        assert producer.memory is not None, "nothing is granted before the memory is reached"
        del pull.waiting[load.index]
        copying = asyncio.get_running_loop().run_in_executor(self._pool, self._copy, producer.memory, pull, load)
        pull.copies.add(copying)
        try:
            seconds = await copying
        except TransferError as error:
            seconds = None
            self._lose(producer, str(error))
        pull.copies.discard(copying)
        self._close_memory_if_unused(producer)
        if pull.over.is_set() or seconds is None:
            self._note(FinishedTransfers(broken_off={load.key}))
            self._fail(pull, "the request's deadline passed")
            return
        pull.waiting[load.index] = load
        is_whole = await self._ask(pull, Copied(pull.number, load.index), Whole(pull.number, load.index))
        if is_whole and pull.waiting.pop(load.index, None) is not None:
            self._stats.transfers += 1
            self._stats.transferred_bytes += len(load.local) * self._block_bytes
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
        idle = [producer for producer in self._producers.values() if producer.reached.is_set() and not producer.pulls]
        for producer in idle[: max(0, len(idle) - MAX_IDLE_PRODUCERS + 1)]:
            self._lose(producer, "it was idle")
        producer = _Producer(address)
        producer.task = self._start(producer, self._converse(producer))
        return producer

    async def _converse(self, producer: _Producer) -> None:
        """Connect to a producer, reach its memory, and hand out its answers until the connection ends."""
        address, timeout = producer.address, self._config.connect_timeout_seconds
        peer = Peer(address.host, address.port)
        producer.channel = channel = await open_channel(peer, address.engine_id, self._terms, _DECODER, timeout)
        try:
            async with asyncio.timeout(timeout):
                welcome = await channel.receive()
        except TimeoutError:
            raise TransferError(self._no_answer) from None
        if not isinstance(welcome, Welcome):
            raise ChannelClosed("its first message is no welcome")
        memory = await asyncio.get_running_loop().run_in_executor(None, self._reach, peer, welcome.memory)
        if producer.lost:
            memory.close()
            return
        producer.memory, producer.num_blocks = memory, welcome.num_blocks
        producer.reached.set()
        while True:
            message = await channel.receive()
            if not producer.questions:
                raise ChannelClosed("it sent an answer without a question")
            good_answer, answer = producer.questions[0]
            refused = isinstance(message, Refused) and message.claim == good_answer.claim
            if message != good_answer and not refused:
                raise ChannelClosed("its answer belongs to another question")
            producer.questions.popleft()
            if answer.done():  # it comes too late, and the producer is about to be lost
                continue
            if isinstance(message, Refused):
                answer.set_exception(LeaseRefused(message.reason))
            else:
                answer.set_result(None)

    def _lose(self, producer: _Producer, reason: str) -> None:
        """End the connection to a producer, and fail the pulls that depend on it."""
        if producer.lost:
            return
        producer.lost = True
        producer.reached.set()
        if self._producers.get(producer.address) is producer:
            del self._producers[producer.address]
        if producer.channel is not None:
            producer.channel.close()
        if producer.pulls and not self._closing:
            engine_id, address = producer.address.engine_id, producer.address
            _logger.warning("Gave up prefill instance %s at %s: %s.", engine_id, address, reason)
        self._close_memory_if_unused(producer)  # before anybody hears of it
        for pull in producer.pulls:
            self._fail(pull, reason)
        for _, answer in producer.questions:
            if not answer.done():
                answer.set_exception(TransferError(reason))

    def _close_memory_if_unused(self, producer: _Producer) -> None:
        is_read = any(pull.copies for pull in producer.pulls)
        if producer.lost and not is_read and producer.memory is not None:
            producer.memory.close()
            producer.memory = None

    @property
    def _no_answer(self) -> str:
        return f"it did not answer within {self._config.connect_timeout_seconds:g} seconds"

    def _copy(self, memory: ReachedMemory, pull: _Pull, load: KVLoad) -> float | None:
        """Copy the blocks of a load, on a transfer thread. Return the seconds it took, None if it was stopped.

        Raises TransferError if no blocks of this producer can be read any more.
        """
        runs = runs_of(load.local, load.remote, self._block_bytes)
        started = time.perf_counter()
        try:
            if pull.should_stop() or not memory.read(runs, pull.should_stop):
                return None
        except TransferError:
            raise
        except Exception as error:
            _logger.exception("A transfer failed.")
            raise TransferError(f"the transfer failed: {error}") from error
        return time.perf_counter() - started
