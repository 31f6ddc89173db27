"""The folder through which instances of one machine exchange embeddings, made for one deployment and removed with it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from chiasm.errors import ConfigurationError

_logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
DEFAULT_MAX_BYTES = 4 << 30
LEAST_BYTES = 256 << 20
"""A tmpfs with less room than twice this is not worth it."""
_PREFIX = "chiasm-ec-"


class StorageFolder:
    """A new folder of mode 0700, in shared memory where there is room, else among temporary files.

    While its owner lives it holds a lock on the folder. The kernel lets go of the lock when the owner dies, however that
    happens, so that a folder without a lock is a dead owner's, and every new folder's maker removes those.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        """``max_bytes`` is the bound asked for; None takes 4 GiB, or less where there is less. Raises ConfigurationError."""
        for candidate in (SHARED_MEMORY, Path(tempfile.gettempdir())):
            remove_stale(candidate)
        parent = _roomy_parent(max_bytes)
        try:
            self.path, self._lock = _make_locked(parent)
        except OSError as error:
            raise ConfigurationError(f"cannot make a folder for embeddings in {parent}: {error}") from error
        self.max_bytes = max_bytes or min(DEFAULT_MAX_BYTES, max(LEAST_BYTES, _fair_share(self.path)))
        """What the embeddings in it may take together."""

    def remove(self) -> None:
        """Remove the folder and all in it; idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_stale(parent: Path) -> None:
    """Remove the folders in ``parent`` that this user's dead deployments left behind."""
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{_PREFIX}{os.getuid()}-*"):
            with _owner_gone(path) as gone:
                if gone:
                    shutil.rmtree(path, ignore_errors=True)
                    _logger.info("removed %s, which a deployment that is no more had left behind", path)


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


def _make_locked(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getuid()}-", dir=parent))  # mode 0700
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another deployment took the folder for a stale one before it had its lock
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _roomy_parent(max_bytes: int | None) -> Path:
    needed = max_bytes or 2 * LEAST_BYTES
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK | os.X_OK) and _free_bytes(SHARED_MEMORY) >= needed:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _fair_share(path: Path) -> int:
    """Half of the room; in memory, which instances need more urgently, no more than a quarter of what is free."""
    import psutil

    share = _free_bytes(path) // 2
    in_memory = path.is_relative_to(SHARED_MEMORY)
    return min(share, int(psutil.virtual_memory().available) // 4) if in_memory else share


def _free_bytes(path: Path) -> int:
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize
