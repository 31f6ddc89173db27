"""A consumer that says what a test wants it to say on a producer's control port."""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Any

import msgspec

from chiasm.kv_transfer.control import PROTOCOL_VERSION, ConsumerMessage, Hello, ProducerMessage

from .instance import LAYOUT, PATIENCE_SECONDS, Instance


class RawConsumer:
    """A connection to ``producer``, from the moment on which it is made; greets when told so."""

    def __init__(self, producer: Instance) -> None:
        self._producer = producer
        host, port = (producer.worker.get_handshake_metadata()[name] for name in ("host", "port"))
        self.socket = socket.create_connection((str(host), int(port)), PATIENCE_SECONDS)

    def __enter__(self) -> RawConsumer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def hello(self, **changes: Any) -> Hello:
        config = self._producer.config
        fields: dict[str, Any] = {
            "version": PROTOCOL_VERSION,
            "connector": config.connector,
            "engine_id": config.engine_id,
            "fingerprint": config.fingerprint,
            "layout": LAYOUT,
        }
        return Hello(**(fields | changes))

    def say(self, *messages: ConsumerMessage) -> None:
        for message in messages:
            self.send_frame(msgspec.msgpack.encode(message))

    def send_frame(self, body: bytes) -> None:
        self.socket.sendall(struct.pack(">I", len(body)) + body)

    def hear(self) -> ProducerMessage:
        (length,) = struct.unpack(">I", self._exactly(4))
        answer: ProducerMessage = msgspec.msgpack.decode(self._exactly(length), type=ProducerMessage)
        return answer

    def ask(self, message: ConsumerMessage) -> ProducerMessage:
        self.say(message)
        return self.hear()

    def is_closed(self) -> bool:
        """Whether the producer has ended the connection and said no more; waits until it does something."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, "the producer ended the connection"
            data += more
        return data
