"""What readers and holders of embeddings tell each other over a channel, once they have greeted.

The holder says Welcome. The reader says Want for each embedding, which may be before the holder has it. As soon as the holder
has it, it says Here. If that grants the embedding, because it fits into the room that the reader gave, the reader reads it;
otherwise the reader says Take when it has room, and is answered by Here with a grant. Done gives a grant back, Forget takes
Want back, and Bad says that what was read can't be used. The holder says Gone of an embedding that was evicted; it isn't
wanted any more then. When a connection ends, everything that was granted or wanted on it is forgotten.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from chiasm.wire import Identifier

PROTOCOL = "ec"
PROTOCOL_VERSION = 1
MAX_WANTED = 1 << 14
"""Embeddings that one reader may want at one holder."""

Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Dimension = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """``memory`` tells the data plane how to reach the holder's memory, of ``num_bytes``."""

    memory: Annotated[bytes, msgspec.Meta(max_length=1 << 16)]
    num_bytes: Bytes


class Want(msgspec.Struct, tag="want", frozen=True):
    """Tell me when you have it. If it takes at most ``room_bytes`` with its header, it is granted at once."""

    identifier: Identifier
    room_bytes: Bytes = 0


class Here(msgspec.Struct, tag="here", frozen=True):
    """The embedding lies at ``offset`` in the holder's memory, behind its header. ``granted``: it stays there until Done.

    ``dtype`` is the name in safetensors. ``checksum`` is empty over data planes that can't change bytes.
    """

    identifier: Identifier
    offset: Bytes
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[list[Dimension], msgspec.Meta(max_length=8)]
    checksum: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z", max_length=32)]
    granted: bool


class Take(msgspec.Struct, tag="take", frozen=True):
    """There is room now: grant it."""

    identifier: Identifier


class Done(msgspec.Struct, tag="done", frozen=True):
    """The grant is not needed any more."""

    identifier: Identifier


class Forget(msgspec.Struct, tag="forget", frozen=True):
    """The embedding is not wanted any more."""

    identifier: Identifier


class Bad(msgspec.Struct, tag="bad", frozen=True):
    """What was read is not the embedding: it shouldn't be offered any more."""

    identifier: Identifier


class Gone(msgspec.Struct, tag="gone", frozen=True):
    """The embedding was evicted."""

    identifier: Identifier


ReaderMessage = Want | Take | Done | Forget | Bad
HolderMessage = Welcome | Here | Gone
