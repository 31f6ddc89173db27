"""Notices that files were replaced while a server runs: keys and certificates."""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from chiasm.errors import ConfigurationError, UnreadableError

INTERVAL_SECONDS = 1.0
_logger = logging.getLogger(__name__)
_ReadT = TypeVar("_ReadT")


class FileWatch:
    """Looks once a second whether one of some files is another one than before, however it was replaced, or who may use it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen = self._look()
        self._fault: str | None = None

    async def changes(self) -> AsyncIterator[None]:
        """Yield after each change; never ends. What is at a path may be missing or incomplete then."""
        while self._paths:
            await asyncio.sleep(INTERVAL_SECONDS)
            found = await asyncio.to_thread(self._look)  # a network's file system may take its time
            if found != self._seen:
                self._seen = found
                yield

    def note_read(self) -> None:
        """Take that what is there now is fit."""
        self._fault = None

    def note_fault(self, error: Exception) -> bool:
        """Take what is wrong with what is there now; return whether that is news.

        What couldn't be read, for a reason that may pass, counts as changed a second later.
        """
        if isinstance(error, (UnreadableError, OSError)):
            self._seen = []
        is_news = str(error) != self._fault
        self._fault = str(error)
        return is_news

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in self._paths]


class Replaceable(ABC, Generic[_ReadT]):
    """What a server reads from files at its start, and again when they were replaced. What isn't fit then changes nothing."""

    kept: ClassVar[str]
    """What the log says, before the reason, if nothing changes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._watch = FileWatch(paths)

    async def follow(self) -> None:
        """Read the files again whenever they were replaced, until cancelled."""
        async for _ in self._watch.changes():
            await self.read_again()

    async def read_again(self) -> None:
        """Take what is in the files now, unless it is missing or isn't fit."""
        try:
            done = self._take(await asyncio.to_thread(self._read))
        except (ConfigurationError, OSError) as error:
            if self._watch.note_fault(error):
                _logger.warning("%s: %s", self.kept, error)
        else:
            self._watch.note_read()
            _logger.info("%s", done)

    @abstractmethod
    def _read(self) -> _ReadT:
        """Return what is in the files, on any thread. Raises ConfigurationError if it isn't fit."""

    @abstractmethod
    def _take(self, read: _ReadT) -> str:
        """Use what was read from now on, and return what the log says. Raises as ``_read`` does, or OSError."""


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what differs between a file and the one that replaces it; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    users = found.st_mode, found.st_uid, found.st_gid  # what was refused because others may write it may be fit now
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, *users
