"""A folder of entries whose total size stays within a limit, however many processes write to it.

There are three other kinds of files in it. ``.usage`` is the lock of all writers, and its content is the number of bytes that
entries and unfinished files take together. ``*.tmp`` are unfinished files; a writer locks its file as long as it lives, so one
that can be locked was left behind by a dead writer. ``store-id`` names the folder. Readers take no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chiasm.ec_transfer.base import check_identifier
from chiasm.errors import Code, StorageError

_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
_STORE_ID = re.compile(r"[0-9a-f]{32}")
_STORE_ID_FILE = "store-id"
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_USAGE_DIGITS = 20


class Signature(NamedTuple):
    """Tells a file from any other that has taken its place, and from itself after a change."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass
class _Usage:
    """How much the folder holds. Only the holder of the lock may use it."""

    used_bytes: int
    """Size of entries and unfinished files."""


class _Candidate(NamedTuple):
    """An entry as the last scan found it. They sort by the time of last use."""

    accessed_ns: int
    name: str


class BoundedFolder:
    """Publishes files in a folder, and removes the least recently used ones so that all together take at most ``max_bytes``.

    Safe for any number of threads and processes, and of hosts if the file system's ``flock`` works between them. ``on_evict``
    is called with the size in bytes of each evicted entry.
    """

    def __init__(self, path: Path, max_bytes: int, on_evict: Callable[[int], None]) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._on_evict = on_evict
        self._usage_path = f"{path}/.usage"
        self._oldest: deque[_Candidate] = deque()  # changed only under the lock

    def entry_path(self, identifier: str) -> str:
        """Return the path of an entry, which need not exist. Raises InvalidRequestError for a malformed identifier."""
        return f"{self.path}/{check_identifier(identifier)}.safetensors"

    def recount(self) -> None:
        """Count the bytes in the folder again, remove what dead writers left behind, and evict down to the limit.

        Raises OSError if the folder is not writable or its file system has no locks.
        """
        with self._locked() as usage:
            self._scan(usage)
            self._evict(usage, self.max_bytes)

    def store_id(self) -> str:
        """Return the 32 random hex digits that name the folder; processes that read the same name share the folder.

        Draws the name if the folder has none. Raises OSError if the folder cannot be read, or has no name and cannot be
        written.
        """
        try:
            return self._store_id()
        except FileNotFoundError:
            return self._store_id()  # The folder was removed in the meantime, and is there again.

    def _store_id(self) -> str:
        stored = read_store_id(self.path)
        if stored is None:
            with self._locked() as usage:
                stored = read_store_id(self.path) or self._draw_store_id(usage)
        return stored

    def _draw_store_id(self, usage: _Usage) -> str:
        try:
            return _write_store_id(self.path)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            self._evict_more(usage, 1)
            return _write_store_id(self.path)

    def is_roomy(self) -> bool:
        """Return whether the disk has room for at least half of ``max_bytes`` more. Raises OSError."""
        space = os.statvfs(self.path)
        return 2 * space.f_bavail * space.f_frsize >= self.max_bytes

    def publish(self, identifier: str, size_bytes: int, write: Callable[[int], None]) -> None:
        """Add an entry of ``size_bytes``, which appears once it is complete. ``write`` fills a file, given its descriptor.

        Room is made before anything is written. If the disk is full nevertheless, as many bytes again are evicted and
        ``write`` is called a second time; likewise if the folder is removed meanwhile. Raises StorageError, and leaves nothing
        behind, if the entry is larger than ``max_bytes`` or cannot be written.
        """
        path = self.entry_path(identifier)
        if size_bytes > self.max_bytes:
            raise StorageError(
                f"An entry of {size_bytes} bytes is larger than all that {self.path} may hold; raise max_bytes "
                f"(now {self.max_bytes})."
            )
        try:
            try:
                self._publish(path, size_bytes, write)
            except FileNotFoundError:
                self._publish(path, size_bytes, write)  # The folder was removed in the meantime, and is there again.
        except OSError as error:
            is_full = error.errno in _NO_SPACE
            raise StorageError(
                f"Cannot write an entry of {size_bytes} bytes to {self.path}: {error.strerror or error}."
                + (" Free space on its disk, or lower --ec-max-bytes." if is_full else ""),
                code=Code.DISK_FULL if is_full else None,
            ) from error

    def remove(self, identifier: str, signature: Signature) -> bool:
        """Remove the file at an entry's path, if it still is the file with ``signature``, without waiting for the lock.

        Returns False if somebody else holds the lock, so that nothing was done. A folder at the path, and a file that this
        user may not remove, stay there.
        """
        path = self.entry_path(identifier)
        try:
            with self._locked(wait=False) as usage:
                status = os.lstat(path)
                if Signature.of(status) == signature:
                    os.unlink(path)
                    usage.used_bytes -= status.st_size if stat.S_ISREG(status.st_mode) else 0
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    # ---- the steps of publishing a file ---------------------------------------------------------------------------

    def _publish(self, path: str, size_bytes: int, write: Callable[[int], None]) -> None:
        unfinished = f"{path.removesuffix('.safetensors')}.{secrets.token_hex(8)}.tmp"
        try:
            descriptor = self._reserve(unfinished, size_bytes)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            self._make_more_room(size_bytes)
            descriptor = self._reserve(unfinished, size_bytes)
        try:
            self._fill(descriptor, size_bytes, write)
            self._finish(descriptor, unfinished, path)
        except BaseException:
            self._give_back(unfinished, size_bytes)
            raise
        finally:
            os.close(descriptor)

    def _reserve(self, unfinished: str, size_bytes: int) -> int:
        """Make room, and create the unfinished file with its full size, so that every scan counts it."""
        with self._locked() as usage:
            self._evict(usage, self.max_bytes - size_bytes)
            descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.ftruncate(descriptor, size_bytes)
            except BaseException:
                os.close(descriptor)
                os.unlink(unfinished)
                raise
            usage.used_bytes += size_bytes
            return descriptor

    def _fill(self, descriptor: int, size_bytes: int, write: Callable[[int], None]) -> None:
        try:
            write(descriptor)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            self._make_more_room(size_bytes)
            write(descriptor)

    def _make_more_room(self, size_bytes: int) -> None:
        with self._locked() as usage:
            self._evict_more(usage, size_bytes)

    def _finish(self, descriptor: int, unfinished: str, path: str) -> None:
        now = time.time_ns()
        os.utime(descriptor, ns=(now, now))
        with self._locked() as usage:
            replaced_bytes = _size_of(path)
            os.rename(unfinished, path)
            usage.used_bytes -= replaced_bytes
            self._evict(usage, self.max_bytes, keep=os.path.basename(path))

    def _give_back(self, unfinished: str, size_bytes: int) -> None:
        with contextlib.suppress(OSError), self._locked() as usage:
            os.unlink(unfinished)
            usage.used_bytes -= size_bytes

    # ---- under the lock -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, *, wait: bool = True) -> Iterator[_Usage]:
        """Hold the lock against all other writers, and create the folder again if it was removed.

        Without ``wait``, raises BlockingIOError if somebody else holds the lock.
        """
        descriptor = self._lock(fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            usage = _Usage(0)
            text = os.pread(descriptor, _USAGE_DIGITS, 0)
            if text.isdigit():
                usage.used_bytes = int(text)
            else:
                self._scan(usage)
            try:
                yield usage
            finally:
                os.pwrite(descriptor, b"%0*d" % (_USAGE_DIGITS, max(usage.used_bytes, 0)), 0)
        finally:
            os.close(descriptor)

    def _lock(self, operation: int) -> int:
        """Open and lock ``.usage``; return its descriptor."""
        while True:
            try:
                descriptor = os.open(self._usage_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                continue
            try:
                fcntl.flock(descriptor, operation)
                if os.path.samestat(os.fstat(descriptor), os.stat(self._usage_path)):
                    return descriptor
            except FileNotFoundError:
                pass  # The folder was removed in the meantime.
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _scan(self, usage: _Usage) -> None:
        """Count all bytes, remove what dead writers left behind, and sort the entries by their last use."""
        usage.used_bytes = 0
        candidates = []
        with os.scandir(self.path) as files:
            for file in files:
                is_entry = _ENTRY.fullmatch(file.name) is not None
                if not is_entry and (not _UNFINISHED.fullmatch(file.name) or _remove_if_abandoned(file.path)):
                    continue
                try:
                    status = file.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    usage.used_bytes += status.st_size
                    if is_entry:
                        candidates.append(_Candidate(status.st_atime_ns, file.name))
        self._oldest = deque(sorted(candidates))

    def _evict_more(self, usage: _Usage, size_bytes: int) -> None:
        """Evict as many bytes, since the disk is full below the limit."""
        self._scan(usage)
        self._evict(usage, usage.used_bytes - size_bytes)

    def _evict(self, usage: _Usage, target_bytes: int, keep: str = "") -> None:
        """Remove the least recently used entries, except ``keep``, until at most ``target_bytes`` are used.

        The order is that of the last scan. Entries that were added or used since are younger than all others of it, so the
        folder is scanned again only when no others are left.
        """
        scanned = False
        while usage.used_bytes > target_bytes:
            if not self._oldest:
                if scanned:
                    return  # Nothing is left but unfinished files and the one to keep.
                self._scan(usage)
                scanned = True
                continue
            candidate = self._oldest.popleft()
            path = f"{self.path}/{candidate.name}"
            try:
                status = os.lstat(path)
                if candidate.name == keep or status.st_atime_ns > candidate.accessed_ns:
                    continue
                os.unlink(path)
            except FileNotFoundError:
                continue
            usage.used_bytes -= status.st_size
            self._on_evict(status.st_size)


def write_whole(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of the data to a file. Raises OSError."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def read_store_id(folder: Path) -> str | None:
    """Return the name of a folder, or None if it has none. Creates nothing. Raises OSError if it cannot be read."""
    try:
        text = (folder / _STORE_ID_FILE).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    return text if _STORE_ID.fullmatch(text) else None


def _write_store_id(folder: Path) -> str:
    drawn = secrets.token_hex(16)
    unfinished = folder / f"{_STORE_ID_FILE}.tmp"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(drawn)
    os.rename(unfinished, folder / _STORE_ID_FILE)
    return drawn


def _size_of(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0


def _remove_if_abandoned(path: str) -> bool:
    """Remove an unfinished file unless its writer is alive and holds its lock; return whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
