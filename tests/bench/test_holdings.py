"""What a process holds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pytest

from chiasm.bench.holdings import DESCRIPTORS, RESIDENT, SHARED, THREADS, held_by, is_here, listeners, pid_at

MIB = 1 << 20


HOLDER = """
import os
print(flush=True)
input()
descriptor = os.memfd_create("held")
twice = os.dup(descriptor)
os.ftruncate(descriptor, 64 << 20)
os.pwrite(descriptor, bytes(2 << 20), 0)
print(flush=True)
input()
"""


def test_memory_files_descriptors_and_threads_are_counted() -> None:
    """Those of a process that does nothing else."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        before = held_by(holder.pid)
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == b"\n"
        after = held_by(holder.pid)
        holder.kill()
    assert after[SHARED] - before[SHARED] == 2 * MIB  # what is written, once, and not what could be
    assert after[DESCRIPTORS] == before[DESCRIPTORS] + 2
    assert after[RESIDENT] > MIB
    assert after[THREADS] >= 1


def test_a_process_that_is_gone_is_told() -> None:
    with pytest.raises(psutil.NoSuchProcess):
        held_by(2**22)  # no process has so large a number


def test_who_listens_is_found_by_the_url() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        known = listeners()
        assert pid_at(f"http://localhost:{port}", known) == os.getpid()
        assert pid_at(f"http://192.0.2.1:{port}", known) is None
    assert not is_here("192.0.2.1")
