"""How a reader and a holder greet each other, before either tells or believes anything.

::

    holder -> reader    Challenge   a nonce
    reader -> holder    Hello       a nonce, whom it means, its proof, and the terms that must agree
    holder -> reader    Proven      its own proof

With a fleet key (``fleet_key.py``), each side proves that it has it, so a hello that somebody has recorded proves nothing on
another connection. A wrong proof is refused before anything is compared, with words that are always the same. Only then the
holder says what differs. Without a key, the proofs are empty and whoever connects is believed; so then only processes of this
host are listened to and talked to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.fleet_key import NONCE_BYTES, PROOF_BYTES, FleetKey, Handshake, Side, make_nonce
from chiasm.http.listen import is_loopback
from chiasm.transfer.channel import READ_AHEAD_BYTES, Channel, ChannelClosed
from chiasm.transfer.errors import TransferError
from chiasm.transfer.memory import Peer
from chiasm.wire import Name

MAX_TERMS = 32
MAX_OPENING_BYTES = 1 << 16
"""Of what a stranger says, who may be anybody."""
_NOT_OF_THE_FLEET = "no proof of the fleet key came; give both sides the same --fleet-key-file"
_NEEDS_KEY = (
    "without a fleet key only processes of the same host are talked to; give both sides the same --fleet-key-file"
)

_MessageT = TypeVar("_MessageT")

Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, msgspec.Meta(max_length=PROOF_BYTES)]


class Challenge(msgspec.Struct, tag="challenge", frozen=True):
    """The first message on a connection."""

    nonce: Nonce


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """The reader means the holder whose ``engine_id`` this is. ``terms`` are what must be the same on both sides."""

    protocol: Name
    version: int
    engine_id: Name
    nonce: Nonce
    proof: Proof
    terms: Annotated[dict[Name, Name], msgspec.Meta(max_length=MAX_TERMS)] = {}


class Attach(msgspec.Struct, tag="attach", frozen=True):
    """In place of Hello: the connection is for the data of a reader that has been greeted on another one.

    What the proof must be says the data plane.
    """

    reader: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
    proof: Proof


class Proven(msgspec.Struct, tag="proven", frozen=True):
    """The reader is welcome, and this is the holder's proof."""

    proof: Proof


class Unwelcome(msgspec.Struct, tag="unwelcome", frozen=True):
    """The reader is not welcome. ``reason`` is a clause without full stop."""

    reason: Annotated[str, msgspec.Meta(max_length=4096)]


_CHALLENGE: msgspec.msgpack.Decoder[Challenge] = msgspec.msgpack.Decoder(Challenge)
_OPENING: msgspec.msgpack.Decoder[Hello | Attach] = msgspec.msgpack.Decoder(Hello | Attach)
_REPLY: msgspec.msgpack.Decoder[Proven | Unwelcome] = msgspec.msgpack.Decoder(Proven | Unwelcome)


@dataclass(frozen=True)
class Terms:
    """What one side of a channel speaks and is: both sides must have the same."""

    protocol: str
    """Such as ``kv``."""
    version: int
    values: Mapping[str, str] = field(default_factory=dict)
    """What must agree, by its name: at most 32, each of at most 256 characters. A refusal says what differs."""
    key: FleetKey | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert len(self.values) <= MAX_TERMS

    def difference(self, hello: Hello, engine_id: str) -> str | None:
        """Return how a reader differs from the holder whose terms these are, as a clause for its client; None if it doesn't."""
        if hello.protocol != self.protocol:
            return f"it speaks {self.protocol!r}, and this instance {hello.protocol!r}"
        if hello.version != self.version:
            return f"it speaks version {self.version} of the control channel, and this instance {hello.version}"
        if hello.engine_id != engine_id:
            return f"it is instance {engine_id!r}, and what is asked for is of {hello.engine_id!r}, before a restart"
        names = [*self.values, *(name for name in hello.terms if name not in self.values)]
        differing = [
            f"{name} is {self.values.get(name, 'unknown')} there and {hello.terms.get(name, 'unknown')} here"
            for name in names
            if self.values.get(name) != hello.terms.get(name)
        ]
        return "the instances do not match: " + ", ".join(differing) if differing else None


async def receive_opening(channel: Channel[_MessageT], nonce: bytes) -> Hello | Attach:
    """Holder: challenge whoever has connected, and return what it answers. Raises ChannelClosed."""
    channel.send(Challenge(nonce))
    return await channel.receive_as(_OPENING, MAX_OPENING_BYTES)


def welcome(
    channel: Channel[_MessageT], hello: Hello, nonce: bytes, terms: Terms, engine_id: str, refusal: str | None = None
) -> None:
    """Holder: answer a hello. Raises ChannelClosed if the reader is not welcome, after it has been told so.

    ``refusal`` is why no further reader is welcome, as a clause for its client.
    """
    handshake = Handshake(
        protocol=hello.protocol,
        version=hello.version,
        engine_id=hello.engine_id,
        caller_nonce=hello.nonce,
        listener_nonce=nonce,
    )
    if terms.key is not None and not terms.key.accepts(hello.proof, Side.CALLER, handshake):
        reason: str | None = _NOT_OF_THE_FLEET
    else:
        reason = terms.difference(hello, engine_id) or refusal
    if reason is not None:
        channel.send(Unwelcome(reason))
        raise ChannelClosed(reason)
    channel.send(Proven(b"" if terms.key is None else terms.key.prove(Side.LISTENER, handshake)))


async def open_channel(
    peer: Peer, engine_id: str, terms: Terms, decoder: msgspec.msgpack.Decoder[_MessageT], timeout_seconds: float
) -> Channel[_MessageT]:
    """Reader: connect to a holder and greet it. Connecting and greeting may take ``timeout_seconds`` each.

    Raises TransferError if the holder can't be reached, doesn't want this reader, or can't prove that it is of the fleet.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            streams = await asyncio.open_connection(await _address_of(peer, terms), peer.port, limit=READ_AHEAD_BYTES)
        channel = Channel(*streams, decoder)
        try:
            async with asyncio.timeout(timeout_seconds):
                await _greet(channel, engine_id, terms)
        except BaseException:
            channel.close()
            raise
    except TimeoutError:
        raise TransferError(f"it did not answer within {timeout_seconds:g} seconds") from None
    except (OSError, ValueError) as error:  # ValueError: no host can have this name
        raise TransferError(f"it cannot be reached: {error}") from error
    return channel


async def _greet(channel: Channel[_MessageT], engine_id: str, terms: Terms) -> None:
    challenge = await channel.receive_as(_CHALLENGE)
    handshake = Handshake(
        protocol=terms.protocol,
        version=terms.version,
        engine_id=engine_id,
        caller_nonce=make_nonce(),
        listener_nonce=challenge.nonce,
    )
    proof = b"" if terms.key is None else terms.key.prove(Side.CALLER, handshake)
    channel.send(Hello(terms.protocol, terms.version, engine_id, handshake.caller_nonce, proof, dict(terms.values)))
    reply = await channel.receive_as(_REPLY)
    if isinstance(reply, Unwelcome):
        raise TransferError(reply.reason)
    if terms.key is not None and not terms.key.accepts(reply.proof, Side.LISTENER, handshake):
        raise TransferError(_NOT_OF_THE_FLEET)


async def _address_of(peer: Peer, terms: Terms) -> str:
    """Return what to connect to. Without a key, that is an address of this host, or TransferError is raised."""
    if terms.key is not None or is_loopback(peer.host):
        return peer.host
    found = await asyncio.get_running_loop().getaddrinfo(peer.host, peer.port)
    addresses = [str(address[0]) for *_, address in found]
    if not all(map(is_loopback, addresses)):
        raise TransferError(f"it is at {addresses[0]}, and {_NEEDS_KEY}")
    return addresses[0]


def check_host(host: str, terms: Terms) -> None:
    """Holder: raise ConfigurationError for an address that may only be listened on with a fleet key."""
    if terms.key is None and not is_loopback(host):
        raise ConfigurationError(f"The address {host} can be reached from other hosts, and {_NEEDS_KEY}.")
