"""Stores: caches of embeddings that a whole fleet shares, beside whichever connector moves them.

``base`` holds the interface and opens a store by its URL, which ``address`` reads. ``redis`` keeps entries in a server that
speaks Redis' protocol, through the client in ``resp``; ``folder`` keeps them in files. ``entry`` says what is kept of an
embedding. ``writer`` writes behind and ``reader`` reads ahead, on threads of their own; ``recovery`` reads what an encoder has
lost; ``guard`` bounds what a store that fails may cost. Nothing here needs torch, since the proxy asks stores too.
"""

from chiasm.ec_transfer.stores.address import StoreAddress
from chiasm.ec_transfer.stores.base import Store, StoreHealth, StoreURL, open_store
from chiasm.ec_transfer.stores.entry import (
    AbsentEntryError,
    CorruptEntryError,
    StoredEntry,
    StoreError,
    StoreFullError,
)
from chiasm.ec_transfer.stores.guard import Guard

__all__ = [
    "AbsentEntryError",
    "CorruptEntryError",
    "Guard",
    "Store",
    "StoreAddress",
    "StoreError",
    "StoreFullError",
    "StoreHealth",
    "StoreURL",
    "StoredEntry",
    "open_store",
]
