"""The producer's side of the control channel: grants claims and ends leases, on a thread of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from socket import socket

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.http.listen import BACKLOG, bind
from chiasm.kv_transfer.base import KVConnectorStats, KVLayout, KVSend, KVTransferConfig, OfferedMemory
from chiasm.kv_transfer.control import (
    PROTOCOL_VERSION,
    READ_AHEAD_BYTES,
    Channel,
    ChannelClosed,
    Claim,
    ConsumerMessage,
    ControlThread,
    Copied,
    Granted,
    Hello,
    Refused,
    Release,
    Welcome,
    Whole,
)
from chiasm.kv_transfer.leases import LeaseRefused, LeaseTable

_logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
_ANY_ADDRESS = frozenset({"", "0.0.0.0", "::", "*"})
_DECODER: msgspec.msgpack.Decoder[ConsumerMessage] = msgspec.msgpack.Decoder(ConsumerMessage)


@dataclass(eq=False)
class _Connection:
    """One consumer. ``number`` is the holder of its leases."""

    number: int
    channel: Channel[ConsumerMessage]
    claims: dict[int, str] = field(default_factory=dict)
    """The requests that it has claimed and not given back, by its own numbers for the claims."""


class LeaseServer:
    """Holds blocks for whoever comes with the handle.

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
        self._config = config
        self._layout = layout
        self._welcome = Welcome(num_blocks, memory.description())
        self._memory = memory
        self._stats = stats
        self._wake = wake
        self._lock = threading.Lock()  # guards the table, the leases in the stats, and _sent
        self._table = LeaseTable(config.lease_seconds)
        self._sent: set[str] = set()
        self._connections: dict[int, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_number = 0
        self._expiry_changed = asyncio.Event()
        self._claimed = asyncio.Event()
        """Set while something is claimed, so that somebody may be reading. A consumer gives back even a claim that it
        has lost, as soon as it has stopped reading."""
        self._listener: socket = _bind(config.host, config.port)
        self.port: int = self._listener.getsockname()[1]
        self._control = ControlThread("kv-leases", self._run)

    def hold(self, sends: Iterable[KVSend]) -> None:
        """Begin leases. A claim that comes after this has returned is granted. Any thread."""
        now = time.monotonic()
        with self._lock:
            for send in sends:
                self._table.hold(send.request_id, send.block_ids, now)
            self._stats.leases_held = len(self._table)
        self._control.call(self._expiry_changed.set)

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
        server = await asyncio.start_server(self._accept, sock=self._listener, backlog=BACKLOG, limit=READ_AHEAD_BYTES)
        async with asyncio.TaskGroup() as tasks:
            timers = [tasks.create_task(self._expire()), tasks.create_task(self._progress())]
            await closing.wait()
            for timer in timers:
                timer.cancel()
        server.close()
        for connection in self._connections.values():
            connection.channel.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _expire(self) -> None:
        """End each lease when its time is over."""
        while True:
            self._expiry_changed.clear()
            with self._lock:
                next_expiry = self._table.next_expiry
            try:
                async with asyncio.timeout_at(next_expiry):  # the loop's clock is time.monotonic
                    await self._expiry_changed.wait()
            except TimeoutError:
                pass
            with self._lock:
                expired = self._table.expire(time.monotonic())
                self._stats.leases_expired += len(expired)
            if expired:
                _logger.warning("Nobody fetched the KV of %s in time; its blocks are free again.", ", ".join(expired))
                self._report(expired)

    async def _progress(self) -> None:
        """Do the transport's part while somebody may be reading."""
        if self._memory.progress_seconds is not None:
            while True:
                await self._claimed.wait()
                self._memory.progress()
                await asyncio.sleep(self._memory.progress_seconds)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            _logger.warning("A decode instance was turned away: there are %d connections already.", MAX_CONNECTIONS)
            writer.transport.abort()
            return
        self._next_number += 1
        connection = _Connection(self._next_number, Channel(reader, writer, _DECODER))
        self._connections[connection.number] = connection
        task = asyncio.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: _Connection) -> None:
        """Talk to one consumer until its connection ends, and release what it has claimed."""
        reason = "an error here"
        try:
            async with asyncio.timeout(self._config.connect_timeout_seconds):
                hello = await connection.channel.receive()
            self._greet(connection, hello)
            while True:
                self._answer(connection, await connection.channel.receive())
                await asyncio.sleep(0)  # take turns: a message that is here already is received without waiting
        except TimeoutError:
            reason = "it did not say hello in time"
        except ChannelClosed as error:
            reason = str(error)
        except Exception:
            _logger.exception("An error in the KV control thread ends one connection.")
        finally:
            _logger.debug("Connection %d of a decode instance ended: %s.", connection.number, reason)
            del self._connections[connection.number]
            connection.channel.close()
            with self._lock:
                released = self._table.release_all(connection.number)
                self._stats.leases_expired += len(released)
            self._report(released)

    def _greet(self, connection: _Connection, hello: ConsumerMessage) -> None:
        if not isinstance(hello, Hello):
            raise ChannelClosed("a question came before the greeting")
        difference = self._difference(hello)
        if difference is not None:
            connection.channel.send(Refused(difference))
            raise ChannelClosed(difference)
        connection.channel.send(self._welcome)

    def _difference(self, hello: Hello) -> str | None:
        """Return in what the consumer differs, a clause for its client; None if the two match."""
        if hello.version != PROTOCOL_VERSION:
            return f"it speaks version {PROTOCOL_VERSION} of the control channel, and this instance {hello.version}"
        if hello.engine_id != self._config.engine_id:
            return (
                f"it is instance {self._config.engine_id!r}, and the handle is of {hello.engine_id!r}, before a restart"
            )
        theirs = {"connector": self._config.connector, "fingerprint": self._config.fingerprint}
        ours = {"connector": hello.connector, "fingerprint": hello.fingerprint}
        theirs |= dataclasses.asdict(self._layout)
        ours |= dataclasses.asdict(hello.layout)
        differing = [
            f"{name} is {theirs[name]} there and {ours[name]} here" for name in theirs if theirs[name] != ours[name]
        ]
        return "the instances do not match: " + ", ".join(differing) if differing else None

    def _answer(self, connection: _Connection, message: ConsumerMessage) -> None:
        if isinstance(message, Claim):
            connection.channel.send(self._claim(connection, message))
        elif isinstance(message, Copied):
            request_id = connection.claims.get(message.claim)
            with self._lock:
                whole = request_id is not None and self._table.is_claimed(
                    request_id, connection.number, time.monotonic()
                )
            lost = Refused("the blocks were taken back, because the request's deadline passed", message.claim)
            connection.channel.send(Whole(message.claim, message.load) if whole else lost)
        elif isinstance(message, Release):
            request_id = connection.claims.pop(message.claim, None)
            if request_id is not None:
                with self._lock:
                    released = self._table.release(request_id, connection.number)
                self._report([request_id] if released else [])
        else:
            raise ChannelClosed("it greeted twice")

    def _claim(self, connection: _Connection, claim: Claim) -> Granted | Refused:
        if claim.claim in connection.claims:
            raise ChannelClosed("two claims came with the same number")
        try:
            with self._lock:
                self._table.claim(
                    claim.request_id, claim.block_ids, connection.number, claim.seconds_left, time.monotonic()
                )
        except LeaseRefused as error:
            return Refused(str(error), claim.claim)
        connection.claims[claim.claim] = claim.request_id
        self._claimed.set()
        self._expiry_changed.set()
        return Granted(claim.claim)

    def _report(self, ended: list[str]) -> None:
        """Tell the engine that these leases have ended."""
        if not any(connection.claims for connection in self._connections.values()):
            self._claimed.clear()
        if ended:
            with self._lock:
                self._sent.update(ended)
                self._stats.leases_held = len(self._table)
            self._wake()


def _bind(host: str, port: int) -> socket:
    if host in _ANY_ADDRESS:
        raise ConfigurationError(
            f"{host!r} names no instance; give --kv-host the address under which decode instances reach this one."
        )
    return bind(host, port, option="--kv-port")
