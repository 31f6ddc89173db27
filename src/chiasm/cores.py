"""How many cores there are, and which of them a process may use."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from chiasm.errors import ConfigurationError

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, and no more than its container's share of time."""
    quota = _container_quota()
    cores = len(allowed_cpus()) or os.cpu_count() or 1
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def allowed_cpus() -> set[int]:
    """The CPUs that this process may run on; empty where the system doesn't say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def check_cpus(cpus: Sequence[int]) -> None:
    """Raise ConfigurationError unless this process, and so a child of it, may run on all of ``cpus``."""
    allowed = allowed_cpus()
    if cpus and not allowed:
        raise ConfigurationError("this system cannot pin a process to CPUs; leave the pinning out")
    if missing := sorted(set(cpus) - allowed):
        raise ConfigurationError(
            f"CPU {', '.join(map(str, missing))} cannot be used here; there are {', '.join(map(str, sorted(allowed)))}"
        )


def pin_to(cpus: Sequence[int]) -> None:
    """Keep this process, and the threads that it starts from now on, on ``cpus``. Raises ConfigurationError."""
    check_cpus(cpus)
    if cpus:
        os.sched_setaffinity(0, cpus)


def share_cores(threads: int | None, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what OpenMP reads when torch is imported, which must be later; what a person has set stays.

    By default threads that wait for work spin for milliseconds. On cores that other processes need too, they keep the very
    thread that they wait for from running: operators were seen to take a hundred times as long.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))


def _container_quota() -> float | None:
    """Cores' worth of time that a Linux control group allows, or None if it sets no bound."""
    try:
        limit, period = _QUOTA.read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None
