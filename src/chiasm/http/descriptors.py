"""File descriptors: how many this process may have."""

from __future__ import annotations

import contextlib
import resource

_MAX = 1 << 16
"""More are never needed, and some libraries go through all that are allowed."""
_OF_THE_PROCESS = 64
"""Files, pipes and listening sockets of a process that nobody is connected to."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one, at most to 65536; return the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX if hard == resource.RLIM_INFINITY else min(hard, _MAX)
    if soft == resource.RLIM_INFINITY:
        return _MAX
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return min(_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def room_for_connections(descriptors: int) -> int:
    """Return how many clients may be connected with this many descriptors, if each causes one connection to somewhere else."""
    return max(1, (descriptors - _OF_THE_PROCESS) // 2)
