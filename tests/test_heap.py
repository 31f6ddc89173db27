"""Memory that a process keeps for its large buffers."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BUFFERS = """
import resource
from concurrent.futures import ThreadPoolExecutor
from chiasm.heap import recycle_large_buffers

def use_buffers():
    held = [bytearray(b"x" * (6 << 20)) for _ in range(3)]

with ThreadPoolExecutor(1) as pool:
    if {recycled}:
        recycle_large_buffers(kept_bytes=64 << 20, arenas=4)
    pool.submit(use_buffers).result()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        pool.submit(use_buffers).result()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

FRAGMENTS = """
from chiasm.heap import give_back, recycle_large_buffers

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

recycle_large_buffers(kept_bytes=64 << 20, arenas=4)
pieces, longer = [], []
for _ in range(2000):
    pieces.append(bytes(bytearray(100_000)))
    longer.append(bytes(bytearray(1000)))
pieces.clear()
kept = resident_mib()
give_back()
print(kept - resident_mib())
"""


def faults(*, recycled: bool) -> int:
    """How many pages a process of its own has to be given for buffers that it uses ten times."""
    script = BUFFERS.format(recycled=recycled)
    found = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to keep")
def test_large_buffers_cost_page_faults_only_once() -> None:
    assert faults(recycled=True) < faults(recycled=False) / 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to give back")
def test_free_memory_between_buffers_in_use_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", FRAGMENTS], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 100
