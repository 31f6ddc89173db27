"""What a consumer and a producer tell each other about blocks, over the channel of ``transfer/channel.py``.

When the two have greeted each other (``transfer/greeting.py``), the producer sends Welcome. Then, for each request, the
consumer sends Claim (answered by Granted or Refused), Copied after each load (answered by Whole or Refused), and Release, which
has no answer. Answers come in the order of the questions. When a connection ends, all that was claimed on it is released.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import msgspec

from chiasm.kv_transfer.base import KVLayout, KVTransferConfig
from chiasm.transfer.greeting import Terms
from chiasm.wire import MAX_BLOCKS, Name, TokenId

PROTOCOL_VERSION = 3
MAX_CLAIM_SECONDS = 86_400.0

ClaimNumber = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """The first message. ``memory`` tells the connector how to reach the producer's blocks."""

    num_blocks: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    memory: bytes


class Claim(msgspec.Struct, tag="claim", frozen=True):
    """Hold the blocks of a handle. ``claim`` is a number that the consumer uses once on a connection."""

    claim: ClaimNumber
    request_id: Name
    block_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_BLOCKS)]
    seconds_left: Annotated[float, msgspec.Meta(ge=0, le=MAX_CLAIM_SECONDS)]
    """Time until the consumer's request fails and the blocks may be used again."""


class Granted(msgspec.Struct, tag="granted", frozen=True):
    """The blocks are held."""

    claim: ClaimNumber


class Copied(msgspec.Struct, tag="copied", frozen=True):
    """The blocks of one load were read. Were they still held?"""

    claim: ClaimNumber
    load: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Whole(msgspec.Struct, tag="whole", frozen=True):
    """The blocks were held throughout, so what was read is what was offered."""

    claim: ClaimNumber
    load: int


class Release(msgspec.Struct, tag="release", frozen=True):
    """The blocks are no longer needed."""

    claim: ClaimNumber


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """A claim was refused or lost. ``reason`` is a clause without full stop."""

    claim: ClaimNumber
    reason: Annotated[str, msgspec.Meta(max_length=4096)]


ConsumerMessage = Claim | Copied | Release
ProducerMessage = Welcome | Granted | Whole | Refused


def terms_of(config: KVTransferConfig, layout: KVLayout) -> Terms:
    """Return what a consumer and a producer must have in common."""
    values = {"connector": config.connector, "fingerprint": config.fingerprint}
    values |= {name: str(value) for name, value in dataclasses.asdict(layout).items()}
    return Terms("kv", PROTOCOL_VERSION, values, config.fleet_key)
