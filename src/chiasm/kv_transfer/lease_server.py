"""A producer's side of the control channel: one thread that grants claims and ends leases, and sleeps otherwise."""

from __future__ import annotations

import dataclasses
import errno
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.kv_transfer.base import KVConnectorStats, KVLayout, KVSend, KVTransferConfig
from chiasm.kv_transfer.control import (
    PROTOCOL_VERSION,
    Channel,
    ChannelClosed,
    Claim,
    Copied,
    Granted,
    Hello,
    Inbox,
    Question,
    Refused,
    Welcome,
    Whole,
)
from chiasm.kv_transfer.leases import LeaseRefused, LeaseTable
from chiasm.kv_transfer.memory import OfferedMemory

_logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
_BACKLOG = 128
_PAUSE_SECONDS = 0.05  # when the system has no descriptor left for a connection
_ANY_ADDRESS = frozenset({"", "0.0.0.0", "::", "*"})


@dataclass(eq=False)
class _Connection:
    number: int
    channel: Channel[Question]
    greet_by: float
    greeted: bool = False
    claims: dict[int, str] = field(default_factory=dict)
    """What was granted, by the consumer's number for it: our request."""


class LeaseServer:
    """Holds blocks for whoever comes with the handle.

    Listens from the start. Raises ConfigurationError when it can't. ``wake`` is called, on any thread, when
    :meth:`take_sent` has something.
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
        self._lock = threading.Lock()  # of the table, the stats and what was sent
        self._table = LeaseTable(config.lease_seconds)
        self._sent: set[str] = set()
        self._decoder: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
        self._connections: dict[int, _Connection] = {}
        self._next_number = 0
        self._closing = False
        self._listener = _listen(config.host, config.port)
        self.port: int = self._listener.getsockname()[1]
        self._inbox: Inbox[None] = Inbox()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._inbox.socket, selectors.EVENT_READ, self._inbox.take)
        self._thread = threading.Thread(target=self._run, name="kv-leases", daemon=True)
        self._thread.start()

    def hold(self, sends: Iterable[KVSend]) -> None:
        """Begin leases; a claim that comes after this returned is granted. Any thread."""
        now = time.monotonic()
        with self._lock:
            for send in sends:
                self._table.hold(send.request_id, send.block_ids, now)
            self._stats.leases_held = len(self._table)
        self._inbox.put(None)

    def take_sent(self) -> set[str]:
        """Requests whose leases ended since the last call. Any thread."""
        with self._lock:
            sent, self._sent = self._sent, set()
        return sent

    def close(self) -> None:
        """Stop listening and end the connections; idempotent."""
        if not self._closing:
            self._closing = True
            self._inbox.put(None)
            self._thread.join()
            self._inbox.close()

    # ---- the control thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            timeout = self._seconds_to_sleep()
            for key, _ in self._selector.select(timeout):
                key.data()
            self._expire()
            if self._is_read:
                self._memory.progress()
        for connection in list(self._connections.values()):
            self._end(connection, "this instance stops")
        self._selector.close()
        self._listener.close()
        self._memory.close()

    @property
    def _is_read(self) -> bool:
        """Whether somebody may be reading: a consumer gives a claim back when it reads no more, even one that is lost."""
        return any(connection.claims for connection in self._connections.values())

    def _seconds_to_sleep(self) -> float | None:
        with self._lock:
            times = [self._table.next_expiry]
        times += [connection.greet_by for connection in self._connections.values() if not connection.greeted]
        seconds = [max(0.0, at - time.monotonic()) for at in times if at is not None]
        if self._is_read and self._memory.progress_seconds is not None:
            seconds.append(self._memory.progress_seconds)
        return min(seconds, default=None)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _logger.warning("a decode instance could not be let in: %s", error)
            time.sleep(_PAUSE_SECONDS)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            _logger.warning("a decode instance was turned away: there are %d connections already", MAX_CONNECTIONS)
            accepted.close()
            return
        accepted.setblocking(False)
        try:
            channel = Channel(accepted, self._decoder)
        except OSError:  # gone again
            accepted.close()
            return
        self._next_number += 1
        greet_by = time.monotonic() + self._config.connect_timeout_seconds
        connection = _Connection(self._next_number, channel, greet_by)
        self._connections[connection.number] = connection
        self._selector.register(accepted, selectors.EVENT_READ, partial(self._serve, connection))

    def _serve(self, connection: _Connection) -> None:
        channel = connection.channel
        had_unsent = channel.has_unsent
        try:
            channel.flush()
            for message in channel.receive():
                self._answer(connection, message)
        except ChannelClosed as error:
            self._end(connection, str(error))
            return
        except Exception:
            _logger.exception("an error in the control thread ends one connection")
            self._end(connection, "an error here")
            return
        if channel.has_unsent != had_unsent:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.has_unsent else 0)
            self._selector.modify(channel.socket, events, partial(self._serve, connection))

    def _answer(self, connection: _Connection, message: Question) -> None:
        channel, claims = connection.channel, connection.claims
        if isinstance(message, Hello):
            if connection.greeted:
                raise ChannelClosed("it greeted twice")
            difference = self._difference(message)
            if difference is not None:
                channel.send(Refused(difference))
                raise ChannelClosed(difference)
            connection.greeted = True
            channel.send(self._welcome)
        elif not connection.greeted:
            raise ChannelClosed("a question came before the greeting")
        elif isinstance(message, Claim):
            channel.send(self._claim(connection, message))
        elif isinstance(message, Copied):
            request_id = claims.get(message.claim)
            with self._lock:
                whole = request_id is not None and self._table.is_claimed(
                    request_id, connection.number, time.monotonic()
                )
            lost = Refused("the producer took the blocks back, since the request's deadline passed", message.claim)
            channel.send(Whole(message.claim, message.load) if whole else lost)
        else:
            request_id = claims.pop(message.claim, None)
            with self._lock:
                released = request_id is not None and self._table.release(request_id, connection.number)
            if request_id is not None and released:
                self._report([request_id])

    def _claim(self, connection: _Connection, claim: Claim) -> Granted | Refused:
        if claim.claim in connection.claims:
            raise ChannelClosed("two claims came with one number")
        try:
            with self._lock:
                self._table.claim(
                    claim.request_id, claim.block_ids, connection.number, claim.seconds_left, time.monotonic()
                )
        except LeaseRefused as error:
            return Refused(str(error), claim.claim)
        connection.claims[claim.claim] = claim.request_id
        return Granted(claim.claim)

    def _difference(self, hello: Hello) -> str | None:
        """What of the consumer does not fit, as a part of a sentence; None if all does."""
        if hello.version != PROTOCOL_VERSION:
            return f"it speaks version {PROTOCOL_VERSION} of the control channel, and this instance {hello.version}"
        if hello.engine_id != self._config.engine_id:
            return f"it is instance {self._config.engine_id!r}, and the handle is of {hello.engine_id!r}; was it restarted?"
        theirs = {"connector": self._config.connector, "fingerprint": self._config.fingerprint}
        ours = {"connector": hello.connector, "fingerprint": hello.fingerprint}
        theirs |= dataclasses.asdict(self._layout)
        ours |= dataclasses.asdict(hello.layout)
        differing = [
            f"{name} is {theirs[name]} there and {ours[name]} here" for name in theirs if theirs[name] != ours[name]
        ]
        return "the instances do not fit: " + ", ".join(differing) if differing else None

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            expired = self._table.expire(now)
            self._stats.leases_expired += len(expired)
        if expired:
            _logger.warning("nobody fetched the KV of %s in time; its blocks are free again", ", ".join(expired))
            self._report(expired)
        for connection in list(self._connections.values()):
            if not connection.greeted and connection.greet_by <= now:
                self._end(connection, "it did not say what it wants")

    def _end(self, connection: _Connection, reason: str) -> None:
        _logger.debug("connection %d of a decode instance ended: %s", connection.number, reason)
        del self._connections[connection.number]
        self._selector.unregister(connection.channel.socket)
        connection.channel.close()
        with self._lock:
            released = self._table.release_all(connection.number)
            self._stats.leases_expired += len(released)
        if released:
            self._report(released)

    def _report(self, ended: list[str]) -> None:
        with self._lock:
            self._sent.update(ended)
            self._stats.leases_held = len(self._table)
        self._wake()


def _listen(host: str, port: int) -> socket.socket:
    if host in _ANY_ADDRESS:
        raise ConfigurationError(
            f"{host!r} names no instance; give the address under which decode instances reach this prefill instance"
        )
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigurationError(f"cannot listen for decode instances on {host!r} port {port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"port {port} on {host} is in use; stop what uses it, or choose another for the KV control channel"
            ) from error
        raise ConfigurationError(f"cannot listen for decode instances on {host} port {port}: {error}") from error
    return listener
