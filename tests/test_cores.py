"""How many cores a process may use, and how its threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from chiasm import control_groups, cores


@pytest.mark.parametrize("group", ["/", "/system.slice/chiasm.service"], ids=["container", "service"])
@pytest.mark.parametrize(("limit", "count"), [("100000 100000", 1), ("150000 100000", 2), ("max 100000", 8), ("?", 8)])
def test_the_quota_of_a_container_or_a_service_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, count: int, group: str
) -> None:
    folder, own = tmp_path / "groups", tmp_path / "own"
    (folder / group.lstrip("/")).mkdir(parents=True)
    (folder / group.lstrip("/") / "cpu.max").write_text(limit)
    own.write_text(f"0::{group}\n")
    monkeypatch.setattr(control_groups, "_ROOT", folder)
    monkeypatch.setattr(control_groups, "_OWN", own)
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


_BUSY = """
import sys, time
from chiasm.cores import allowed_cpus, lower_priority, lower_session_priority, pin_to
nice, seconds = int(sys.argv[1]), float(sys.argv[2])
pin_to([min(allowed_cpus())])
lower_session_priority(nice)
lower_priority(nice)
print("ready", flush=True)
sys.stdin.readline()
began = time.process_time()
print("busy", flush=True)
while time.process_time() - began < seconds:
    pass
print("done", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
def test_an_encoder_gets_its_least_share_of_a_core_that_a_language_model_keeps_busy() -> None:
    """Counted in CPU time, on the core that both are pinned to: other processes there take from both.

    What isn't asserted is that it gets no more: it does while the language model's end is on its way to this process.
    """

    def busy(nice: int, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _BUSY, str(nice), str(seconds)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )

    def say(process: subprocess.Popen[str], answer: str) -> None:
        assert process.stdin is not None
        process.stdin.write("go\n")
        hear(process, answer)

    def hear(process: subprocess.Popen[str], word: str) -> None:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == word

    def cpu_seconds(process: subprocess.Popen[str]) -> float:
        times = psutil.Process(process.pid).cpu_times()
        return float(times.user + times.system)

    window = 1.5
    with busy(cores.ENCODER_NICE, 3600.0) as encoder, busy(0, window) as language:
        try:
            for process in (encoder, language):
                hear(process, "ready")
            say(encoder, "busy")
            before = cpu_seconds(encoder)
            say(language, "busy")
            hear(language, "done")
            used = cpu_seconds(encoder) - before
        finally:
            for process in (encoder, language):
                process.kill()
    assert used / (used + window) > 0.1  # the kernel's weights make it a quarter


@pytest.mark.parametrize(("cpus", "text"), [((0,), "0"), ((0, 1, 2, 5), "0-2,5"), ((3, 2), "2-3"), ((), "")])
def test_cpus_are_shown_as_a_person_writes_them(cpus: tuple[int, ...], text: str) -> None:
    assert cores.show_cpus(cpus) == text


def test_what_a_cpu_can_do_is_read_from_the_words_of_linux() -> None:
    x86 = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\nvmx flags\t: vnmi\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert cores.parse_flags(x86) == {"fpu", "avx2", "avx512_bf16"}
    assert cores.parse_flags("processor : 0\nFeatures : fp asimd bf16\n") == {"fp", "asimd", "bf16"}
    assert cores.parse_flags("") == frozenset()


@pytest.mark.parametrize(("said", "vendor"), [("AuthenticAMD", "AMD"), ("GenuineIntel", "Intel"), ("", "")])
def test_the_vendor_of_a_cpu_is_read(said: str, vendor: str) -> None:
    assert cores.parse_vendor(f"processor\t: 0\nvendor_id\t: {said}\n\nprocessor\t: 1\nvendor_id\t: Other\n") == vendor
    assert cores.parse_vendor("processor : 0\nFeatures : fp\n") == ""
    assert cores.has_native_bfloat16({"avx2", "amx_bf16"})
    assert not cores.has_native_bfloat16({"avx2", "avx512f"})
