"""Checks of the shared cache of embeddings, ``--ec-store``, as this machine reaches it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from chiasm.doctor.report import Check, Result, size
from chiasm.ec_transfer.stores import AbsentEntryError, CorruptEntryError, StoredEntry, StoreError, open_store
from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, missing_modules

_STORE = Check("shared cache")
_MEMORY = Check("shared cache memory")
_TRAVEL = Check("shared cache travel")
_FINGERPRINT = "d0c"
_TRIAL_BYTES = 4 << 20
_HERE = frozenset({"127.0.0.1", "::1", "localhost"})
_WHY = "every image is encoded, as without a shared cache; no request fails."


def store(url: str) -> Iterator[Result]:
    """Check that the store answers, evicts, and gives back what it was given."""
    try:
        opened = open_store(url)
    except ConfigurationError as error:
        yield _STORE.refused(error, "correct the URL.")
        return
    try:
        health = opened.health()
    except StoreError as error:
        yield _STORE.problem(str(error), _WHY, "start the server, or correct --ec-store, user and password.")
        return
    address = opened.address
    yield _STORE.ok(f"{address} answers: {health.server}")
    if address.scheme == "redis" and address.host not in _HERE:
        yield _STORE.warning(
            f"{address} is reached without TLS",
            "whoever sees the network sees the embeddings of images, and the password.",
            "use rediss://, unless the network is trusted.",
        )
    if health.max_bytes and health.evicts:
        yield _MEMORY.ok(f"{size(health.used_bytes)} of {size(health.max_bytes)} used; it evicts")
    else:
        lacks = "has no maxmemory" if not health.max_bytes else "evicts nothing at its maxmemory"
        yield _MEMORY.warning(
            f"the server {lacks}",
            "it takes memory until the machine has none, or refuses new embeddings when it is full.",
            "bound it, and have it evict what was not used lately.",
            "redis-cli config set maxmemory 8gb; redis-cli config set maxmemory-policy allkeys-lru",
        )
    if missing_modules(Extra.ENGINE):
        yield _TRAVEL.skipped("an entry is written and read with the packages of the engine, which are missing")
        return
    data = memoryview(secrets.token_bytes(_TRIAL_BYTES))
    entry = StoredEntry.of(secrets.token_hex(32), _FINGERPRINT, "U8", (_TRIAL_BYTES, 1), data)
    buffer = memoryview(bytearray(_TRIAL_BYTES))
    try:
        opened.put(entry, data)
        started = time.perf_counter()
        opened.get_into(entry, buffer)
        seconds = time.perf_counter() - started
    except (StoreError, AbsentEntryError, CorruptEntryError) as error:
        yield _TRAVEL.problem(f"an entry does not come back: {error}", _WHY, "see the server's log and its settings.")
    else:
        yield _TRAVEL.ok(f"an entry of {size(_TRIAL_BYTES)} is written, and read in {1000 * seconds:.1f} ms")
    finally:
        opened.close()
