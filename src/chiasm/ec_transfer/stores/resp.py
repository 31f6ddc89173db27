"""A small client of Redis' protocol (RESP2) that reads large values to where they belong.

The clients on PyPI collect a whole value before they give it away, which takes one or two copies more; docs/store.md has their
figures. Here the kernel writes a value into the caller's buffer, and nothing that a server says can make the client allocate
more than it expects.

Protocol: https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from typing import TypeAlias

from chiasm.ec_transfer.stores.address import StoreAddress
from chiasm.ec_transfer.stores.entry import StoreError

Reply: TypeAlias = "bytes | int | ServerError | list[Reply] | None"

_MAX_LINE_BYTES = 4096
_BUFFER_BYTES = 64 << 10
_MAX_DIGITS = 18
_END = b"\r\n"


class ServerError(Exception):
    """The server refused a command. ``kind`` is the first word of what it says, such as ``OOM`` or ``WRONGTYPE``."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.kind = text.partition(" ")[0]


class WrongLengthError(Exception):
    """A value has another length than the buffer that it was to fill, or is none."""


class TooLongError(StoreError):
    """A string in a reply is longer than it may be."""


class Connection:
    """One connection. For one thread at a time; after any error except ServerError it must be closed.

    ``allow`` sets by when everything that follows has to be done. Raises StoreError if the server can't be reached, takes too
    long or breaks the protocol.
    """

    def __init__(self, address: StoreAddress, connect_seconds: float) -> None:
        self._until = time.monotonic() + connect_seconds
        try:
            self._socket = _connected(address, connect_seconds)
        except (OSError, ValueError) as error:
            raise StoreError(f"{address} can't be reached: {_reason(error)}.") from None
        self._address = address
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        try:
            self._introduce()
        except BaseException:
            self.close()
            raise

    def _introduce(self) -> None:
        address = self._address
        if address.password:
            user = (address.user.encode(),) if address.user else ()
            self._expect_ok("the password", b"AUTH", *user, address.password.encode())
        if address.database:
            self._expect_ok("the database", b"SELECT", b"%d" % address.database)

    def _expect_ok(self, what: str, *command: bytes) -> None:
        try:
            self.call(*command)
        except ServerError as error:  # its text may repeat what it was given
            raise StoreError(f"{self._address} refused {what} ({error.kind}).") from None

    def close(self) -> None:
        self._socket.close()

    @property
    def is_quiet(self) -> bool:
        """Whether it is open and nothing has come, as is right between two commands."""
        if self._start != self._end:
            return False
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(self._socket, select.POLLIN | select.POLLHUP | select.POLLERR)
        return not poll.poll(0)

    def allow(self, seconds: float) -> None:
        """Give what follows so many seconds."""
        self._until = time.monotonic() + seconds

    def call(self, *command: bytes | memoryview, max_bytes: int = _MAX_LINE_BYTES, max_items: int = 0) -> Reply:
        """Send a command and return its reply, of at most so many strings of at most so many bytes.

        Raises ServerError, and StoreError, for a longer string TooLongError.
        """
        self.send(*command)
        reply = self.reply(max_bytes, max_items)
        if isinstance(reply, ServerError):
            raise reply
        return reply

    # ---- sending -------------------------------------------------------------------------------------------------------

    def send(self, *command: bytes | memoryview) -> None:
        """Send a command without waiting for its reply. Large arguments are not copied."""
        head = bytearray(b"*%d\r\n" % len(command))
        try:
            for argument in command:
                head += b"$%d\r\n" % len(argument)
                if len(argument) > _BUFFER_BYTES:
                    self._send(head)
                    self._send(argument)
                    head = bytearray()
                else:
                    head += argument
                head += _END
            self._send(head)
        except OSError as error:
            raise self._lost(error) from None

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        self._socket.settimeout(self._seconds_left())
        self._socket.sendall(data)

    # ---- receiving -----------------------------------------------------------------------------------------------------

    def reply(self, max_bytes: int = _MAX_LINE_BYTES, max_items: int = 0) -> Reply:
        """Return the next reply; a ServerError is returned, not raised."""
        kind, rest = self._line()
        if kind == b"+":
            return rest
        if kind == b"-":
            return ServerError(rest.decode("utf-8", "replace"))
        number = self._integer(rest)
        if kind == b":":
            return number
        if kind == b"$":
            if number == -1:
                return None
            if number < 0:
                raise self._nonsense("a string of another length than expected")
            if number > max_bytes:
                raise TooLongError(f"{self._address} sent a string of {number} bytes, and {max_bytes} were expected.")
            data = bytearray(number)
            self._fill(memoryview(data))
            self._skip_end()
            return bytes(data)
        if kind == b"*" and 0 <= number <= max_items:
            return [self.reply(max_bytes) for _ in range(number)]
        raise self._nonsense("a reply of a kind that was not asked for")

    def read_into(self, buffer: memoryview) -> bool:
        """Read the value that the next reply is into ``buffer``; return False if there is none.

        Raises WrongLengthError if there is something else.
        """
        kind, rest = self._line()
        if kind == b"-":
            raise WrongLengthError
        number = self._integer(rest)
        if kind == b"$" and number == -1:
            return False
        if kind != b"$" or number != len(buffer):
            raise WrongLengthError
        self._fill(buffer)
        self._skip_end()
        return True

    def _line(self) -> tuple[bytes, bytes]:
        """Return the first character of the next line, and the rest."""
        while True:
            found = self._buffer.find(_END, self._start, self._end)
            if found > self._start:
                kind = bytes(self._view[self._start : self._start + 1])
                rest = bytes(self._view[self._start + 1 : found])
                self._start = found + 2
                return kind, rest
            if found == self._start or self._end - self._start > _MAX_LINE_BYTES:
                raise self._nonsense("a line without end or content")
            self._receive_line()

    def _integer(self, text: bytes) -> int:
        digits = text.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > _MAX_DIGITS:
            raise self._nonsense("a length that is no number")
        return int(text)

    def _skip_end(self) -> None:
        while self._end - self._start < len(_END):
            self._receive_line()
        if self._buffer[self._start : self._start + 2] != _END:
            raise self._nonsense("a string that is longer than it says")
        self._start += 2

    def _receive_line(self) -> None:
        """Receive a little more. Little, because what a large value has in this buffer is copied from here."""
        if self._start:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        self._end += self._receive(self._view[self._end : self._end + _MAX_LINE_BYTES])

    def _fill(self, buffer: memoryview) -> None:
        filled = min(len(buffer), self._end - self._start)
        buffer[:filled] = self._view[self._start : self._start + filled]
        self._start += filled
        while filled < len(buffer):
            filled += self._receive(buffer[filled:])

    def _receive(self, buffer: memoryview) -> int:
        is_large = len(buffer) > _BUFFER_BYTES and not self._address.has_tls
        try:
            left = self._seconds_left()
            if is_large:
                # One system call for all of it: each return to Python has to wait for the interpreter's lock.
                self._socket.settimeout(None)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(left))
                received = self._socket.recv_into(buffer, 0, socket.MSG_WAITALL)
            else:
                self._socket.settimeout(left)
                received = self._socket.recv_into(buffer)
        except BlockingIOError:
            raise self._lost(TimeoutError()) from None
        except OSError as error:
            raise self._lost(error) from None
        if not received:
            raise StoreError(f"{self._address} closed the connection.")
        return received

    def _seconds_left(self) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _lost(self, error: OSError) -> StoreError:
        return StoreError(f"The connection to {self._address} was lost: {_reason(error)}.")

    def _nonsense(self, what: str) -> StoreError:
        return StoreError(f"{self._address} does not speak Redis' protocol: it sent {what}.")


def _connected(address: StoreAddress, seconds: float) -> socket.socket:
    made = socket.create_connection((address.host, address.port), timeout=seconds)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.has_tls:
            return ssl.create_default_context().wrap_socket(made, server_hostname=address.host)
    except BaseException:
        made.close()
        raise
    return made


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, max(1, int((seconds - whole) * 1e6)))


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if isinstance(error, TimeoutError):
        return "it took too long"
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__
