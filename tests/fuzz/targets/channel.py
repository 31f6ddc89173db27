"""What comes over the connections between instances: frames, and the messages in them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, cast

import msgspec

from chiasm.ec_transfer.peer_messages import Bad, Gone, HolderMessage, ReaderMessage
from chiasm.fleet_key import NONCE_BYTES
from chiasm.kv_transfer.messages import ConsumerMessage, ProducerMessage, Refused, Release
from chiasm.transfer.channel import LENGTH, Channel, ChannelClosed
from chiasm.transfer.greeting import Attach, Challenge, Hello, Proven, Unwelcome

_runner = asyncio.Runner()
_DECODERS: list[msgspec.msgpack.Decoder[Any]] = [
    msgspec.msgpack.Decoder(kind)
    for kind in (
        Challenge,
        Hello | Attach,
        ConsumerMessage,
        ProducerMessage,
        ReaderMessage,
        HolderMessage,
        Proven | Unwelcome,
    )
]


_BODY = 128


class _Writer:
    """A connection that is only read."""

    def __init__(self) -> None:
        self.socket = socket.socket()

    def get_extra_info(self, name: str) -> socket.socket:
        return self.socket


_writer = cast("asyncio.StreamWriter", _Writer())


def seeds() -> list[bytes]:
    nonce = bytes(NONCE_BYTES)
    messages: list[msgspec.Struct] = [
        Challenge(nonce),
        Hello("kv", 1, "engine", nonce, b"", {"dtype": "float32"}),
        Release(1),
        Refused(1, "why"),
        Bad("a" * 64),
        Gone("a" * 64),
        Unwelcome("why"),
    ]
    frames = [LENGTH.pack(len(body)) + body for body in map(msgspec.msgpack.encode, messages)]
    alone = [bytes([_BODY + which]) + frame[LENGTH.size :] for which, frame in enumerate(frames)]
    return [*alone, bytes([2]) + frames[2] + frames[2]]


def take(data: bytes) -> bool:
    """The first byte chooses who reads, and whether the rest is frames or the body of one."""
    which, rest = (data[0], data[1:]) if data else (0, b"")
    frames = LENGTH.pack(len(rest)) + rest if which >= _BODY else rest
    return _runner.run(_receive(_DECODERS[which % _BODY % len(_DECODERS)], frames))


async def _receive(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> bool:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    channel = Channel(reader, _writer, decoder)
    is_understood = False
    with contextlib.suppress(ChannelClosed):
        while True:
            await channel.receive()
            is_understood = True
    return is_understood
