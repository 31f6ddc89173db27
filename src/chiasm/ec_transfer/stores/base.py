"""The interface of stores, and how one is opened by its URL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from chiasm.ec_transfer.stores.address import URL_VARIABLE, StoreAddress
from chiasm.ec_transfer.stores.entry import StoredEntry
from chiasm.options import Option

StoreURL = Annotated[
    str,
    Option(
        "Shared cache of embeddings: redis://[USER:PASSWORD@]HOST:PORT/DB, rediss:// with TLS, or file:///FOLDER.",
        name="ec_store",
        metavar="URL",
        environment=URL_VARIABLE,
    ),
]
"""A field of this type is the option that names a store."""


class StoreHealth(NamedTuple):
    """What a store says of itself."""

    server: str
    """What it is, such as ``redis 7.0.15``."""
    used_bytes: int
    max_bytes: int
    """0 if it has no limit."""
    evicts: bool
    """Whether it makes room for new entries at its limit."""


class Store(ABC):
    """Keeps entries for a fleet, as long as it likes. Thread-safe.

    Each call ends within seconds, also if the store hangs. Every fault is a StoreError.
    """

    def __init__(self, address: StoreAddress) -> None:
        self.address = address

    @abstractmethod
    def exists_many(self, identifiers: Sequence[str], fingerprint: str) -> list[StoredEntry | None]:
        """Return the header of each entry, None for one that isn't there or isn't valid, in one round trip.

        A header promises nothing: a part of the entry may be gone when it is read. Raises StoreError.
        """

    @abstractmethod
    def get_into(self, entry: StoredEntry, buffer: memoryview) -> None:
        """Read the entry into ``buffer``, of exactly its size, and verify the checksums.

        Raises AbsentEntryError, CorruptEntryError or StoreError; the buffer may have been written to then. A corrupt entry is
        removed from the store, if that succeeds.
        """

    @abstractmethod
    def put(self, entry: StoredEntry, data: memoryview) -> None:
        """Write an entry, whose bytes are ``data``; others find it once this returns. Raises StoreFullError or StoreError."""

    @abstractmethod
    def health(self) -> StoreHealth:
        """Ask the store how it is. Raises StoreError."""

    @abstractmethod
    def close(self) -> None:
        """Close connections. Idempotent."""


def open_store(url: str) -> Store:
    """Return the store with this URL. Connects to nothing yet. Raises ConfigurationError for a URL that can't be used."""
    address = StoreAddress.parse(url)
    if address.scheme == "file":
        from chiasm.ec_transfer.stores.folder import FolderStore

        return FolderStore(address)
    from chiasm.ec_transfer.stores.redis import RedisStore

    return RedisStore(address)
