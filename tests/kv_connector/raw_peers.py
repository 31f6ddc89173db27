"""A consumer and a producer that say on the control channel what a test wants them to say."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Any

import msgspec

from chiasm.fleet_key import Handshake, Side, make_nonce
from chiasm.kv_transfer.messages import ConsumerMessage, ProducerMessage, Welcome, terms_of
from chiasm.transfer.greeting import Challenge, Hello, Proven, Unwelcome
from chiasm.wire import KVTransferParams
from tests.transfer.raw_connection import RawConnection

from .instance import LAYOUT, PATIENCE_SECONDS, Instance


class RawConsumer(RawConnection):
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
        """Hear the challenge, and return the hello that answers it, except for ``changes``."""
        challenge = msgspec.msgpack.decode(self.hear_frame(), type=Challenge)
        config = self._producer.config
        terms, nonce = terms_of(config, LAYOUT), make_nonce()
        version = changes.get("version", terms.version)
        handshake = Handshake(
            protocol=terms.protocol,
            version=version,
            engine_id=config.engine_id,
            caller_nonce=nonce,
            listener_nonce=challenge.nonce,
        )
        proof = b"" if terms.key is None else terms.key.prove(Side.CALLER, handshake)
        hello = Hello(terms.protocol, version, config.engine_id, nonce, proof, dict(terms.values))
        return msgspec.structs.replace(hello, **changes)

    def greet(self, hello: Hello | None = None) -> Proven | Unwelcome:
        """Say hello, and hear what comes."""
        self.say(self.hello() if hello is None else hello)
        reply: Proven | Unwelcome = msgspec.msgpack.decode(self.hear_frame(), type=Proven | Unwelcome)
        return reply

    def hear(self) -> ProducerMessage:
        message: ProducerMessage = msgspec.msgpack.decode(self.hear_frame(), type=ProducerMessage)
        return message

    def ask(self, message: ConsumerMessage) -> ProducerMessage:
        self.say(message)
        return self.hear()

    def welcome(self) -> Welcome:
        assert isinstance(self.greet(), Proven)
        welcome = self.hear()
        assert isinstance(welcome, Welcome)
        return welcome


class RawProducer(RawConnection):
    """A producer that listens, and takes one consumer when told so. It lends the memory of a real one."""

    def __init__(self, lender: Instance) -> None:
        with RawConsumer(lender) as consumer:
            self._welcome = consumer.welcome()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE_SECONDS)

    def __enter__(self) -> RawProducer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.listener.close()
        if hasattr(self, "socket"):
            self.socket.close()

    def handle(self, request_id: str, block_ids: list[int]) -> KVTransferParams:
        return KVTransferParams(
            do_remote_prefill=True,
            remote_engine_id="P",
            remote_block_ids=block_ids,
            remote_host="127.0.0.1",
            remote_port=self.listener.getsockname()[1],
            remote_request_id=request_id,
        )

    def accept(self) -> None:
        """Take the consumer that comes, and hear its hello."""
        self.socket, _ = self.listener.accept()
        self.socket.settimeout(PATIENCE_SECONDS)
        self.say(Challenge(make_nonce()))
        assert isinstance(msgspec.msgpack.decode(self.hear_frame(), type=Hello), Hello)

    def greet(self) -> None:
        """Take the consumer that comes, and welcome it."""
        self.accept()
        self.say(Proven(b""), self._welcome)

    def hear(self) -> ConsumerMessage:
        message: ConsumerMessage = msgspec.msgpack.decode(self.hear_frame(), type=ConsumerMessage)
        return message
