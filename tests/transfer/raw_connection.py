"""One end of a control channel on which a test says and hears whatever it wants."""

from __future__ import annotations

import socket
import struct

import msgspec


class RawConnection:
    """A connection with blocking calls."""

    socket: socket.socket

    def say(self, *messages: msgspec.Struct) -> None:
        for message in messages:
            self.send_frame(msgspec.msgpack.encode(message))

    def send_frame(self, body: bytes) -> None:
        self.socket.sendall(struct.pack(">I", len(body)) + body)

    def hear_frame(self) -> bytes:
        (length,) = struct.unpack(">I", self.exactly(4))
        return self.exactly(length)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, "the other side ended the connection"
            data += more
        return data

    def is_closed(self) -> bool:
        """Whether the other side ends the connection and says no more; waits until it does something."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True
