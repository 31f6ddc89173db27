"""Producers and consumers in separate processes that share a folder."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from chiasm.ec_transfer import ECTransferRole
from chiasm.ec_transfer.bounded_folder import BoundedFolder
from chiasm.errors import StorageError

from .instance import Instance, Item, Request, config_for, embedding_of, entry_path, identifier_of

PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once for all of them
PROCESSES.set_forkserver_preload([__name__])
ENTRY_BYTES = 4096 + embedding_of("a").nbytes
NAMES = 24
ROUNDS = 300
ROOM = 8


@contextmanager
def running(target: Any, *arguments: object) -> Iterator[tuple[ForkServerProcess, Connection]]:
    """Run ``target(pipe, *arguments)`` in a process; yields the process and the other end of the pipe."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
        process.join()
    finally:
        process.kill()
        process.join()
        ours.close()


def load_and_hold(pipe: Connection, folder: Path) -> None:
    instance = Instance(config_for(folder, ECTransferRole.CONSUMER))
    loaded = instance.load(identifier_of("a"))
    pipe.send(loaded is not None)
    pipe.recv()  # until the entry has been evicted
    pipe.send(loaded is not None and torch.equal(loaded, embedding_of("a")))


def hand_over_metadata(pipe: Connection, folder: Path) -> None:
    instance = Instance(config_for(folder, ECTransferRole.CONSUMER))
    pipe.send(instance.schedule(Request((Item(identifier_of("a")),))))
    pipe.recv()


def write_half(pipe: Connection, folder: Path) -> None:
    def half(descriptor: int) -> None:
        os.write(descriptor, bytes(ENTRY_BYTES // 2))
        pipe.send(True)
        pipe.recv()  # forever

    BoundedFolder(folder, 10 * ENTRY_BYTES, lambda size_bytes: None).publish(identifier_of("a"), ENTRY_BYTES, half)


def write_beyond_the_limit(pipe: Connection, folder: Path) -> None:
    instance = Instance(config_for(folder))
    instance.encode("a")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        instance.encode("b", embedding_of("b", rows=1000))
    except StorageError as error:
        pipe.send(str(error))
    instance.encode("c")


def hammer(pipe: Connection, folder: Path, seed: int) -> None:
    """Save and load at random; report wrong loads and counters."""
    instance = Instance(config_for(folder, max_bytes=ROOM * ENTRY_BYTES))
    choose = random.Random(seed)
    pipe.send("ready")
    pipe.recv()
    wrong, loads = [], 0
    for _ in range(ROUNDS):
        name = choose.randrange(NAMES)
        if choose.random() < 0.5:
            instance.encode(name)
        loaded = instance.load(identifier_of(name))
        if loaded is not None:
            loads += 1
            if not torch.equal(loaded, embedding_of(name)):
                wrong.append(name)
    corrupt = instance.worker.stats.corrupt_entries + instance.scheduler.stats.corrupt_entries
    pipe.send((wrong, corrupt, loads, instance.worker.stats.evictions))


def stored_bytes(folder: Path) -> int:
    """The bytes of entries and unfinished files, while no writer can add or remove one."""
    with (folder / ".usage").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = [entry for entry in os.scandir(folder) if entry.name.endswith((".safetensors", ".tmp"))]
        return sum(entry.stat().st_size for entry in files)


def test_many_processes_share_a_small_folder(folder: Path) -> None:
    with (
        running(hammer, folder, 1) as (first, first_pipe),
        running(hammer, folder, 2) as (second, second_pipe),
        running(hammer, folder, 3) as (third, third_pipe),
    ):
        pipes = [first_pipe, second_pipe, third_pipe]
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send("go")
        most = 0
        for pipe in pipes:
            while not pipe.poll(timeout=0.01):
                most = max(most, stored_bytes(folder))
        results = [pipe.recv() for pipe in pipes]
    assert [process.exitcode for process in (first, second, third)] == [0, 0, 0]
    assert most <= ROOM * ENTRY_BYTES
    assert [wrong for wrong, _, _, _ in results] == [[], [], []]
    assert sum(corrupt for _, corrupt, _, _ in results) == 0
    assert sum(loads for _, _, loads, _ in results) > ROUNDS
    assert sum(evictions for _, _, _, evictions in results) > ROOM
    assert not list(folder.glob("*.tmp"))
    assert int((folder / ".usage").read_text()) == stored_bytes(folder) <= ROOM * ENTRY_BYTES


def test_a_reader_in_another_process_keeps_an_entry_that_is_evicted(folder: Path) -> None:
    instance = Instance(config_for(folder, max_bytes=2 * ENTRY_BYTES))
    identifier = instance.encode("a")
    with running(load_and_hold, folder) as (process, pipe):
        assert pipe.recv()
        for name in "bcd":
            instance.encode(name)
        assert not entry_path(folder, identifier).exists()
        pipe.send("evicted")
        assert pipe.recv()
    assert process.exitcode == 0


def test_metadata_from_a_scheduler_in_another_process_is_loaded(folder: Path) -> None:
    identifier = Instance(config_for(folder, ECTransferRole.PRODUCER)).encode("a")
    with running(hand_over_metadata, folder) as (_, pipe):
        worker = Instance(config_for(folder, ECTransferRole.CONSUMER))
        worker.execute(pipe.recv())
        pipe.send("done")
    assert torch.equal(worker.encoder_cache[identifier], embedding_of("a"))


def test_a_killed_writer_leaves_no_entry_and_its_file_is_removed(folder: Path) -> None:
    with running(write_half, folder) as (process, pipe):
        assert pipe.recv()
        instance = Instance(config_for(folder))
        assert len(list(folder.glob("*.tmp"))) == 1  # its writer lives
        assert not instance.scheduler.has_cache_item(identifier_of("a"))
        process.kill()
        process.join()
    Instance(config_for(folder))
    assert not list(folder.glob("*.tmp"))
    loaded = instance.load(instance.encode("a"))
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))
    assert int((folder / ".usage").read_text()) == ENTRY_BYTES


def test_a_write_that_fails_leaves_nothing_behind(folder: Path) -> None:
    with running(write_beyond_the_limit, folder) as (process, pipe):
        assert "File too large" in pipe.recv()
    assert process.exitcode == 0
    assert not list(folder.glob("*.tmp"))
    assert [entry_path(folder, identifier_of(name)).exists() for name in "abc"] == [True, False, True]
    assert int((folder / ".usage").read_text()) == stored_bytes(folder)


def test_two_writers_of_the_same_entry_leave_one_file(folder: Path) -> None:
    """The second publishes its file while the first writes its own."""
    config = config_for(folder)
    second = Instance(config)
    evicted: list[int] = []

    def write(descriptor: int) -> None:
        path = entry_path(folder, second.encode("a"))
        os.pwrite(descriptor, path.read_bytes(), 0)

    BoundedFolder(folder, config.max_bytes, evicted.append).publish(identifier_of("a"), ENTRY_BYTES, write)
    loaded = second.load(identifier_of("a"))
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))
    assert int((folder / ".usage").read_text()) == ENTRY_BYTES == stored_bytes(folder)
    assert evicted == []


def test_threads_publish_concurrently(folder: Path) -> None:
    instance = Instance(config_for(folder, max_bytes=ROOM * ENTRY_BYTES))
    names = [f"{thread}-{number}" for thread in range(4) for number in range(12)] + ["same"] * 4
    for name in names:
        instance.encoder_cache[identifier_of(name)] = embedding_of(name)
    start = threading.Barrier(4)
    failures: list[StorageError] = []

    def publish(own: list[str]) -> None:
        start.wait()
        for name in own:
            try:
                instance.worker.save_caches(instance.encoder_cache, identifier_of(name))
            except StorageError as error:
                failures.append(error)

    threads = [threading.Thread(target=publish, args=(names[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    stats = instance.worker.stats
    assert 49 <= stats.saves <= 52
    assert stats.saved_bytes == stats.saves * embedding_of("a").nbytes
    # An entry that was written several times at once made room for each, and one file remains.
    assert (ROOM - 3) * ENTRY_BYTES <= stored_bytes(folder) <= ROOM * ENTRY_BYTES
    assert stored_bytes(folder) == int((folder / ".usage").read_text())
    for name in sorted(set(names)):
        loaded = instance.load(identifier_of(name))
        assert loaded is None or torch.equal(loaded, embedding_of(name))
