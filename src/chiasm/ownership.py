"""Whether a file or a folder is this user's to look up, or this user's alone to write, or to read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_ROOT = 0


def within_reach(path: Path) -> Path:
    """Return a path, which need not exist. Raises PermissionError if this user may not see whether it does.

    From Python 3.14 on, ``Path.exists`` and the like answer False then.
    """
    try:
        path.stat()
    except PermissionError:
        raise
    except (OSError, ValueError):
        pass
    return path


def other_writers(status: os.stat_result) -> str:
    """Return who else may write there, as what follows "it"; empty if nobody but this user and root may.

    POSIX access lists show up as permissions of the group.
    """
    if status.st_uid not in (os.geteuid(), _ROOT):
        return f"belongs to another user ({status.st_uid})"
    if status.st_mode & stat.S_IWOTH:
        return "is writable by every user"
    if status.st_mode & stat.S_IWGRP:
        return f"is writable by a group ({status.st_gid})"
    return ""


def other_readers(status: os.stat_result) -> str:
    """Return who else may read a file that this user or root owns, as what follows "it"; empty if nobody may.

    A file of root may be readable by a group, for a user who isn't root: so a service gets a secret.
    """
    if status.st_mode & stat.S_IROTH:
        return "is readable by every user"
    if status.st_mode & stat.S_IRGRP and not (status.st_uid == _ROOT and os.geteuid() != _ROOT):
        return f"is readable by a group ({status.st_gid})"
    return ""
