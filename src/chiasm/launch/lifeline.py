"""Ends a process whose parent is gone."""

from __future__ import annotations

import os
import signal
import threading
import time

GRACE_SECONDS = 3.0
_STDIN = 0


def end_with_stdin(grace_seconds: float | None = None) -> None:
    """End this process when its standard input closes: by SIGTERM, and if that does not help in time, at once.

    Whoever started it holds the other end of the pipe, and the kernel closes that when the holder dies, also by SIGKILL.
    """
    grace = GRACE_SECONDS if grace_seconds is None else grace_seconds
    threading.Thread(target=_watch, args=(grace,), name="chiasm-lifeline", daemon=True).start()


def _watch(grace_seconds: float) -> None:
    try:
        while os.read(_STDIN, 4096):
            pass
    except OSError:  # it was never open
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os._exit(1)
