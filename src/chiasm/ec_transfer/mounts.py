"""Which kind of file system a folder lies on, and whether its files may be mapped."""

from __future__ import annotations

import os
from pathlib import Path

# Where an unlinked file lives until its last reader lets go, also when another process unlinked it. On a network file
# system another host can take the pages away, and the reader dies of SIGBUS.
_LOCAL_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "overlay"})
_MOUNT_TABLE = Path("/proc/self/mountinfo")


def files_may_be_mapped(folder: Path, mount_table: Path = _MOUNT_TABLE) -> bool:
    """Whether a mapped file of ``folder`` stays readable when any process on any host removes it.

    True for the local file systems of Linux and, where there is no mount table, on other systems.
    """
    try:
        mounts = mount_table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return True
    return file_system_of(str(folder.resolve()), mounts) in _LOCAL_FILE_SYSTEMS


def file_system_of(path: str, mounts: list[str]) -> str:
    """The type of the file system at the absolute ``path``, or "" if no line of the mount table covers it."""
    nearest, kind = "", ""
    for line in mounts:
        mount, _, source = line.partition(" - ")
        # Blanks in the mount point are written as octal escapes.
        mount_point = mount.split(" ")[4].encode("latin-1", "surrogateescape").decode("unicode_escape")
        inside = os.path.commonpath([path, mount_point]) == mount_point
        if inside and len(mount_point) >= len(nearest):  # a later mount hides an earlier one at the same point
            nearest, kind = mount_point, source.split(" ")[0]
    return kind
