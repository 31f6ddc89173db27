"""The control groups of Linux whose limits hold for this process: that of a container, or of a service of systemd."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_SECOND_VERSION = "0::/"


def control_groups() -> list[Path]:
    """Return the folders of this process's group and of all groups around it, of the second version of control groups.

    A container sees its own group as the root. On a machine, a service is in a group below it.
    """
    try:
        lines = _OWN.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    own = next((line.removeprefix(_SECOND_VERSION) for line in lines if line.startswith(_SECOND_VERSION)), "")
    folder = _ROOT / own
    if ".." in folder.parts:  # the process has been moved out of what it sees as the root
        return [_ROOT]
    return [one for one in (folder, *folder.parents) if one.is_relative_to(_ROOT)]
