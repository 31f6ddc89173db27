"""Where a holder listens: takes connections, greets readers, and hands those that are welcome to the plane that serves them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.fleet_key import make_nonce
from chiasm.http.flood import FloodLimit
from chiasm.http.listen import BACKLOG, bind
from chiasm.tasks import end_tasks
from chiasm.transfer.channel import READ_AHEAD_BYTES, Channel, ChannelClosed, NotUnderstood
from chiasm.transfer.greeting import Attach, Terms, check_host, receive_opening, welcome
from chiasm.transfer.memory import OfferedMemory

_logger = logging.getLogger(__name__)

MAX_READERS = 256
MAX_STRANGERS = 2 * MAX_READERS
"""Connections that have not greeted yet. A further one ends the oldest of them, so a flood of them keeps no reader out. Readers
that all connect at the same time, as after a moment in which this process stood still, are no flood."""
_TURNS_OF_ACCEPTING = 4
_ANY_ADDRESS = frozenset({"", "0.0.0.0", "::", "*"})

_Incoming = TypeVar("_Incoming")
Serve = Callable[[int, Channel[_Incoming]], Coroutine[Any, Any, None]]


class Listener(Generic[_Incoming]):
    """Listens from the start, and serves readers while :meth:`run` runs.

    Raises ConfigurationError if it can't listen. Without a fleet key it listens on loopback only.
    """

    def __init__(
        self,
        host: str,
        port: int,
        engine_id: str,
        terms: Terms,
        memory: OfferedMemory,
        decoder: msgspec.msgpack.Decoder[_Incoming],
        *,
        greeting_seconds: float,
        option: str,
    ) -> None:
        """``decoder`` is for the readers' messages; ``option`` begins the names of the options of host and port (``--kv``)."""
        if host in _ANY_ADDRESS:
            raise ConfigurationError(
                f"{host!r} names no instance; give {option}-host the address under which others reach this one."
            )
        check_host(host, terms)
        self._engine_id = engine_id
        self._terms = terms
        self._memory = memory
        self._decoder = decoder
        self._greeting_seconds = greeting_seconds
        self._numbers = itertools.count(1)
        self._strangers: dict[asyncio.Task[None], Channel[_Incoming]] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._log_limit = FloodLimit(_logger)
        """Anybody can connect, so nobody may fill the log."""
        self._socket = bind(host, port, option=f"{option}-port")
        self.port: int = self._socket.getsockname()[1]

    async def run(
        self,
        closing: asyncio.Event,
        serve: Serve[_Incoming],
        gone: Callable[[int], None],
        *,
        is_read: asyncio.Event,
    ) -> None:
        """Serve readers until ``closing`` is set; then end all connections.

        ``serve(reader, channel)`` talks to a reader that has been greeted, and returns or raises when its connection is to end.
        ``reader`` is a number that is used once. Afterwards ``gone(reader)`` is called. The memory is told by this class. While
        ``is_read`` is set, somebody may be reading the memory, and the transport does its part.
        """
        progress = asyncio.create_task(self._progress(is_read))
        server = await asyncio.start_server(
            partial(self._accept, serve, gone), sock=self._socket, backlog=BACKLOG, limit=READ_AHEAD_BYTES
        )
        await closing.wait()
        asyncio.get_running_loop().remove_reader(self._socket)  # accept no more
        for _ in range(_TURNS_OF_ACCEPTING):  # those that asyncio has accepted, which a closed server takes no more
            await asyncio.sleep(0)
        server.close()
        await end_tasks(*self._strangers, *self._readers)
        await end_tasks(progress)
        self._log_limit.flush()

    async def _progress(self, is_read: asyncio.Event) -> None:
        if self._memory.progress_seconds is not None:
            while True:
                await is_read.wait()
                self._memory.progress()
                await asyncio.sleep(self._memory.progress_seconds)

    def close(self) -> None:
        """Stop listening, if :meth:`run` was never called. Idempotent."""
        self._socket.close()

    def _accept(
        self,
        serve: Serve[_Incoming],
        gone: Callable[[int], None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        while len(self._strangers) >= MAX_STRANGERS:
            task, oldest = next(iter(self._strangers.items()))
            del self._strangers[task]
            oldest.close()
            task.cancel()
        channel = Channel(reader, writer, self._decoder)
        task = asyncio.create_task(self._talk(serve, gone, channel, writer))
        self._strangers[task] = channel
        task.add_done_callback(lambda task: self._forget(task, channel))

    def _forget(self, task: asyncio.Task[None], channel: Channel[_Incoming]) -> None:
        self._strangers.pop(task, None)
        self._readers.discard(task)
        channel.close()

    async def _talk(
        self,
        serve: Serve[_Incoming],
        gone: Callable[[int], None],
        channel: Channel[_Incoming],
        writer: asyncio.StreamWriter,
    ) -> None:
        """Talk to one peer until its connection ends or has to end."""
        reader, reason = 0, "an error here"
        try:
            if not await self._greet(channel, writer):
                return
            reader = next(self._numbers)
            await serve(reader, channel)
        except TimeoutError:
            reason = "it did not say hello in time"
        except NotUnderstood as error:
            reason = str(error)
            self._warn("A connection to the port for transfers is closed: %s.", reason)
        except ChannelClosed as error:
            reason = str(error)
        except Exception:
            _logger.exception("An error in the control thread ends one connection.")
        finally:
            channel.close()
            if reader:
                self._memory.dismiss(reader)
                gone(reader)
        _logger.debug("Connection %d ended: %s.", reader, reason)

    def _warn(self, message: str, *details: object) -> None:
        if self._log_limit.admits(message):
            _logger.warning(message, *details)

    async def _greet(self, channel: Channel[_Incoming], writer: asyncio.StreamWriter) -> bool:
        """Return whether the connection is that of a welcome reader. Raises ChannelClosed if it is nobody's."""
        nonce = make_nonce()
        async with asyncio.timeout(self._greeting_seconds):
            opening = await receive_opening(channel, nonce)
        if isinstance(opening, Attach):
            self._attach(opening, nonce, writer)
            return False
        is_full = len(self._readers) >= MAX_READERS
        if is_full:
            self._warn("A reader was turned away: there are %d already.", MAX_READERS)
        refusal = f"it has {MAX_READERS} readers already" if is_full else None
        welcome(channel, opening, nonce, self._terms, self._engine_id, refusal)
        task = asyncio.current_task()
        assert task is not None
        self._strangers.pop(task, None)
        self._readers.add(task)
        return True

    def _attach(self, opening: Attach, nonce: bytes, writer: asyncio.StreamWriter) -> None:
        """Give the connection to the data plane. The channel closes its own descriptor of it."""
        connection = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
        if not self._memory.attach(opening.reader, nonce, opening.proof, connection):
            connection.close()
            raise ChannelClosed("its data connection is no reader's")
