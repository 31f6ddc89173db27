"""Folders that disappear with their owner, however that ends: for embeddings, and for the files of a start."""

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

from chiasm.errors import ConfigurationError
from chiasm.memory import free_memory

SHARED_MEMORY = Path("/dev/shm")
DEFAULT_MAX_BYTES = 4 << 30
LEAST_BYTES = 256 << 20
"""A tmpfs with less room than twice this is not used."""
STORAGE_PREFIX = "chiasm-ec-"
_SMALL_BYTES, _SMALL_FILES = 1 << 20, 100
"""Room for the small files of a start."""
_logger = logging.getLogger(__name__)


def in_memory() -> Path | None:
    """Return where small files are kept in memory; None if this machine has no such place, or no room there."""
    return SHARED_MEMORY if _has_room(SHARED_MEMORY, _SMALL_BYTES) else None


def temporary_folder() -> Path:
    """Return the folder for temporary files. Raises ConfigurationError if there is none that can be written."""
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise ConfigurationError(
            f"Temporary files can't be written: {error.strerror}. Free some room, or name another folder for them with TMPDIR."
        ) from error


class LockedFolder:
    """A new folder of mode 0700.

    Its owner holds a lock on it. The kernel releases the lock when the owner dies, however that happens, so a folder without a
    lock belonged to a dead process, and the process that makes the next one removes it.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        """Make a folder whose name begins with ``prefix``, by default among temporary files. Raises ConfigurationError."""
        parent = parent or temporary_folder()
        remove_stale(parent, prefix)
        try:
            self.path, self._lock = _make_locked(parent, prefix)
        except OSError as error:
            raise ConfigurationError(
                f"Cannot make a folder in {parent}: {error.strerror}. Make room there, or name another folder for temporary "
                "files with TMPDIR."
            ) from error

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


class StorageFolder(LockedFolder):
    """A folder for the embeddings of one deployment: in shared memory if there is room, else among temporary files."""

    def __init__(self, max_bytes: int | None = None) -> None:
        """``max_bytes`` bounds the embeddings; None: 4 GiB, or less where there is less room. Raises ConfigurationError."""
        for candidate in (SHARED_MEMORY, temporary_folder()):
            remove_stale(candidate, STORAGE_PREFIX)
        super().__init__(STORAGE_PREFIX, _roomy_parent(max_bytes))
        self.max_bytes = max_bytes or min(DEFAULT_MAX_BYTES, max(LEAST_BYTES, _fair_share(self.path)))
        """Maximum total size of the embeddings in it."""


def memory_for_embeddings(num_encoders: int) -> int:
    """Return how much memory each encoder of this machine takes for embeddings: together a quarter of what is free."""
    share = free_memory() // 4 // max(1, num_encoders)
    return min(DEFAULT_MAX_BYTES, max(LEAST_BYTES, share))


def remove_stale(parent: Path, prefix: str) -> None:
    """Remove the folders in ``parent`` with this prefix that this user's dead processes left behind."""
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{prefix}{os.getuid()}-*"):
            with _owner_gone(path) as gone:
                if gone:
                    shutil.rmtree(path, ignore_errors=True)
                    _logger.info("Removed %s, left behind by a dead process.", path)


@contextlib.contextmanager
def _owner_gone(path: Path) -> Iterator[bool]:
    """Yield whether the folder is ours and its lock is free; the lock is held in the body."""
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
    """Return a new folder and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getuid()}-", dir=parent))  # mode 0700
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process took it for a stale one before it had its lock
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _roomy_parent(max_bytes: int | None) -> Path:
    needed = max_bytes or 2 * LEAST_BYTES
    return SHARED_MEMORY if _has_room(SHARED_MEMORY, needed) else temporary_folder()


def _has_room(folder: Path, num_bytes: int) -> bool:
    """Return whether this user can write so much there."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return False
    space = os.statvfs(folder)
    has_inodes = not space.f_files or space.f_favail >= _SMALL_FILES  # 0: their number isn't limited
    return has_inodes and space.f_bavail * space.f_frsize >= num_bytes


def _fair_share(path: Path) -> int:
    """Return half of the room; in memory, which instances need more urgently, at most a quarter of what is free."""
    share = _free_bytes(path) // 2
    in_memory = path.is_relative_to(SHARED_MEMORY)
    return min(share, free_memory() // 4) if in_memory else share


def _free_bytes(path: Path) -> int:
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize
