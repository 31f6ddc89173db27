"""How many CPU cores there are, what they can do, and which of them a process may use."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence, Set
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from chiasm.control_groups import control_groups
from chiasm.errors import ConfigurationError

_CPUINFO = Path("/proc/cpuinfo")
_NATIVE_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
_MOST_CPUS = 1 << 16
_SPINS = 1000
ENCODER_NICE = 5
"""Niceness of threads that encode: decode steps go first, and of a core that both want, encoding keeps a quarter."""
ARRIVAL_NICE = 10
"""Niceness of threads that bring embeddings in: of a core that a step wants too, they keep a tenth."""
_NICEST = 19
_AUTOGROUP = Path("/proc/self/autogroup")
_AUTOGROUP_ATTEMPTS, _AUTOGROUP_SECONDS = 50, 0.1


def usable_cores() -> int:
    """Return how many cores this process may keep busy: those that it may run on, limited by the CPU quota of its container
    or service."""
    quotas = [math.ceil(quota) for group in control_groups() if (quota := _quota_of(group)) is not None]
    return max(1, min([len(allowed_cpus()) or os.cpu_count() or 1, *quotas]))


def allowed_cpus() -> set[int]:
    """Return the CPUs that this process may run on; empty if the system doesn't tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@cache
def cpu_flags() -> frozenset[str]:
    """Return what this machine's CPU can do, in the words of Linux, such as ``avx2``; empty if the system doesn't tell."""
    return parse_flags(_cpuinfo())


@cache
def cpu_vendor() -> str:
    """Return who made this machine's CPU, such as ``AMD``; empty if the system doesn't tell."""
    return parse_vendor(_cpuinfo())


def _cpuinfo() -> str:
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def has_native_bfloat16(flags: Set[str]) -> bool:
    """Tell whether a CPU with these flags has AVX512-BF16 or AMX, and so multiplies bfloat16 faster than float32."""
    return not _NATIVE_BFLOAT16.isdisjoint(flags)


def parse_flags(cpuinfo: str) -> frozenset[str]:
    """Return the flags of the first CPU in the text of ``/proc/cpuinfo``; empty if it has none."""
    return frozenset(_value(cpuinfo, "flags", "Features").split())


def parse_vendor(cpuinfo: str) -> str:
    """Return the vendor of the first CPU in the same text; empty if it has none."""
    return _value(cpuinfo, "vendor_id").removeprefix("Authentic").removeprefix("Genuine")


def _value(cpuinfo: str, *names: str) -> str:
    """Return the first value of one of these names; empty if there is none."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def parse_cpus(text: str) -> tuple[int, ...]:
    """Return the CPUs of ``0,2-3``, sorted. Raises ConfigurationError."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not dash:
            last = first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < _MOST_CPUS):
            raise ConfigurationError(f"{text!r} is not a set of CPUs; write for example 0,2-3.")
        cpus.update(range(int(first), int(last) + 1))
    return tuple(sorted(cpus))


def show_cpus(cpus: Sequence[int]) -> str:
    """Return CPUs as a person writes them: ``0,2-3``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def check_cpus(cpus: Sequence[int]) -> None:
    """Raise ConfigurationError unless this process and its children may run on all of ``cpus``."""
    allowed = allowed_cpus()
    if cpus and not allowed:
        raise ConfigurationError("This system cannot pin processes to CPUs; name no CPUs.")
    if missing := sorted(set(cpus) - allowed):
        raise ConfigurationError(
            f"CPU {', '.join(map(str, missing))} cannot be used here; choose from {', '.join(map(str, sorted(allowed)))}."
        )


def pin_to(cpus: Sequence[int]) -> None:
    """Pin this process, and the threads that it starts from now on, to ``cpus``. Raises ConfigurationError."""
    check_cpus(cpus)
    if cpus:
        os.sched_setaffinity(0, cpus)


def lower_priority(nice: int) -> None:
    """Let the calling thread, and the threads that it starts from now on, compute when others leave cores idle.

    ``nice``, from 0 to 19, is added to the niceness of the process, up to 19. Every step of it is worth a tenth of a core among
    threads that compete for one, so a thread that is 5 nicer keeps a quarter of what the others get. Does nothing where threads
    have no niceness of their own.
    """
    if nice and sys.platform == "linux":
        of_process = os.getpriority(os.PRIO_PROCESS, os.getpid())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(_NICEST, of_process + nice))


def lower_session_priority(nice: int) -> None:
    """Do the same for this process's session, if it leads one.

    Linux weighs sessions before threads where automatic groups are on (``kernel.sched_autogroup_enabled``): there, the
    niceness of a thread counts within its own session only.
    """
    if not nice or not _AUTOGROUP.exists() or os.getsid(0) != os.getpid():
        return
    for _ in range(_AUTOGROUP_ATTEMPTS):
        try:
            _AUTOGROUP.write_text(str(nice))
            return
        except BlockingIOError:  # the kernel takes one change in a tenth of a second from all processes
            time.sleep(_AUTOGROUP_SECONDS)
        except OSError:
            return


class _Thread(threading.local):
    adapt: Callable[[], None] | None = None


_thread = _Thread()


def adapt() -> None:
    """Let the calling thread use its part of cores that others share, if it has one. Called before operators that take long."""
    if _thread.adapt is not None:
        _thread.adapt()


@contextmanager
def adapting(how: Callable[[], None]) -> Iterator[None]:
    """A block in which :func:`adapt` of this thread calls ``how``."""
    before, _thread.adapt = _thread.adapt, how
    try:
        yield
    finally:
        _thread.adapt = before


def share_cores(threads: int | None, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that OpenMP reads when torch is imported. Keeps values that are set already.

    By default, threads that wait for work spin for milliseconds. On cores that other processes use too, a spinning thread can
    block the very thread that it waits for: operators have been seen to take a hundred times as long. Threads that sleep at
    once are slow to wake: operators on two threads took a fifth longer. So they spin for some tens of microseconds, for
    most gaps between operators. Three times as long made nothing faster, and took a quarter more CPU time on a busy machine.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.setdefault("GOMP_SPINCOUNT", str(_SPINS))
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))


def _quota_of(group: Path) -> float | None:
    """Return the CPU time that a Linux control group allows, in cores; None if it sets no limit."""
    try:
        limit, period = (group / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None
