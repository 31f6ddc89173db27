"""Files that can't be read for a while, as when a share is away or there are too many open files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

REASON = os.strerror(errno.ESTALE)


def make_unreadable(monkeypatch: pytest.MonkeyPatch, path: Path, times: int) -> None:
    """Have a file refuse to be opened so many times from now on."""
    left = iter(range(times))
    really_open = Path.open

    def opened(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path and next(left, None) is not None:
            raise OSError(errno.ESTALE, REASON)
        return really_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
