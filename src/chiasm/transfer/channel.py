"""The channel between a holder and a reader: framed messages over TCP, and the thread that carries them.

A connection carries frames. Each is the length of its body (4 bytes, big-endian) and the body, one msgpack message. Which
messages these are is the matter of those who use the channel. What comes in is bounded and checked; a message that isn't
understood ends its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, TypeVarTuple

import msgspec

from chiasm.http.vanished import break_if_vanished
from chiasm.transfer.errors import TransferError
from chiasm.wire import UNREADABLE

_logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 1 << 20
MAX_UNSENT_BYTES = 2 * MAX_FRAME_BYTES
"""How much may wait to be sent on one connection before the other side counts as gone."""
READ_AHEAD_BYTES = 1 << 16
"""How much of one connection is read before it is looked at; twice that at most, unless a frame is longer."""
LENGTH = struct.Struct(">I")
_OTHER_PROTOCOL = "it does not speak the control protocol"
VANISHED_SECONDS = 25.0
"""How long a host may answer nothing at all before its connections break."""

_Incoming = TypeVar("_Incoming")
_Other = TypeVar("_Other")
_Arguments = TypeVarTuple("_Arguments")


class ChannelClosed(TransferError):
    """The connection has ended or must end; ``str(error)`` is a clause that says why."""


class NotUnderstood(ChannelClosed):
    """The other side sent what is no message, so it is no instance of a fleet, or faulty."""


class Channel(Generic[_Incoming]):
    """One end of a connection, which receives messages of the decoder's type. Used on the thread of its event loop.

    The code that creates it closes it, also after ChannelClosed.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[_Incoming],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        with contextlib.suppress(OSError):  # it broke already, and receive raises the error
            break_if_vanished(writer.get_extra_info("socket"), VANISHED_SECONDS)

    async def receive(self) -> _Incoming:
        """Wait for the next message. Raises ChannelClosed if the connection ends, NotUnderstood if something else comes."""
        return await self.receive_as(self._decoder)

    async def receive_as(self, decoder: msgspec.msgpack.Decoder[_Other], max_bytes: int = MAX_FRAME_BYTES) -> _Other:
        """Wait for a message of another type, as in a greeting."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            if length > max_bytes:
                raise NotUnderstood(f"{_OTHER_PROTOCOL}: a message of {length} bytes came, {max_bytes} are allowed")
            return decoder.decode(await self._reader.readexactly(length))
        except asyncio.IncompleteReadError:
            raise ChannelClosed("the connection was closed") from None
        except OSError as error:
            raise ChannelClosed(f"the connection broke: {error}") from error
        except UNREADABLE as error:
            raise NotUnderstood(f"{_OTHER_PROTOCOL}: {error}") from error

    def send(self, message: msgspec.Struct) -> None:
        """Send a message without waiting. Raises ValueError if it is too long, ChannelClosed if it can't be sent."""
        body = msgspec.msgpack.encode(message)
        if len(body) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(body)} bytes is longer than the {MAX_FRAME_BYTES} that are allowed")
        if self._writer.is_closing():
            raise ChannelClosed("the connection was closed")
        self._writer.write(LENGTH.pack(len(body)) + body)
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise ChannelClosed("the other side does not read what it is sent")

    def close(self) -> None:
        """End the connection at once. What the socket hasn't taken yet isn't sent; idempotent."""
        self._writer.transport.abort()


class ControlThread:
    """A thread that runs an event loop: ``main`` until :meth:`close`, then what ``main`` has started until it ends."""

    def __init__(self, name: str, main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
        """``main`` gets an event that is set when it is to end."""
        # uvloop, which servers may install for all loops, sends nothing before the end of a callback.
        self._runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        self._loop = self._runner.get_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(main,), name=name, daemon=True)
        self._thread.start()

    def _run(self, main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
        with self._runner:
            self._runner.run(main(self._closing))

    def call(self, function: Callable[[*_Arguments], object], *args: *_Arguments) -> None:
        """Have the thread call a function soon, in the order of these calls. Any thread; does nothing after the end."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Wait until everything on the thread has ended; idempotent."""
        self.call(self._closing.set)
        self._thread.join()


def start_task(
    tasks: set[asyncio.Task[None]],
    work: Coroutine[Any, Any, None],
    lose: Callable[[str], object],
    *,
    thread: str,
) -> asyncio.Task[None]:
    """Run ``work`` for one connection as a task, which is in ``tasks`` until it ends.

    If it raises, ``lose`` gets the reason, a clause for the log; an error that isn't a TransferError is logged. ``thread`` is
    what the log calls this thread.
    """

    def end(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, TransferError):
            lose(str(error))
        elif error is not None:
            _logger.error("An error in the %s ends one connection.", thread, exc_info=error)
            lose(f"an unexpected error: {error!r}")

    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(end)
    return task
