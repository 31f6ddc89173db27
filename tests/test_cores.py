"""How many cores a process may use, and how its threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chiasm import cores


@pytest.mark.parametrize(("limit", "count"), [("100000 100000", 1), ("150000 100000", 2), ("max 100000", 8), ("?", 8)])
def test_the_quota_of_a_container_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, count: int
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "allowed_cpus", lambda: set(range(8)))
    assert cores.usable_cores() == count


def test_waiting_threads_spin_briefly_and_sleep_then_unless_the_environment_says_otherwise() -> None:
    environment: dict[str, str] = {}
    cores.share_cores(3, environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "3"}
    environment = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}
    cores.share_cores(3, environment)
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
def test_a_thread_of_lower_priority_hands_its_niceness_to_the_threads_that_it_starts() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def lowered() -> tuple[int, int]:
        cores.lower_priority(5)
        with ThreadPoolExecutor(1) as started:
            return niceness(), started.submit(niceness).result()

    of_process = niceness()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lowered).result() == (min(19, of_process + 5),) * 2
    assert niceness() == of_process


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
@pytest.mark.parametrize("nicer", [10, 17])
def test_a_thread_gives_way_to_its_process_however_nice_that_was_started(nicer: int) -> None:
    """Who isn't root can't make a thread less nice than it is, so a fixed niceness would fail there."""
    script = f"""
import os, threading
from chiasm.cores import lower_priority
os.nice({nicer})
def give_way():
    lower_priority(5)
    print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
thread = threading.Thread(target=give_way)
thread.start()
thread.join()
print(os.nice(0))
"""
    found = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    of_process = min(19, os.nice(0) + nicer)
    assert found.stdout.split() == [str(min(19, of_process + 5)), str(of_process)], found.stderr


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel has no automatic groups")
def test_a_process_that_leads_a_session_lowers_the_priority_of_its_session() -> None:
    script = """
from pathlib import Path
from chiasm.cores import lower_session_priority
lower_session_priority(5)
print(Path("/proc/self/autogroup").read_text())
"""
    found = subprocess.run(
        [sys.executable, "-c", script], check=False, start_new_session=True, capture_output=True, text=True
    )
    assert found.stdout.split()[-2:] == ["nice", "5"], found.stderr


@pytest.mark.parametrize(("cpus", "text"), [((0,), "0"), ((0, 1, 2, 5), "0-2,5"), ((3, 2), "2-3"), ((), "")])
def test_cpus_are_shown_as_a_person_writes_them(cpus: tuple[int, ...], text: str) -> None:
    assert cores.show_cpus(cpus) == text


def test_what_a_cpu_can_do_is_read_from_the_words_of_linux() -> None:
    x86 = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\nvmx flags\t: vnmi\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert cores.parse_flags(x86) == {"fpu", "avx2", "avx512_bf16"}
    assert cores.parse_flags("processor : 0\nFeatures : fp asimd bf16\n") == {"fp", "asimd", "bf16"}
    assert cores.parse_flags("") == frozenset()
    assert cores.has_native_bfloat16({"avx2", "amx_bf16"})
    assert not cores.has_native_bfloat16({"avx2", "avx512f"})
