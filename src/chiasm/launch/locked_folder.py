"""Folders that are gone with their owner, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_logger = logging.getLogger(__name__)


class LockedFolder:
    """A new folder of mode 0700.

    While its owner lives it holds a lock on the folder. The kernel lets go of the lock when the owner dies, however that
    happens, so that a folder without a lock is a dead owner's, and every new folder's maker removes those.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        """``prefix`` begins the name. Raises OSError where the folder cannot be made."""
        remove_stale(parent, prefix)
        self.path, self._lock = _make_locked(parent, prefix)

    @classmethod
    def temporary(cls, prefix: str) -> LockedFolder:
        """Among temporary files."""
        return cls(Path(tempfile.gettempdir()), prefix)

    def remove(self) -> None:
        """Remove the folder and all in it; idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> LockedFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def remove_stale(parent: Path, prefix: str) -> None:
    """Remove the folders in ``parent`` with this prefix that this user's dead processes left behind."""
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{prefix}{os.getuid()}-*"):
            with _owner_gone(path) as gone:
                if gone:
                    shutil.rmtree(path, ignore_errors=True)
                    _logger.info("removed %s, which a process that is no more had left behind", path)


@contextlib.contextmanager
def _owner_gone(path: Path) -> Iterator[bool]:
    """Whether the folder is ours and its lock is free; in the body the lock is held."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.fstat(lock).st_uid == os.getuid()
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getuid()}-", dir=parent))  # mode 0700
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another owner took the folder for a stale one before it had its lock
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)
