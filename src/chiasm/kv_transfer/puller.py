"""A consumer's side of the control channel: claims, copies and gives back, beside the engine.

One thread talks to all producers, and does nothing else, so that a claim never waits for a copy. A bounded pool of threads
copies. A short-lived thread makes each connection, since names may take time to resolve and hosts to answer.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import msgspec

from chiasm.errors import KVUnavailableError
from chiasm.kv_transfer.base import (
    FinishedTransfers,
    KVClaim,
    KVConnectorMetadata,
    KVConnectorStats,
    KVLayout,
    KVLoad,
    KVTransferConfig,
)
from chiasm.kv_transfer.control import (
    MAX_CLAIM_SECONDS,
    PROTOCOL_VERSION,
    Answer,
    Channel,
    ChannelClosed,
    Claim,
    Copied,
    Granted,
    Hello,
    Inbox,
    Question,
    Refused,
    Release,
    Welcome,
)
from chiasm.kv_transfer.memory import ReachedMemory

_logger = logging.getLogger(__name__)

MAX_IDLE_PEERS = 16
"""Producers whose connection and memory are kept while nothing is pulled from them."""


class _Address(NamedTuple):
    host: str
    port: int
    engine_id: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(eq=False)
class _Peer:
    """One producer. Its memory may be let go when it is lost and nothing reads any more."""

    address: _Address
    channel: Channel[Answer] | None = None
    memory: ReachedMemory | None = None
    pulls: dict[int, _Pull] = field(default_factory=dict)
    """By number; those that are over too, until they have been told to the producer."""
    answers_by: deque[float] = field(default_factory=deque)
    """Until when each question must be answered, in order."""
    num_reading: int = 0
    lost: bool = False

    @property
    def is_idle(self) -> bool:
        return not self.pulls and not self.num_reading and self.channel is not None


@dataclass(eq=False)
class _Pull:
    """One request's blocks, on their way."""

    claim: KVClaim
    number: int
    peer: _Peer
    begun: float
    remote_blocks: frozenset[int]
    granted: bool = False
    over: bool = False
    """Loaded, failed or dropped. Read by transfer threads too."""
    num_loaded: int = 0
    num_reading: int = 0
    waiting: list[KVLoad] = field(default_factory=list)
    checking: dict[int, _Read] = field(default_factory=dict)
    """Loads that were copied, by index, until the producer says that they are whole."""

    def should_stop(self) -> bool:
        return self.over or time.monotonic() >= self.claim.deadline


class _Greeted(NamedTuple):
    peer: _Peer
    channel: Channel[Answer]
    memory: ReachedMemory


class _NotGreeted(NamedTuple):
    peer: _Peer
    reason: str


class _Read(NamedTuple):
    """A transfer thread is done with a load, of which all was copied or ``failure`` says why not.

    ``is_broken``: nothing can be read from this producer any more, over the connection that there is.
    """

    pull: _Pull
    load: KVLoad
    seconds: float
    failure: str | None
    is_broken: bool


class Puller:
    """Pulls the blocks of this consumer's requests from any number of producers.

    ``reach`` makes a producer's memory readable, from its Welcome; it raises KVUnavailableError when it can't.
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
        self._lock = threading.Lock()  # of what finished
        self._finished = FinishedTransfers()
        self._news = False
        self._decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
        self._peers: dict[_Address, _Peer] = {}  # the one used last comes last
        self._pulls: dict[str, _Pull] = {}
        self._next_number = 0
        self._closing = False
        self._greeters: set[threading.Thread] = set()
        self._pool = ThreadPoolExecutor(max(1, config.max_parallel_transfers), thread_name_prefix="kv-transfer")
        self._inbox: Inbox[KVConnectorMetadata | _Greeted | _NotGreeted | _Read] = Inbox()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._inbox.socket, selectors.EVENT_READ, self._read_inbox)
        self._thread = threading.Thread(target=self._run, name="kv-pull", daemon=True)
        self._thread.start()

    def begin(self, metadata: KVConnectorMetadata) -> None:
        """Begin what the metadata says. Any thread; returns at once."""
        self._inbox.put(metadata)

    def take_finished(self) -> FinishedTransfers:
        """What came to an end since the last call. Any thread."""
        with self._lock:
            finished, self._finished = self._finished, FinishedTransfers()
        return finished

    def close(self) -> None:
        """Break everything off. When this returns nothing is written any more; idempotent."""
        if self._closing:
            return
        self._closing = True
        self._inbox.put(KVConnectorMetadata())
        self._thread.join()
        for greeter in list(self._greeters):
            greeter.join()
        self._pool.shutdown()
        for item in self._inbox.take():
            if isinstance(item, _Greeted):
                item.channel.close()
                item.memory.close()
            elif isinstance(item, _Read):
                self._end_read(item)
        self._inbox.close()

    # ---- the control thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(self._seconds_to_sleep()):
                key.data()
            now = time.monotonic()
            for peer in list(self._peers.values()):
                if peer.answers_by and peer.answers_by[0] <= now:
                    self._lose(peer, f"it did not answer within {self._config.connect_timeout_seconds:g} seconds")
            self._tell()
        for peer in list(self._peers.values()):
            self._lose(peer, "this instance stops")
        self._selector.close()

    def _seconds_to_sleep(self) -> float | None:
        now = time.monotonic()
        times = [peer.answers_by[0] - now for peer in self._peers.values() if peer.answers_by]
        return max(0.0, min(times)) if times else None

    def _tell(self) -> None:
        """Wake the engine if something has finished."""
        if self._news:
            self._news = False
            self._wake()

    def _read_inbox(self) -> None:
        for item in self._inbox.take():
            if isinstance(item, _Read):
                self._end_read(item)
            elif isinstance(item, _Greeted):
                self._welcome(item)
            elif isinstance(item, _NotGreeted):
                self._lose(item.peer, item.reason)
            else:
                for claim in item.claims:
                    self._claim(claim)
                for load in item.loads:
                    self._load(load)
                for request_id in item.dropped:
                    pull = self._pulls.get(request_id)
                    if pull is not None:
                        self._end(pull)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _claim(self, claim: KVClaim) -> None:
        params = claim.params
        address = _Address(params.remote_host or "", params.remote_port or 0, params.remote_engine_id or "")
        peer = self._peers.pop(address, None) or self._meet(address)
        self._peers[address] = peer
        self._next_number += 1
        blocks = frozenset(params.remote_block_ids or ())
        pull = _Pull(claim, self._next_number, peer, time.monotonic(), blocks)
        self._pulls[claim.request_id] = pull
        peer.pulls[pull.number] = pull
        if peer.channel is not None:
            self._ask_for(pull)

    def _ask_for(self, pull: _Pull) -> None:
        params = pull.claim.params
        seconds = min(max(0.0, pull.claim.deadline - time.monotonic()), MAX_CLAIM_SECONDS)
        claim = Claim(pull.number, params.remote_request_id or "", params.remote_block_ids or [], seconds)
        self._say(pull.peer, claim)

    def _load(self, load: KVLoad) -> None:
        pull = self._pulls.get(load.request_id)
        if pull is None:  # it failed already
            self._note_broken_off(load.request_id, load.index)
        elif not load.local:
            self._note_loaded(pull, load.index)
        elif not self._fits(pull, load):
            self._note_broken_off(load.request_id, load.index)
            self._fail(pull, "the load names blocks that are not the handle's, or not this instance's")
        elif pull.granted:
            self._read(pull, load)
        else:
            pull.waiting.append(load)

    def _fits(self, pull: _Pull, load: KVLoad) -> bool:
        return (
            len(load.local) == len(load.remote)
            and pull.remote_blocks.issuperset(load.remote)
            and min(load.local) >= 0
            and max(load.local) < self._num_blocks
        )

    def _read(self, pull: _Pull, load: KVLoad) -> None:
        pull.num_reading += 1
        pull.peer.num_reading += 1
        self._pool.submit(self._read_blocks, pull, load)

    def _read_blocks(self, pull: _Pull, load: KVLoad) -> None:
        """On a transfer thread."""
        memory = pull.peer.memory
        assert memory is not None, "nothing is granted before the producer's memory is reached"
        started = time.perf_counter()
        failure, is_broken = None, False
        try:
            if pull.should_stop() or not memory.read(load.local, load.remote, pull.should_stop):
                failure = "the request's deadline passed"
        except KVUnavailableError as error:
            failure, is_broken = error.message, True
        except Exception as error:
            _logger.exception("a transfer failed")
            failure, is_broken = f"the transfer failed: {error}", True
        self._inbox.put(_Read(pull, load, time.perf_counter() - started, failure, is_broken))

    def _end_read(self, read: _Read) -> None:
        pull, peer = read.pull, read.pull.peer
        pull.num_reading -= 1
        peer.num_reading -= 1
        if pull.over:
            self._note_broken_off(pull.claim.request_id, read.load.index)
            self._give_back(pull)
        elif read.failure is not None:
            self._note_broken_off(pull.claim.request_id, read.load.index)
            self._fail(pull, read.failure)
        else:
            pull.checking[read.load.index] = read
            self._say(peer, Copied(pull.number, read.load.index))
        if read.is_broken and read.failure is not None:
            self._lose(peer, read.failure)
        self._let_go_of_memory(peer)

    def _note_loaded(self, pull: _Pull, index: int) -> None:
        with self._lock:
            self._finished.loaded.add((pull.claim.request_id, index))
        self._news = True
        pull.num_loaded += 1
        if pull.num_loaded == pull.claim.num_loads:
            self._end(pull)

    def _note_broken_off(self, request_id: str, index: int) -> None:
        with self._lock:
            self._finished.broken_off.add((request_id, index))
        self._news = True

    def _fail(self, pull: _Pull, reason: str) -> None:
        if pull.over:
            return
        sentence = f"the KV cannot be had from the prefill instance at {pull.peer.address}: {reason}"
        self._stats.failures += 1
        with self._lock:
            self._finished.failed[pull.claim.request_id] = sentence
        self._news = True
        self._end(pull)

    def _end(self, pull: _Pull) -> None:
        """Nothing more comes of it; what waits is broken off, and what is read ends soon."""
        pull.over = True
        self._pulls.pop(pull.claim.request_id, None)
        for load in [*pull.waiting, *(read.load for read in pull.checking.values())]:
            self._note_broken_off(load.request_id, load.index)
        pull.waiting.clear()
        pull.checking.clear()
        self._give_back(pull)

    def _give_back(self, pull: _Pull) -> None:
        """Tell the producer, once nothing is read any more: some transports need its part until then."""
        if pull.peer.channel is not None and not pull.num_reading:
            pull.peer.pulls.pop(pull.number, None)
            self._say(pull.peer, Release(pull.number))

    # ---- producers --------------------------------------------------------------------------------------------------

    def _meet(self, address: _Address) -> _Peer:
        idle = [peer for peer in self._peers.values() if peer.is_idle]
        for peer in idle[: max(0, len(idle) - MAX_IDLE_PEERS + 1)]:
            self._lose(peer, "it was idle")
        peer = _Peer(address)
        greeter = threading.Thread(target=self._greet, args=(peer,), name="kv-greeting", daemon=True)
        self._greeters.add(greeter)
        greeter.start()
        return peer

    def _greet(self, peer: _Peer) -> None:
        """On a thread of its own: connect, introduce ourselves and reach the memory."""
        try:
            with contextlib.ExitStack() as undo:
                channel, welcome = self._connect(peer.address)
                undo.callback(channel.close)
                memory = self._reach(welcome)
                undo.pop_all()
            channel.socket.setblocking(False)
            self._inbox.put(_Greeted(peer, channel, memory))
        except KVUnavailableError as error:
            self._inbox.put(_NotGreeted(peer, error.message))
        except ChannelClosed as error:
            self._inbox.put(_NotGreeted(peer, f"it could not be talked to: {error}"))
        except (OSError, UnicodeError) as error:
            self._inbox.put(_NotGreeted(peer, f"it cannot be reached: {error}"))
        except Exception as error:
            _logger.exception("a prefill instance could not be greeted")
            self._inbox.put(_NotGreeted(peer, f"it cannot be reached: {error}"))
        finally:
            self._greeters.discard(threading.current_thread())

    def _connect(self, address: _Address) -> tuple[Channel[Answer], Welcome]:
        timeout = self._config.connect_timeout_seconds
        hello = Hello(
            PROTOCOL_VERSION, self._config.connector, address.engine_id, self._config.fingerprint, self._layout
        )
        connection = socket.create_connection((address.host, address.port), timeout)
        answer_by = time.monotonic() + timeout
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            channel = Channel(connection, self._decoder)
            channel.send(hello)
            while True:
                connection.settimeout(max(0.001, answer_by - time.monotonic()))
                for answer in channel.receive():
                    if isinstance(answer, Refused):
                        raise KVUnavailableError(answer.reason)
                    if not isinstance(answer, Welcome):
                        raise ChannelClosed("it answered before it was asked")
                    undo.pop_all()
                    return channel, answer

    def _welcome(self, greeted: _Greeted) -> None:
        peer, channel, memory = greeted
        if peer.lost:
            channel.close()
            memory.close()
            return
        peer.channel, peer.memory = channel, memory
        self._selector.register(channel.socket, selectors.EVENT_READ, partial(self._listen, peer))
        for pull in list(peer.pulls.values()):
            self._ask_for(pull)
            if pull.over:  # so that the producer's blocks are free at once
                self._give_back(pull)

    def _say(self, peer: _Peer, message: Question) -> None:
        if peer.channel is None:
            return
        try:
            peer.channel.send(message)
        except ChannelClosed as error:
            self._lose(peer, f"the connection broke: {error}")
        except ValueError as error:
            if isinstance(message, Claim):
                self._fail(peer.pulls[message.claim], str(error))
        else:
            if not isinstance(message, Release):
                peer.answers_by.append(time.monotonic() + self._config.connect_timeout_seconds)
            self._watch(peer)

    def _watch(self, peer: _Peer) -> None:
        """Hear of the socket's room too while something waits for it."""
        if peer.channel is not None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.channel.has_unsent else 0)
            key = self._selector.get_key(peer.channel.socket)
            if key.events != events:
                self._selector.modify(key.fileobj, events, key.data)

    def _listen(self, peer: _Peer) -> None:
        try:
            if peer.channel is not None:
                peer.channel.flush()
                for answer in peer.channel.receive():
                    self._hear(peer, answer)
            self._watch(peer)
        except ChannelClosed as error:
            self._lose(peer, f"the connection broke: {error}")
        except Exception:
            _logger.exception("an error in the control thread ends one connection")
            self._lose(peer, "an error here ended the connection")

    def _hear(self, peer: _Peer, answer: Answer) -> None:
        if isinstance(answer, Welcome) or not peer.answers_by or answer.claim is None:
            raise ChannelClosed("it answered what was not asked")
        peer.answers_by.popleft()
        pull = peer.pulls.get(answer.claim)
        if pull is None:  # over by now
            return
        if isinstance(answer, Refused):
            self._fail(pull, answer.reason)
        elif isinstance(answer, Granted):
            pull.granted = True
            self._stats.claim_seconds += time.monotonic() - pull.begun
            loads, pull.waiting = pull.waiting, []
            for load in loads:
                self._read(pull, load)
        elif answer.load in pull.checking:
            read = pull.checking.pop(answer.load)
            self._stats.transfers += 1
            self._stats.transferred_bytes += len(read.load.local) * self._layout.bytes_per_block
            self._stats.transfer_seconds += read.seconds
            self._note_loaded(pull, answer.load)

    def _lose(self, peer: _Peer, reason: str) -> None:
        """End the connection, if there is one, and fail what was to come over it."""
        if peer.lost:
            return
        peer.lost = True
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
        channel, peer.channel = peer.channel, None
        if channel is not None:
            self._selector.unregister(channel.socket)
            channel.close()
        peer.answers_by.clear()
        pulls, peer.pulls = peer.pulls, {}
        if pulls and not self._closing:
            _logger.warning("prefill instance %s at %s is given up: %s", peer.address.engine_id, peer.address, reason)
        for pull in pulls.values():
            self._fail(pull, reason)
        self._let_go_of_memory(peer)

    def _let_go_of_memory(self, peer: _Peer) -> None:
        if peer.lost and not peer.num_reading and peer.memory is not None:
            peer.memory.close()
            peer.memory = None
