"""Root without its privileges: what tests of files that may not be read or written need where root runs them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import pytest

_DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER = 1, 2, 3
"""Capabilities to read, write and search what the mode of a file or folder forbids, and to change it."""
_VERSION_3 = 0x20080522
_GET_SECUREBITS, _SET_SECUREBITS = 27, 28
_NO_ROOT, _NO_FIXUP = 1, 4
"""A command that root starts gets no capabilities, and ``access(2)`` goes by those that count now."""
_Sets = ctypes.c_uint32 * 6
"""Effective, permitted and inheritable capabilities from 0 to 31, then the same from 32 on."""


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """A block in which modes of files and folders count for this thread and for commands that it starts, also for root.

    Skips the test where that can't be had.
    """
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("Only Linux can take single privileges from root.")
    libc = ctypes.CDLL(None, use_errno=True)
    before = _Sets()
    _check(libc.capget(_header(), before))
    bits = libc.prctl(_GET_SECUREBITS, 0, 0, 0, 0)
    without = _Sets(*before)
    without[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH | 1 << _FOWNER)
    if libc.prctl(_SET_SECUREBITS, bits | _NO_ROOT | _NO_FIXUP, 0, 0, 0):
        pytest.skip("This root may not give up its privileges: it lacks the capability CAP_SETPCAP.")
    try:
        _check(libc.capset(_header(), without))
        yield
    finally:
        _check(libc.capset(_header(), before))
        _check(libc.prctl(_SET_SECUREBITS, bits, 0, 0, 0))


def _header() -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 2)(_VERSION_3, 0)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
