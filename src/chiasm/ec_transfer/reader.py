"""The reader's side: brings in the embeddings that requests want, on threads of its own.

One thread talks to all holders and does nothing else. Other threads read, verify and copy to the device, and reach holders.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from chiasm.cores import ARRIVAL_NICE, lower_priority
from chiasm.ec_transfer.base import ECConnectorStats
from chiasm.ec_transfer.peer_messages import Here, HolderMessage, Take, Want, Welcome
from chiasm.ec_transfer.sources import Arrived, EntryUnusable, Source
from chiasm.ec_transfer.wake import Wake
from chiasm.ec_transfer.wants import Read, Send, WantTable, Wish
from chiasm.transfer.channel import Channel, ChannelClosed, ControlThread, start_task
from chiasm.transfer.errors import TransferError
from chiasm.transfer.greeting import Terms, open_channel
from chiasm.transfer.memory import Peer
from chiasm.wire import ECPlace

_logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""How long a holder may take to answer when it is greeted or asked for a grant. It is asked by nobody's model."""
MAX_IDLE_HOLDERS = 16
"""Holders whose connection and memory are kept although nothing is wanted from them."""
MAX_HOLDERS = 256
MAX_READING = 2
"""Embeddings that are read at the same time."""
_MAX_CONNECTING = 16
_MEETING_SECONDS = 1.0
"""So long at most, what is wanted of a holder that is being met counts as coming: it can't have said yet that it has it."""
_SLOWEST_BYTES_PER_SECOND = 10e6
_NO_ANSWER = f"it did not answer within {ANSWER_SECONDS:g} seconds"
_DECODER: msgspec.msgpack.Decoder[HolderMessage] = msgspec.msgpack.Decoder(HolderMessage)


@dataclass(eq=False)
class _Holder:
    """One holder, from the first embedding that is wanted from it until the connection ends."""

    place: ECPlace
    task: asyncio.Task[None] | None = None
    channel: Channel[HolderMessage] | None = None
    source: Source | None = None
    unsent: list[msgspec.Struct] = field(default_factory=list)
    """What is to be said as soon as there is a channel."""
    lost: bool = False
    unanswered: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    """What ends the connection unless a grant is answered in time, by identifier."""
    num_reads: int = 0

    def __str__(self) -> str:
        return f"{self.place.engine_id} at {self.place.host}:{self.place.port}"


class Reader:
    """Brings in embeddings from any number of holders. All methods may be called from any thread and return at once.

    ``reach`` makes a holder's memory readable, given its Welcome; it runs on any thread and raises TransferError. ``wake`` can
    be set; it is called, on any of the reader's threads, with the identifier of what has arrived, or when something was lost.
    ``row_bytes`` is the size of one row of an embedding; 0 if it isn't known.
    """

    def __init__(
        self,
        terms: Terms,
        capacity_bytes: int,
        reach: Callable[[Peer, Welcome], Source],
        stats: ECConnectorStats,
        *,
        row_bytes: int,
    ) -> None:
        self._terms = terms
        self._reach = reach
        self.stats = stats
        self.wake: Wake = lambda arrived="", /: None
        self._lock = threading.Lock()  # guards the table
        self._table: WantTable[Arrived] = WantTable(capacity_bytes, terms.values["fingerprint"], row_bytes=row_bytes)
        self._holders: dict[ECPlace, _Holder] = {}  # the least recently used comes first
        self._silent_until: dict[ECPlace, float] = {}
        """Until when holders that have said nothing can't have answered what they were asked first. Guarded like the table."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._freed: asyncio.Future[None]
        """Done when memory may be free again, or when somebody who waits for it should look again why."""
        self._closing = False
        self._pool = ThreadPoolExecutor(MAX_READING, "ec-read", initializer=lower_priority, initargs=(ARRIVAL_NICE,))
        self._control = ControlThread("ec-reader", self._run)

    # ---- any thread ---------------------------------------------------------------------------------------------------

    def expect(self, places: Mapping[str, ECPlace]) -> None:
        with self._changing() as table:
            table.expect(places)

    def want(self, request_id: str, wishes: Iterable[Wish]) -> None:
        with self._changing() as table:
            table.want(request_id, wishes)

    def finish(self, request_id: str, identifiers: Iterable[str]) -> None:
        with self._changing() as table:
            table.finish(request_id, identifiers)
        self._control.call(self._retry)

    def ask(self, identifier: str) -> bool:
        with self._changing() as table:
            return table.ask(identifier)

    def end_round(self) -> None:
        with self._changing() as table:
            table.end_round()

    def ready(self, identifier: str) -> Arrived | None:
        with self._lock:
            return self._table.ready(identifier)

    def is_coming(self, identifier: str) -> bool:
        with self._lock:
            if self._table.is_coming(identifier):
                return True
            now = time.monotonic()
            return any(now < self._silent_until.get(place, now) for place in self._table.places_of(identifier))

    def take(self, identifier: str) -> Arrived | None:
        with self._changing() as table:
            return table.take(identifier)

    def bring_back(self, identifier: str, arrived: Arrived) -> None:
        with self._lock:
            self._table.bring_back(identifier, arrived, arrived.tensor.nbytes)

    def reject(self, identifier: str, reason: str) -> None:
        _logger.warning("The embedding of item %s was rejected: %s.", identifier, reason)
        with self._changing() as table:
            table.reject(identifier)

    def memory_freed(self) -> None:
        """Read what had no memory."""
        self._control.call(self._retry)

    def close(self) -> None:
        """Break everything off. When this returns nothing is written any more; idempotent."""
        self._control.close()
        self._pool.shutdown()

    @contextmanager
    def _changing(self) -> Iterator[WantTable[Arrived]]:
        """Change the table, and wake the control thread if there is something to do for it then."""
        with self._lock:
            yield self._table
            has_work = self._table.has_work
        if has_work:
            self._control.call(self._act)

    # ---- the control thread -------------------------------------------------------------------------------------------

    async def _run(self, closing: asyncio.Event) -> None:
        self._freed = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MAX_CONNECTING, "ec-connect"))
        await closing.wait()
        self._closing = True
        self._retry()
        for holder in list(self._holders.values()):
            self._lose(holder, "this instance stops")
            if holder.channel is None and holder.task is not None:
                holder.task.cancel()  # it connects
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, holder: _Holder, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` as a task. If it raises, the holder is lost."""
        return start_task(self._tasks, work, partial(self._lose, holder), thread="thread that reads embeddings")

    def _act(self) -> None:
        """Do what the table says."""
        with self._lock:
            sends, reads = self._table.take_sends(), self._table.take_reads()
        for read in reads:  # before a holder may be lost by sending, and met anew
            holder = self._holders[read.place]
            holder.num_reads += 1
            self._start(holder, self._read(holder, read))
        for send in sends:
            self._send(send)

    def _send(self, send: Send) -> None:
        if self._closing:
            return
        holder = self._holders.pop(send.place, None)
        if holder is None:
            if not isinstance(send.message, Want):
                return
            holder = self._meet(send.place)
        self._holders[send.place] = holder
        if holder.channel is None or holder.source is None:
            holder.unsent.append(send.message)
            return
        try:
            holder.channel.send(send.message)
        except ChannelClosed as error:
            self._lose(holder, str(error))
            return
        if isinstance(send.message, Take):
            timer = asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._lose, holder, _NO_ANSWER)
            holder.unanswered[send.message.identifier] = timer

    async def _read(self, holder: _Holder, read: Read) -> None:
        """Bring in an entry that was granted, as soon as there is memory for it."""
        assert holder.source is not None
        source, give_up = holder.source, math.inf

        def is_of_no_use() -> bool:
            return holder.lost or self._closing or not self._is_wanted(read)

        def stop() -> bool:
            return time.monotonic() > give_up or is_of_no_use()

        def bring() -> bool:
            nonlocal give_up  # begins when its turn has come, since what others take is not this holder's fault
            give_up = time.monotonic() + ANSWER_SECONDS + read.num_bytes / _SLOWEST_BYTES_PER_SECOND
            return self._bring(source, read, stop)

        is_here = False
        try:
            while not is_here and not is_of_no_use():
                freed = self._freed
                if source.is_quick(read):
                    is_here = bring()
                else:
                    is_here = await asyncio.get_running_loop().run_in_executor(self._pool, bring)
                if not is_here and time.monotonic() > give_up:
                    raise TransferError("reading from it took too long")
                if not is_here and not is_of_no_use():
                    await asyncio.wait([freed])
            if not is_here:
                self._fail(read)
        except EntryUnusable as error:
            _logger.warning("The embedding of item %s from %s was rejected: %s.", read.header.identifier, holder, error)
            self._fail(read, bad=error.bad)
        except TransferError as error:
            self._fail(read)
            self._lose(holder, str(error))
        finally:
            holder.num_reads -= 1
            self._close_if_unused(holder)
        self._act()

    def _bring(self, source: Source, read: Read, stop: Callable[[], bool]) -> bool:
        """Bring an entry in, on any thread, and wake the engine. Return whether the entry is here.

        Raises EntryUnusable and TransferError, and nothing else.
        """
        try:
            arrived = None if stop() else source.bring(read, stop)
        except (EntryUnusable, TransferError):
            raise
        except Exception as error:
            _logger.exception("Reading an embedding failed.")
            raise TransferError(f"reading failed: {error}") from error
        if arrived is None:
            return False
        with self._lock:
            matters = self._table.arrived(read, arrived)
        if matters and not self._closing:
            self.wake(read.header.identifier)
        return True

    def _fail(self, read: Read, *, bad: bool = False) -> None:
        """Note that an entry could not be brought in."""
        with self._lock:
            matters = self._table.failed(read, bad=bad)
            self.stats.load_failures += matters
            self.stats.corrupt_entries += bad
        self._act()
        if matters and not self._closing:
            self.wake()

    def _is_wanted(self, read: Read) -> bool:
        with self._lock:
            return self._table.is_wanted(read)

    def _retry(self) -> None:
        """Let those who wait for memory look again."""
        freed, self._freed = self._freed, asyncio.get_running_loop().create_future()
        freed.set_result(None)

    # ---- holders ------------------------------------------------------------------------------------------------------

    def _meet(self, place: ECPlace) -> _Holder:
        with self._lock:
            in_use = self._table.places_in_use()
        idle = [holder for holder in self._holders.values() if holder.place not in in_use and not holder.num_reads]
        for other in idle[: max(0, len(idle) - MAX_IDLE_HOLDERS + 1)]:
            self._disconnect(other)  # nothing is lost: it may have what is expected there
        holder = _Holder(place)
        self._holders[place] = holder
        with self._lock:
            self._silent_until[place] = time.monotonic() + _MEETING_SECONDS
        holder.task = self._start(holder, self._converse(holder))
        return holder

    async def _converse(self, holder: _Holder) -> None:
        """Connect to a holder, reach its memory, and hear what it says until the connection ends."""
        if len(self._holders) > MAX_HOLDERS:
            raise TransferError(f"embeddings come from {MAX_HOLDERS} encoders already")
        place, began = holder.place, time.monotonic()
        peer = Peer(place.host, place.port)
        channel = await open_channel(peer, place.engine_id, self._terms, _DECODER, ANSWER_SECONDS)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                welcome = await channel.receive()
            if not isinstance(welcome, Welcome):
                raise ChannelClosed("it said something else than welcome")
            source = await asyncio.get_running_loop().run_in_executor(None, self._reach, peer, welcome)
            if holder.lost:
                source.close()
                return
            holder.channel, holder.source = channel, source
            for message in holder.unsent:
                channel.send(message)
            holder.unsent.clear()
            now = time.monotonic()
            with self._lock:  # an answer takes less time than the greeting has taken
                self._silent_until[place] = min(2 * now - began, self._silent_until[place])
            while True:
                message = await channel.receive()
                if holder.lost:  # what came before counts no more
                    return
                self._hear(holder, message)
                await asyncio.sleep(0)  # take turns
        except TimeoutError:
            raise TransferError(_NO_ANSWER) from None
        finally:
            channel.close()

    def _hear(self, holder: _Holder, message: HolderMessage) -> None:
        if isinstance(message, Welcome):
            raise ChannelClosed("it said welcome twice")
        with self._lock:
            self._silent_until.pop(holder.place, None)
        timer = holder.unanswered.pop(message.identifier, None)
        if timer is not None:
            timer.cancel()
        if isinstance(message, Here):
            with self._lock:
                reason = self._table.here(holder.place, message)
            if reason is not None:
                self.stats.load_failures += 1
                _logger.warning("The embedding of item %s at %s can't be used: %s.", message.identifier, holder, reason)
            is_lost = reason is not None
        else:
            with self._lock:
                is_lost = self._table.gone(holder.place, message.identifier)
        self._act()
        if is_lost:
            self.wake()

    def _lose(self, holder: _Holder, reason: str) -> None:
        """End the connection to a holder. What was to come from there has to come from elsewhere."""
        if holder.lost:
            return
        self._disconnect(holder)
        with self._lock:
            lost = self._table.lose(holder.place)
        if (lost or holder.num_reads) and not self._closing:
            _logger.warning("Gave up encoder %s: %s.", holder, reason)
        self._retry()
        self._act()
        if lost and not self._closing:
            self.wake()

    def _disconnect(self, holder: _Holder) -> None:
        holder.lost = True
        if self._holders.get(holder.place) is holder:
            del self._holders[holder.place]
            with self._lock:
                self._silent_until.pop(holder.place, None)
        for timer in holder.unanswered.values():
            timer.cancel()
        if holder.channel is not None:
            holder.channel.close()
        self._close_if_unused(holder)

    def _close_if_unused(self, holder: _Holder) -> None:
        if holder.lost and not holder.num_reads and holder.source is not None:
            holder.source.close()
            holder.source = None
