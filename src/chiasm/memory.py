"""How much memory is free: on the machine, and in the container that this process runs in."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the bytes that are free on the machine, or in this container if that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    in_container = free_in_container(_CGROUP)
    return free if in_container is None else min(free, in_container)


def free_in_container(cgroup: Path) -> int | None:
    """Return the bytes that a Linux control group still allows, pages of files counted as free; None without a limit."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        of_files = sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file"))
        return max(0, int(limit) - used + of_files)
    except (OSError, ValueError):
        return None
