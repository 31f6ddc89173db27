"""The folder through which instances of one machine exchange embeddings, made for one deployment and removed with it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from chiasm.errors import ConfigurationError
from chiasm.launch.locked_folder import LockedFolder, remove_stale

SHARED_MEMORY = Path("/dev/shm")
DEFAULT_MAX_BYTES = 4 << 30
LEAST_BYTES = 256 << 20
"""A tmpfs with less room than twice this is not worth it."""
PREFIX = "chiasm-ec-"


class StorageFolder:
    """A new folder that is gone with its owner, in shared memory where there is room, else among temporary files."""

    def __init__(self, max_bytes: int | None = None) -> None:
        """``max_bytes`` is the bound asked for; None takes 4 GiB, or less where there is less. Raises ConfigurationError."""
        for candidate in (SHARED_MEMORY, Path(tempfile.gettempdir())):
            remove_stale(candidate, PREFIX)
        parent = _roomy_parent(max_bytes)
        try:
            self._folder = LockedFolder(parent, PREFIX)
        except OSError as error:
            raise ConfigurationError(f"cannot make a folder for embeddings in {parent}: {error}") from error
        self.path = self._folder.path
        self.max_bytes = max_bytes or min(DEFAULT_MAX_BYTES, max(LEAST_BYTES, _fair_share(self.path)))
        """What the embeddings in it may take together."""

    def remove(self) -> None:
        """Remove the folder and all in it; idempotent."""
        self._folder.remove()


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
