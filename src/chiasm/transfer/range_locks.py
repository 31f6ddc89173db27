"""Locks by which a reader keeps a holder from reusing a range of its memory file, for as long as the reader lives.

They belong to the reader's open file (OFD locks, fcntl(2)), so the kernel releases them when the reader ends, however that
happens, and a connection that breaks changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct

from chiasm.transfer.memory import Range

_FLOCK = struct.Struct("@hhqqi0q")
"""``struct flock`` of 64-bit Linux: type, whence, start, length, process."""


def lock_range(descriptor: int, part: Range) -> None:
    """Hold a range of the file that was opened as ``descriptor``. Raises OSError if that isn't possible."""
    _call(descriptor, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, part)


def unlock_range(descriptor: int, part: Range) -> None:
    """Hold a range no more, how often it may have been locked. Raises OSError."""
    _call(descriptor, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, part)


def is_locked(descriptor: int, part: Range) -> bool:
    """Return whether somebody who has opened the file on their own holds a part of the range. Raises OSError."""
    return _call(descriptor, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, part) != fcntl.F_UNLCK


def _call(descriptor: int, command: int, kind: int, part: Range) -> int:
    """Return the type of lock that the kernel answers with."""
    asked = _FLOCK.pack(kind, os.SEEK_SET, part.offset, part.num_bytes, 0)
    answered: int = _FLOCK.unpack(fcntl.fcntl(descriptor, command, asked))[0]
    return answered
