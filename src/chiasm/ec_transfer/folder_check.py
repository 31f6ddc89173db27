"""Whether a folder can hold the embeddings that instances exchange. Importing this does not load torch."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from chiasm.findings import Finding
from chiasm.ownership import other_writers

# A file that is removed on one of these lives until its last reader closes it, even if another process removes it. On a
# network file system another host can take its pages away, and a reader that has mapped them dies of SIGBUS.
_LOCAL_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "overlay"})
_MOUNT_TABLE = Path("/proc/self/mountinfo")


def examine_folder(path: Path, *, writes: bool = True) -> list[Finding]:
    """Return what prevents instances of this user from exchanging embeddings through a folder.

    The folder need not exist if this user can create it. With ``writes``, a file is written and locked in it as encoders do;
    it is removed again.
    """
    nearest = nearest_existing(path)
    if not nearest.is_dir():
        return [Finding(f"{nearest} is not a folder", "name another path")]
    if nearest != path:
        if os.access(nearest, os.W_OK | os.X_OK):
            return []
        return [
            Finding(
                f"The folder {path} does not exist, and this user cannot create it in {nearest}",
                f"create it for the user that runs the instances (install -d -m 700 {path}), or name another path",
            )
        ]
    if others := other_writers(path.stat()):
        return [
            Finding(
                f"The folder {path} {others}, who could plant embeddings in it",
                f"name a new folder inside it, or make it yours alone (chown, and chmod go-w {path})",
            )
        ]
    if writes:
        try:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(bytes(4096))
                file.flush()
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return [
                Finding(
                    f"A file cannot be written and locked in the folder {path} ({error.strerror})",
                    "make it writable for the user that runs the instances; mount a network file system with locks",
                )
            ]
    return []


def files_may_be_mapped(folder: Path, mount_table: Path = _MOUNT_TABLE) -> bool:
    """Whether a mapped file stays readable when any process on any host removes it.

    True for the local file systems of Linux, and on systems that have no mount table.
    """
    kind = file_system_of(folder, mount_table)
    return kind in _LOCAL_FILE_SYSTEMS or (not kind and not mount_table.exists())


def file_system_of(path: Path, mount_table: Path = _MOUNT_TABLE) -> str:
    """Return the type of the file system at ``path``, such as ``ext4``; "" if the system's mount table doesn't tell."""
    try:
        mounts = mount_table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    resolved = str(path.resolve())
    nearest, kind = "", ""
    for line in mounts:
        mount, _, source = line.partition(" - ")
        # Blanks in a mount point are written as octal escapes.
        mount_point = mount.split(" ")[4].encode("latin-1", "surrogateescape").decode("unicode_escape")
        is_inside = os.path.commonpath([resolved, mount_point]) == mount_point
        if is_inside and len(mount_point) >= len(nearest):  # a later mount hides an earlier one at the same point
            nearest, kind = mount_point, source.split(" ")[0]
    return kind


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or the nearest path above it that exists."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path
