"""A folder of entries that never takes more than a bound, however many processes write into it.

Beside the entries lie three kinds of file. ``.usage`` is the lock of all writers and holds how many bytes entries and
unfinished files take together. ``*.tmp`` are the unfinished files; each is locked by its writer as long as that lives, so
one that can be locked was left by a dead one. ``store-id`` names the folder. Readers take no lock.
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

from chiasm.ec_transfer.entry_file import Signature
from chiasm.ec_transfer.identifiers import check_identifier
from chiasm.errors import StorageError

_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
_STORE_ID = re.compile(r"[0-9a-f]{32}")
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_USAGE_DIGITS = 20


@dataclass
class _Usage:
    """What the folder holds, in the hands of whoever holds the lock: entries and unfinished files."""

    used_bytes: int


class _Candidate(NamedTuple):
    """An entry as the last scan found it; the first to go is the one not used for longest."""

    accessed_ns: int
    name: str


class BoundedFolder:
    """Publishes files into a folder and removes the least recently used ones, so that all stay within ``max_bytes``.

    Safe for any number of threads, processes and hosts, as far as the file system's ``flock`` is. ``on_evict`` is called
    with the size in bytes of each entry that makes room.
    """

    def __init__(self, path: Path, max_bytes: int, on_evict: Callable[[int], None]) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._on_evict = on_evict
        self._usage_path = f"{path}/.usage"
        self._oldest: deque[_Candidate] = deque()  # changed only under the lock

    def entry_path(self, identifier: str) -> str:
        """Where the entry is or would be. Raises InvalidRequestError for what is no identifier."""
        return f"{self.path}/{check_identifier(identifier)}.safetensors"

    def recount(self) -> None:
        """Find out what the folder holds, remove what dead writers left, and make the folder fit its bound.

        Raises OSError when the folder cannot be written or its file system cannot lock.
        """
        with self._locked() as usage:
            self._scan(usage)
            self._evict(usage, self.max_bytes)

    def store_id(self) -> str:
        """32 hex digits, drawn when the folder was made: whoever reads the same ones sees the same folder.

        Raises OSError when the folder can be neither read nor written.
        """
        path = self.path / "store-id"
        stored = _read_store_id(path)
        if stored is None:
            with self._locked():
                stored = _read_store_id(path) or _write_store_id(path)
        return stored

    def publish(self, identifier: str, size_bytes: int, write: Callable[[int], None]) -> None:
        """Make an entry of ``size_bytes`` appear, whole; ``write`` fills the open file that it is given.

        Room is made before anything is written. When the disk is full all the same, as much again is evicted and
        ``write`` is called once more. Raises StorageError, and leaves nothing behind, when the entry is larger than the
        bound or does not fit on the disk.
        """
        path = self.entry_path(identifier)
        if size_bytes > self.max_bytes:
            raise StorageError(
                f"an entry of {size_bytes} bytes is larger than all that {self.path} may hold; "
                f"raise max_bytes (now {self.max_bytes})"
            )
        unfinished = f"{path.removesuffix('.safetensors')}.{secrets.token_hex(8)}.tmp"
        try:
            descriptor = self._reserve(unfinished, size_bytes)
            try:
                self._fill(descriptor, size_bytes, write)
                self._finish(descriptor, unfinished, path)
            except BaseException:
                self._give_back(unfinished, size_bytes)
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(f"cannot write an entry of {size_bytes} bytes to {self.path}: {error}") from error

    def remove(self, identifier: str, signature: Signature) -> None:
        """Remove the file at the entry's place if it is still the one of ``signature``; a folder is left there."""
        path = self.entry_path(identifier)
        with contextlib.suppress(OSError), self._locked() as usage:
            status = os.lstat(path)
            if Signature.of(status) == signature:
                os.unlink(path)
                usage.used_bytes -= status.st_size if stat.S_ISREG(status.st_mode) else 0

    # ---- the way of one file --------------------------------------------------------------------------------------

    def _reserve(self, unfinished: str, size_bytes: int) -> int:
        """Create the unfinished file at its full size, so that any scan counts it, and make room for it."""
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
            with self._locked() as usage:
                self._scan(usage)
                self._evict(usage, usage.used_bytes - size_bytes)
            write(descriptor)

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
    def _locked(self) -> Iterator[_Usage]:
        """Hold the folder against all other writers. A folder that was removed is made anew, empty."""
        descriptor = self._lock()
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

    def _lock(self) -> int:
        while True:
            try:
                descriptor = os.open(self._usage_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(descriptor), os.stat(self._usage_path)):
                    return descriptor
            except FileNotFoundError:
                pass  # The folder was removed while the lock was waited for.
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _scan(self, usage: _Usage) -> None:
        """Count everything anew, remove what dead writers left, and line up the entries in the order of their use."""
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

    def _evict(self, usage: _Usage, target_bytes: int, keep: str = "") -> None:
        """Remove the least recently used entries but ``keep`` until no more than ``target_bytes`` are used.

        The order comes from the last scan, which serves until all that it found have gone or been used since; what came
        after it is younger than all of that. Then the folder is scanned again.
        """
        scanned = False
        while usage.used_bytes > target_bytes:
            if not self._oldest:
                if scanned:
                    return  # All that is left is being written or is to be kept.
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


def _read_store_id(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    return text if _STORE_ID.fullmatch(text) else None


def _write_store_id(path: Path) -> str:
    drawn = secrets.token_hex(16)
    unfinished = path.with_suffix(".tmp")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(drawn)
    os.rename(unfinished, path)
    return drawn


def _size_of(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0


def _remove_if_abandoned(path: str) -> bool:
    """Remove an unfinished file unless its writer lives and holds its lock."""
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
