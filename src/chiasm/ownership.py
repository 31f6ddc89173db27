"""Whether a file or a folder that processes share is this user's alone to write."""

from __future__ import annotations

import os
import stat

_ROOT = 0


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
