"""What a store keeps of an embedding: chunks of its bytes, and a header that says what they are.

The header is written when all chunks are there, so it is the commit. It has a checksum (XXH3, 128 bits) of each chunk, by which
a chunk is named as well: two encoders that write the same embedding at the same time can't mix theirs. Checksums detect what a
crash, an eviction or a person has left behind. They are no signatures: whoever may write to the store can forge them.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

CHUNK_BYTES = 4 << 20
"""Large enough that the cost of a command doesn't matter, and small enough that a server answers others in between."""
MAX_HEADER_BYTES = 64 << 10
MAX_ENTRY_BYTES = 4 << 30
_VERSION = 1
_CHECKSUM_BYTES = 16
_ITEM_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one element, by the names that safetensors has for dtypes."""


class StoreError(Exception):
    """The store can't be used now: down, slow, or it refuses. The message never holds a password."""


class StoreFullError(StoreError):
    """The store takes no more, and evicts nothing."""


class AbsentEntryError(Exception):
    """The entry, or a part of it, isn't in the store."""


class CorruptEntryError(Exception):
    """What the store holds under the entry's name is not the entry."""


_Length = Annotated[int, msgspec.Meta(ge=1, le=MAX_ENTRY_BYTES)]
_Checksum = Annotated[bytes, msgspec.Meta(min_length=_CHECKSUM_BYTES, max_length=_CHECKSUM_BYTES)]


class StoredEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The header of an entry."""

    version: int = _VERSION
    identifier: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    fingerprint: Annotated[str, msgspec.Meta(max_length=128)]
    dtype: str
    """As safetensors names it."""
    shape: Annotated[tuple[_Length, ...], msgspec.Meta(min_length=1, max_length=8)]
    chunk_bytes: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES)] = CHUNK_BYTES
    """Of all chunks but the last, which has the rest."""
    checksums: Annotated[tuple[_Checksum, ...], msgspec.Meta(max_length=MAX_ENTRY_BYTES // CHUNK_BYTES)] = ()

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def chunk_sizes(self) -> list[int]:
        """Return the sizes of the chunks, in order."""
        whole, rest = divmod(self.size_bytes, self.chunk_bytes)
        return [self.chunk_bytes] * whole + ([rest] if rest else [])

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes, identifier: str, fingerprint: str) -> StoredEntry:
        """Read a header. Raises CorruptEntryError unless it is one of this entry, and agrees with itself."""
        try:
            entry = _decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise CorruptEntryError("its header can't be read") from None
        if entry.version != _VERSION:
            raise CorruptEntryError(f"its format has the version {entry.version}, not {_VERSION}")
        if entry.identifier != identifier or entry.fingerprint != fingerprint:
            raise CorruptEntryError("it is the entry of another item or model")
        if entry.dtype not in _ITEM_BYTES or not 0 < entry.size_bytes <= MAX_ENTRY_BYTES:
            raise CorruptEntryError("its dtype or its size can't be")
        if len(entry.checksums) != -(-entry.size_bytes // entry.chunk_bytes):
            raise CorruptEntryError("it has another number of checksums than of chunks")
        return entry

    @classmethod
    def of(cls, identifier: str, fingerprint: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> StoredEntry:
        """Return the header of an embedding, whose bytes are ``data``."""
        checksums = tuple(checksum(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES))
        return cls(identifier=identifier, fingerprint=fingerprint, dtype=dtype, shape=shape, checksums=checksums)


_decoder = msgspec.msgpack.Decoder(StoredEntry)


def checksum(chunk: memoryview) -> bytes:
    """Return the checksum of a chunk."""
    import xxhash  # an extra, which the proxy doesn't need

    return xxhash.xxh3_128_digest(chunk)


def check_chunk(chunk: memoryview, expected: bytes) -> None:
    """Raise CorruptEntryError unless the chunk has this checksum."""
    if checksum(chunk) != expected:
        raise CorruptEntryError("a checksum is wrong")
