"""How much memory is free: on the machine, and in the container or the service that this process runs in."""

from __future__ import annotations

from pathlib import Path

from chiasm.control_groups import control_groups


def free_memory() -> int:
    """Return the bytes that are free on the machine, or in this container or service if that is less."""
    import psutil

    in_groups = [free for group in control_groups() if (free := _free_in(group)) is not None]
    return min([int(psutil.virtual_memory().available), *in_groups])


def _free_in(group: Path) -> int | None:
    """Return the bytes that a Linux control group still allows, pages of files counted as free; None without a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        of_files = sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file"))
        return max(0, int(limit) - used + of_files)
    except (OSError, ValueError):
        return None
