"""Entries in a server that speaks Redis' protocol: Redis 7 and 8, Valkey 8 and 9, and what is compatible with them.

An entry has the keys ``chiasm:ec:1:FINGERPRINT:IDENTIFIER`` for its header, and for each chunk the same with ``:N:CHECKSUM``.
The identifier is made with the tenant's salt, so tenants share no key. The server evicts: its ``maxmemory-policy`` says what
goes when ``maxmemory`` is reached.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from chiasm.ec_transfer.base import check_identifier
from chiasm.ec_transfer.stores.address import StoreAddress
from chiasm.ec_transfer.stores.base import Store, StoreHealth
from chiasm.ec_transfer.stores.entry import (
    CHUNK_BYTES,
    MAX_HEADER_BYTES,
    AbsentEntryError,
    CorruptEntryError,
    StoredEntry,
    StoreError,
    StoreFullError,
    check_chunk,
)
from chiasm.ec_transfer.stores.resp import Connection, Reply, ServerError, TooLongError, WrongLengthError

_CONNECT_SECONDS = 1.0
_CALL_SECONDS = 1.0
_WRITE_SECONDS = 5.0
"""Longer, since nobody waits for a write, and one that was given up is lost."""
_LEAST_BYTES_PER_SECOND = 20e6
"""A store that is slower than this is of no use, since encoding again takes no longer."""
_AHEAD = 3
"""Chunks that are asked for before the first has arrived, so that the server never waits."""
_MAX_IDLE = 8
_MAX_INFO_BYTES = 64 << 10


class RedisStore(Store):
    """Keeps a connection for each thread that uses it at the same time; at most 8 stay open when nobody does."""

    def __init__(self, address: StoreAddress) -> None:
        super().__init__(address)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._expiry = (b"EX", b"%d" % address.ttl_seconds) if address.ttl_seconds else ()

    def exists_many(self, identifiers: Sequence[str], fingerprint: str) -> list[StoredEntry | None]:
        if not identifiers:
            return []
        keys = [_key(identifier, fingerprint) for identifier in identifiers]
        try:
            with self._connection(_CALL_SECONDS) as connection:
                values = connection.call(b"MGET", *keys, max_bytes=MAX_HEADER_BYTES, max_items=len(keys))
        except TooLongError:  # somebody has overwritten one of them, which must not hide the others
            values = self._beginnings(keys)
        if not isinstance(values, list) or len(values) != len(keys):
            raise StoreError(f"{self.address} answered another question than it was asked.")
        return [_read(value, name, fingerprint) for value, name in zip(values, identifiers, strict=True)]

    def _beginnings(self, keys: Sequence[bytes]) -> Reply:
        """Return the values of these keys, each cut off so that it is no header if it is longer than one."""
        with self._connection(_CALL_SECONDS) as connection:
            for key in keys:
                connection.send(b"GETRANGE", key, b"0", b"%d" % MAX_HEADER_BYTES)
            values = [connection.reply(MAX_HEADER_BYTES + 1) for _ in keys]
        return [value if isinstance(value, bytes) and len(value) <= MAX_HEADER_BYTES else None for value in values]

    def get_into(self, entry: StoredEntry, buffer: memoryview) -> None:
        if len(buffer) != entry.size_bytes:
            raise ValueError("The buffer must have exactly the size of the entry.")
        key = _key(entry.identifier, entry.fingerprint)
        sizes = entry.chunk_sizes()
        names = keys_of(entry)
        try:
            with self._connection(_CALL_SECONDS + _seconds_for(entry.size_bytes)) as connection:
                for name in names[:_AHEAD]:
                    connection.send(b"GET", name)
                at = 0
                for number, size in enumerate(sizes):
                    chunk = buffer[at : at + size]
                    if not connection.read_into(chunk):
                        raise AbsentEntryError("a chunk is gone")
                    if number + _AHEAD < len(names):
                        connection.send(b"GET", names[number + _AHEAD])
                    check_chunk(chunk, entry.checksums[number])
                    at += size
        except WrongLengthError:
            self._remove(key)
            raise CorruptEntryError("a chunk has another length") from None
        except (CorruptEntryError, AbsentEntryError):
            self._remove(key)
            raise

    def put(self, entry: StoredEntry, data: memoryview) -> None:
        key = _key(entry.identifier, entry.fingerprint)
        with self._connection(_WRITE_SECONDS + _seconds_for(len(data))) as connection:
            for number, name in enumerate(keys_of(entry)):
                chunk = data[number * CHUNK_BYTES :][:CHUNK_BYTES]
                connection.call(b"SET", name, chunk, *self._expiry)
            connection.call(b"SET", key, entry.to_bytes(), *self._expiry)

    def health(self) -> StoreHealth:
        with self._connection(_CALL_SECONDS) as connection:
            info = connection.call(b"INFO", max_bytes=_MAX_INFO_BYTES)
        lines = info.decode("utf-8", "replace").splitlines() if isinstance(info, bytes) else []
        said = {name: value for name, _, value in (line.partition(":") for line in lines)}
        name = "valkey" if "valkey_version" in said else "redis"
        version = said.get("valkey_version") or said.get("redis_version") or "of unknown version"
        return StoreHealth(
            f"{name} {version}",
            used_bytes=_number(said.get("used_memory")),
            max_bytes=_number(said.get("maxmemory")),
            evicts=said.get("maxmemory_policy", "noeviction") != "noeviction",
        )

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextlib.contextmanager
    def _connection(self, seconds: float) -> Iterator[Connection]:
        """Lend a connection for so many seconds; close it unless all went well."""
        connection = self._take() or Connection(self.address, _CONNECT_SECONDS)
        connection.allow(seconds)
        try:
            yield connection
        except ServerError as error:
            connection.close()
            if error.kind == "OOM":
                raise StoreFullError(f"{self.address} is full and evicts nothing; set its maxmemory-policy.") from None
            raise StoreError(f"{self.address} refused a command ({error.kind}).") from None
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _take(self) -> Connection | None:
        """Return a connection that is open and unused, if there is one."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_quiet:
                return connection
            connection.close()

    def _remove(self, key: bytes) -> None:
        """Remove a header, so that nobody finds an entry that can't be read."""
        with contextlib.suppress(StoreError), self._connection(_CALL_SECONDS) as connection:
            connection.call(b"DEL", key)


def _key(identifier: str, fingerprint: str) -> bytes:
    return f"chiasm:ec:1:{fingerprint}:{check_identifier(identifier)}".encode()


def keys_of(entry: StoredEntry) -> list[bytes]:
    """Return the keys of an entry's chunks, in order."""
    key = _key(entry.identifier, entry.fingerprint)
    return [b"%b:%d:%b" % (key, number, one.hex().encode()) for number, one in enumerate(entry.checksums)]


def _read(value: object, identifier: str, fingerprint: str) -> StoredEntry | None:
    if not isinstance(value, bytes):
        return None
    try:
        return StoredEntry.from_bytes(value, identifier, fingerprint)
    except CorruptEntryError:
        return None


def _seconds_for(size_bytes: int) -> float:
    return size_bytes / _LEAST_BYTES_PER_SECOND


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() and len(text) < 20 else 0
