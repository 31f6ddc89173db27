"""Entries in a folder that all machines mount, one safetensors file each.

The first 4096 bytes, or a multiple of it, are the header of safetensors, whose metadata holds the entry's own. An entry appears
whole or not at all, and the least recently used files are removed first.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Sequence

import msgspec

from chiasm.ec_transfer.base import check_identifier
from chiasm.ec_transfer.bounded_folder import BoundedFolder, Signature, write_whole
from chiasm.ec_transfer.folder_check import examine_folder
from chiasm.ec_transfer.stores.address import StoreAddress
from chiasm.ec_transfer.stores.base import Store, StoreHealth
from chiasm.ec_transfer.stores.entry import (
    MAX_HEADER_BYTES,
    AbsentEntryError,
    CorruptEntryError,
    StoredEntry,
    StoreError,
    StoreFullError,
    check_chunk,
)
from chiasm.errors import Code, ConfigurationError, StorageError

_PAGE_BYTES = 4096
_LENGTH_BYTES = 8
_METADATA = "chiasm.store"


class FolderStore(Store):
    """A bounded folder. Raises ConfigurationError for one that other users could change, or that can't be made."""

    def __init__(self, address: StoreAddress) -> None:
        super().__init__(address)
        path = address.folder
        try:
            if findings := examine_folder(path, writes=True):
                raise ConfigurationError(" ".join(finding.message for finding in findings))
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"The store {address} can't be used: {error.strerror}.") from None
        self._folder = BoundedFolder(path, address.max_bytes, lambda size_bytes: None)

    def exists_many(self, identifiers: Sequence[str], fingerprint: str) -> list[StoredEntry | None]:
        return [self._header(identifier, fingerprint) for identifier in identifiers]

    def get_into(self, entry: StoredEntry, buffer: memoryview) -> None:
        if len(buffer) != entry.size_bytes:
            raise ValueError("The buffer must have exactly the size of the entry.")
        descriptor = self._open(entry.identifier)
        if descriptor is None:
            raise AbsentEntryError("the file is gone")
        try:
            status = os.fstat(descriptor)
            found, offset = _read_header(descriptor, entry.identifier, entry.fingerprint)
            if found != entry:
                raise AbsentEntryError("another file has taken its place")
            at = 0
            for size, expected in zip(entry.chunk_sizes(), entry.checksums, strict=True):
                chunk = buffer[at : at + size]
                _read_whole(descriptor, chunk, offset + at)
                check_chunk(chunk, expected)
                at += size
            os.utime(descriptor)
        except CorruptEntryError:
            self._folder.remove(entry.identifier, Signature.of(status))
            raise
        except OSError as error:
            raise self._fault(error) from None
        finally:
            os.close(descriptor)

    def put(self, entry: StoredEntry, data: memoryview) -> None:
        header = _header_bytes(entry)

        def write(descriptor: int) -> None:
            write_whole(descriptor, data, len(header))
            write_whole(descriptor, memoryview(header), 0)

        try:
            self._folder.publish(entry.identifier, len(header) + len(data), write)
        except StorageError as error:
            raise (StoreFullError if error.code is Code.DISK_FULL else StoreError)(error.message) from None
        except OSError as error:
            raise self._fault(error) from None

    def health(self) -> StoreHealth:
        used = 0
        try:
            with os.scandir(self.address.folder) as files:
                for file in files:
                    with contextlib.suppress(FileNotFoundError):  # it was evicted just now
                        used += file.stat(follow_symlinks=False).st_size
        except OSError as error:
            raise self._fault(error) from None
        return StoreHealth("a folder", used_bytes=used, max_bytes=self.address.max_bytes, evicts=True)

    def close(self) -> None:
        return None

    def _header(self, identifier: str, fingerprint: str) -> StoredEntry | None:
        descriptor = self._open(identifier)
        if descriptor is None:
            return None
        try:
            return _read_header(descriptor, identifier, fingerprint)[0]
        except CorruptEntryError:
            return None
        except OSError as error:
            raise self._fault(error) from None
        finally:
            os.close(descriptor)

    def _open(self, identifier: str) -> int | None:
        path = self._folder.entry_path(check_identifier(identifier))
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._fault(error) from None

    def _fault(self, error: OSError) -> StoreError:
        return StoreError(f"{self.address} can't be used: {error.strerror or type(error).__name__}.")


def _header_bytes(entry: StoredEntry) -> bytes:
    own = base64.b64encode(entry.to_bytes()).decode()
    tensor = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [0, entry.size_bytes]}
    text = msgspec.json.encode({"__metadata__": {_METADATA: own}, "ec_cache": tensor})
    length = -(-(_LENGTH_BYTES + len(text)) // _PAGE_BYTES) * _PAGE_BYTES - _LENGTH_BYTES
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


class _SafetensorsHeader(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


def _read_header(descriptor: int, identifier: str, fingerprint: str) -> tuple[StoredEntry, int]:
    """Return the header and where the data begins. Raises CorruptEntryError and OSError."""
    length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
    if not 0 < length <= 2 * MAX_HEADER_BYTES:
        raise CorruptEntryError("it is torn or not an entry")
    text = os.pread(descriptor, length, _LENGTH_BYTES)
    try:
        own = msgspec.json.decode(text, type=_SafetensorsHeader).metadata.get(_METADATA, "")
        raw = base64.b64decode(own, validate=True)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise CorruptEntryError("it is torn or not an entry") from None
    entry = StoredEntry.from_bytes(raw, identifier, fingerprint)
    offset = _LENGTH_BYTES + length
    if os.fstat(descriptor).st_size != offset + entry.size_bytes:
        raise CorruptEntryError("it is torn")
    return entry, offset


def _read_whole(descriptor: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        read = os.preadv(descriptor, [buffer], offset)
        if not read:
            raise CorruptEntryError("it has become shorter")
        buffer, offset = buffer[read:], offset + read
