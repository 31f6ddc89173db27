"""Whatever goes wrong, in any order: no wrong byte, nothing that never comes, and nothing left behind.

``CHIASM_FAULTS=10000 .venv/bin/pytest tests/ec_connector/test_random_faults.py -s`` takes a few minutes, and reports.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from chiasm.ec_transfer.entry_file import HEADER_BYTES
from chiasm.errors import StorageError
from tests.launch.waiting import eventually

from .instance import Request, embedding_of, identifier_of
from .peers import CONNECTORS, Encoder, LanguageModel

NUM_FAULTS = int(os.environ.get("CHIASM_FAULTS", "100"))
"""For each connector."""
MAX_GROWTH_BYTES = {"SharedMemoryConnector": 4 << 20, "TcpConnector": 4 << 20, "NixlConnector": 16 << 20}
"""From a fifth of the faults to the end, however many they are. UCX makes and keeps buffers for some time."""
SETTINGS = {"max_bytes": 1 << 20, "receive_bytes": 1 << 18}
NAMES = [f"image {number}" for number in range(12)]
ROW_BYTES = 128
PATIENCE_SECONDS = 60.0


class Turmoil:
    """Two encoders and a language model, to which anything may happen."""

    def __init__(self, connector: str, seed: int, *, separate_processes: bool) -> None:
        self._chance = random.Random(seed)
        self._connector = connector
        self._settings: dict[str, Any] = {**SETTINGS, "separate_processes": separate_processes}
        self._encoders = [self._encoder(), self._encoder()]
        self._model = LanguageModel(connector, **self._settings)
        self._embeddings = {name: embedding_of(name, rows=self._chance.choice((1, 300, 700))) for name in NAMES}
        self._gone = [self._encoders[0].place]
        self._kinds: dict[str, Callable[[], None]] = {
            "an encoder restarts": self._restart,
            "an encoder loses an entry": self._evict,
            "a connection is cut": self._cut,
            "an entry is rejected": self._reject,
            "a place is that of an encoder that is gone": self._mislead,
            "the engine drops what it had": self._drop,
        }
        if connector != "SharedMemoryConnector":  # in place, bytes that change are not noticed
            self._kinds["bytes in memory change"] = self._spoil
        self.faults: Counter[str] = Counter()
        self.wanted: list[str] = []

    def _encoder(self) -> Encoder:
        return Encoder(self._connector, **self._settings)

    # ---- what happens -------------------------------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """A request comes, waits while all kinds of things happen, and is served or ends before."""
        self.wanted = self._chance.sample(NAMES, self._chance.randint(1, 3))
        request = self._model.admit(
            str(number), *self.wanted, rows=max(len(self._embeddings[name]) for name in self.wanted)
        )
        self._tell(self.wanted)
        for _ in range(self._chance.randint(0, 3)):
            self._happen()
        if self._chance.random() < 0.8:
            self._serve(request)
        else:
            self.faults["a request ends early"] += 1
            self._model.next_wake(request, seconds=0.001)
        self._model.finish(request)

    def _happen(self) -> None:
        if self._chance.random() < 0.5:
            self._encode(self._chance.choice(NAMES))
        else:
            kind = self._chance.choice(list(self._kinds))
            self.faults[kind] += 1
            self._kinds[kind]()

    def _serve(self, request: Request) -> None:
        give_up = time.monotonic() + PATIENCE_SECONDS
        while missing := [name for name in self.wanted if identifier_of(name) not in self._model.memory]:
            assert time.monotonic() < give_up, f"{missing} never came"
            lost = [name for name in missing if not self._model.scheduler.is_coming(identifier_of(name))]
            for name in lost:  # what the proxy does
                self._encode(name)
            self._model.next_wake(request, seconds=0.005)
            if self._chance.random() < 0.1:
                self._happen()
        for name in self.wanted:
            assert torch.equal(self._model.memory[identifier_of(name)], self._embeddings[name]), name

    def _tell(self, names: list[str]) -> None:
        self._model.scheduler.expect({identifier_of(name): self._chance.choice(self._encoders).place for name in names})

    def _encode(self, name: str) -> None:
        encoder = self._chance.choice(self._encoders)
        encoder.encode(name, self._embeddings[name])
        self._model.scheduler.expect({identifier_of(name): encoder.place})

    # ---- faults -------------------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        which = self._chance.randrange(2)
        self._gone = [self._encoders[which].place]
        self._encoders[which].close()
        self._encoders[which] = self._encoder()

    def _evict(self) -> None:
        self._chance.choice(self._encoders).holding.discard(identifier_of(self._chance.choice(NAMES)), "of chance")

    def _cut(self) -> None:
        """End a connection to an encoder as a network does. Those that UCX makes for itself are its own matter."""
        ports = {encoder.place.port for encoder in self._encoders}
        found = (_connection(int(number), ports) for number in os.listdir("/proc/self/fd"))
        connections = [one for one in found if one is not None]
        if connections:
            self._chance.choice(connections).shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()

    def _reject(self) -> None:
        name = identifier_of(self._chance.choice(self.wanted))
        self._model.memory.pop(name, None)
        self._model.scheduler.discard(name, "of chance")

    def _mislead(self) -> None:
        self._model.scheduler.expect({identifier_of(self._chance.choice(NAMES)): self._gone[0]})

    def _drop(self) -> None:
        self._model.memory.pop(identifier_of(self._chance.choice(self.wanted)), None)

    def _spoil(self) -> None:
        """Change a page of an encoder's memory."""
        encoder = self._chance.choice(self._encoders)
        offset = self._chance.randrange(SETTINGS["max_bytes"] // HEADER_BYTES) * HEADER_BYTES
        os.pwrite(encoder.memory_file.descriptor, self._chance.randbytes(16), offset)

    # ---- the end ------------------------------------------------------------------------------------------------------

    def check_all_is_free(self) -> None:
        """Nothing is pinned: as much as there is room for finds room at both encoders, and at the model.

        At the encoders soon, since the model's word that it is done with something travels.
        """
        gc.collect()
        for encoder in self._encoders:
            assert eventually(partial(_takes_all_memory, encoder)), (
                "an embedding that nobody reads any more is still pinned"
            )
        self.wanted = ["all"]
        self._embeddings["all"] = embedding_of("all", rows=SETTINGS["receive_bytes"] // ROW_BYTES)
        request = self._model.admit("last", "all", rows=len(self._embeddings["all"]))
        while identifier_of("all") not in self._model.memory:
            if not self._model.scheduler.is_coming(identifier_of("all")):
                self._encode("all")
            self._model.next_wake(request)
        self._model.finish(request)

    def end(self) -> None:
        for peer in (*self._encoders, self._model):
            peer.close()


def _takes_all_memory(encoder: Encoder) -> bool:
    rows = (encoder.holding.max_entry_bytes - HEADER_BYTES) // ROW_BYTES
    try:
        encoder.encode("big", embedding_of("big", rows=rows))
    except StorageError:
        return False
    return True


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # it was closed just now
        return ""


def _connection(descriptor: int, ports: set[int]) -> socket.socket | None:
    """Return another descriptor of a TCP connection to one of these ports; None if it is something else, or closed."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        found = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return None
    try:
        is_tcp = found.family == socket.AF_INET and found.type == socket.SOCK_STREAM
        if is_tcp and {found.getpeername()[1], found.getsockname()[1]} & ports:
            return found
    except OSError:
        pass
    found.close()
    return None


def _descriptors() -> Counter[str]:
    """Return what is open."""
    return Counter(_target(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(300 + NUM_FAULTS)
@pytest.mark.parametrize(
    ("connector", "separate_processes"),
    [*((connector, False) for connector in CONNECTORS), ("SharedMemoryConnector", True), ("TcpConnector", True)],
)
def test_random_faults_leave_no_wrong_byte_and_nothing_behind(
    connector: str, separate_processes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Those with separate processes run in one as well, but their halves know nothing of each other."""
    caplog.set_level(logging.CRITICAL, "chiasm")  # what is logged is kept, with the frames of errors
    descriptors, threads = _descriptors(), threading.active_count()
    _run(connector, seed=7, separate_processes=separate_processes)
    gc.collect()
    # A thread takes a moment to end, and holds what it has open until then.
    assert eventually(lambda: _descriptors() - descriptors == Counter()), _descriptors() - descriptors
    assert eventually(lambda: threading.active_count() <= threads)


def _run(connector: str, seed: int, *, separate_processes: bool) -> None:
    turmoil = Turmoil(connector, seed, separate_processes=separate_processes)
    number = settled_bytes = 0
    while turmoil.faults.total() < NUM_FAULTS:
        turmoil.round(number)
        number += 1
        if not settled_bytes and turmoil.faults.total() > NUM_FAULTS // 5:
            settled_bytes = _resident_bytes()
    end_bytes = _resident_bytes()
    turmoil.check_all_is_free()
    turmoil.end()
    print(
        f"\n{connector}: {number} requests, {dict(turmoil.faults)}; {settled_bytes >> 10} KiB of memory after a fifth of the "
        f"faults, {end_bytes >> 10} KiB at the end"
    )
    assert end_bytes - settled_bytes < MAX_GROWTH_BYTES[connector]
