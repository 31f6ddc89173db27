"""The producer's side of the control channel: grants claims and ends leases, on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable

import msgspec

from chiasm.kv_transfer.base import KVConnectorStats, KVLayout, KVSend, KVTransferConfig
from chiasm.kv_transfer.blocks import ranges_of
from chiasm.kv_transfer.leases import LeaseRefused, LeaseTable
from chiasm.kv_transfer.messages import (
    Claim,
    ConsumerMessage,
    Copied,
    Granted,
    Refused,
    Welcome,
    Whole,
    terms_of,
)
from chiasm.tasks import end_tasks
from chiasm.transfer.channel import Channel, ChannelClosed, ControlThread
from chiasm.transfer.listener import Listener
from chiasm.transfer.memory import OfferedMemory

_logger = logging.getLogger(__name__)

_DECODER: msgspec.msgpack.Decoder[ConsumerMessage] = msgspec.msgpack.Decoder(ConsumerMessage)


class LeaseServer:
    """Holds blocks for the consumers that get the handles.

    Listens from the start. Raises ConfigurationError if it can't. Calls ``wake``, on its own thread, when
    :meth:`take_sent` has something new.
    """

    def __init__(
        self,
        config: KVTransferConfig,
        layout: KVLayout,
        num_blocks: int,
        memory: OfferedMemory,
        stats: KVConnectorStats,
        wake: Callable[[], None],
    ) -> None:
        self._block_bytes = layout.bytes_per_block
        self._num_blocks = num_blocks
        self._memory = memory
        self._stats = stats
        self._wake = wake
        self._lock = threading.Lock()  # guards the table, the stats and _sent
        self._table = LeaseTable(config.lease_seconds)
        self._sent: set[str] = set()
        self._claims: dict[tuple[int, int], str] = {}
        """The request of each claim that was granted and not given back, by holder and the number that it chose. While
        there are any, somebody may be reading: a consumer that has stopped reading gives back even a claim that it has lost."""
        self._expiry_changed = asyncio.Event()
        self._claimed = asyncio.Event()
        self._listener = Listener(
            config.host,
            config.port,
            config.engine_id,
            terms_of(config, layout),
            memory,
            _DECODER,
            greeting_seconds=config.connect_timeout_seconds,
            option="--kv",
        )
        self.port = self._listener.port
        self._control = ControlThread("kv-leases", self._run)

    def hold(self, sends: Iterable[KVSend]) -> None:
        """Begin leases. A claim that comes after this has returned is granted. Any thread."""
        now = time.monotonic()
        with self._lock:
            for send in sends:
                self._table.hold(send.request_id, send.block_ids, now)
            self._stats.leases_held = len(self._table)
        self._control.call(self._expiry_changed.set)

    def give_back(self, request_ids: Iterable[str]) -> None:
        """End the leases of these requests that nobody has claimed. Any thread."""
        with self._lock:
            ended = [request_id for request_id in request_ids if self._table.give_back(request_id)]
        if ended:
            self._control.call(self._report, ended)

    def take_sent(self) -> set[str]:
        """Return the requests whose leases ended since the last call. Any thread."""
        with self._lock:
            sent, self._sent = self._sent, set()
        return sent

    def close(self) -> None:
        """Stop listening and end all connections. Called once."""
        self._control.close()
        self._memory.close()

    # ---- the control thread -----------------------------------------------------------------------------------------

    async def _run(self, closing: asyncio.Event) -> None:
        expiry = asyncio.create_task(self._expire())
        await self._listener.run(closing, self._serve, self._release_all, is_read=self._claimed)
        await end_tasks(expiry)

    async def _expire(self) -> None:
        """End each lease when its time is over."""
        while True:
            self._expiry_changed.clear()
            with self._lock:
                next_expiry = self._table.next_expiry
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next_expiry):  # the loop's clock is time.monotonic
                    await self._expiry_changed.wait()
            with self._lock:
                expired = self._table.expire(time.monotonic())
            for (holder, claim), request_id in self._claims.items():
                if request_id in expired:
                    self._memory.withdraw(holder, claim)
            if expired:
                _logger.warning("Nobody fetched the KV of %s in time; its blocks are free again.", ", ".join(expired))
            self._report(expired, num_expired=len(expired))

    async def _serve(self, holder: int, channel: Channel[ConsumerMessage]) -> None:
        """Talk to one consumer until its connection ends or has to end."""
        channel.send(Welcome(self._num_blocks, self._memory.describe(holder)))
        while True:
            self._answer(holder, channel, await channel.receive())
            await asyncio.sleep(0)  # take turns: a message that is here already is received without waiting

    def _release_all(self, holder: int) -> None:
        """The connection of a consumer has ended: release what was claimed on it."""
        self._claims = {key: request_id for key, request_id in self._claims.items() if key[0] != holder}
        with self._lock:
            released = self._table.release_all(holder)
        self._report(released, num_expired=len(released))

    def _answer(self, holder: int, channel: Channel[ConsumerMessage], message: ConsumerMessage) -> None:
        if isinstance(message, Claim):
            if (holder, message.claim) in self._claims:
                raise ChannelClosed("two claims came with the same number")
            channel.send(self._claim(holder, message))
        elif isinstance(message, Copied):
            request_id = self._claims.get((holder, message.claim), "")
            with self._lock:
                is_whole = self._table.is_claimed(request_id, holder, time.monotonic())
            lost = Refused(message.claim, "the blocks were taken back, because the request's deadline passed")
            channel.send(Whole(message.claim, message.load) if is_whole else lost)
        else:
            request_id = self._claims.pop((holder, message.claim), "")
            self._memory.withdraw(holder, message.claim)
            with self._lock:
                released = self._table.release(request_id, holder)
            self._report([request_id] if released else [])

    def _claim(self, holder: int, claim: Claim) -> Granted | Refused:
        try:
            with self._lock:
                self._table.claim(claim.request_id, claim.block_ids, holder, claim.seconds_left, time.monotonic())
        except LeaseRefused as error:
            return Refused(claim.claim, str(error))
        self._claims[holder, claim.claim] = claim.request_id
        self._memory.grant(holder, claim.claim, ranges_of(claim.block_ids, self._block_bytes))
        self._claimed.set()
        self._expiry_changed.set()
        return Granted(claim.claim)

    def _report(self, ended: list[str], num_expired: int = 0) -> None:
        """Tell the engine that the leases of these requests have ended."""
        if not self._claims:
            self._claimed.clear()
        if ended:
            with self._lock:
                self._sent.update(ended)
                self._stats.leases_held = len(self._table)
                self._stats.leases_expired += num_expired
            self._wake()
