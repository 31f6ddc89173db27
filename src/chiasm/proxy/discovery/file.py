"""Instances from a file, which is read again when it was changed or replaced."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from chiasm.errors import ChiasmError, ConfigurationError, UnreadableError
from chiasm.http.listen import check_instance_url
from chiasm.http.watch import FileWatch
from chiasm.proxy.discovery.base import MAX_LISTED, Found, Source, Tell
from chiasm.wire import UNREADABLE_YAML, Role
from chiasm.yaml_text import read_yaml

_log = logging.getLogger(__name__)
_MAX_BYTES = 1 << 20


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    role: Role


class FileSource(Source):
    """``file:PATH``: a JSON or YAML list of ``url`` and ``role``.

    A file that can't be read or understood changes nothing; the log says what is wrong with it.
    """

    def __init__(self, argument: str, path: Path) -> None:
        super().__init__(argument)
        self._path = path
        self._watch = FileWatch([path])

    async def run(self, tell: Tell) -> None:
        await self.read(tell)
        async for _ in self._watch.changes():
            await self.read(tell)

    async def read(self, tell: Tell) -> None:
        """Tell what the file says now, unless something is wrong with it."""
        try:
            tell(await asyncio.to_thread(read_instances, self._path))
        except ChiasmError as error:
            if self._watch.note_fault(error):
                _log.warning("%s is not used: %s", self.name, error.message)
        else:
            self._watch.note_read()


def read_instances(path: Path) -> list[Found]:
    """Return the instances that a file lists. Raises ConfigurationError for one that can't be read or understood."""
    try:
        with path.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}.") from None
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"{path} is larger than {_MAX_BYTES >> 20} MiB.")
    try:
        entries = _decode(path, content)
    except UNREADABLE_YAML as error:
        raise ConfigurationError(
            f'{path} is not a list of instances, such as [{{"url": "http://10.0.0.5:8001", "role": "encoder"}}]: {error}.'
        ) from None
    if len(entries) > MAX_LISTED:
        raise ConfigurationError(f"{path} lists {len(entries)} instances, and {MAX_LISTED} are the limit.")
    found = [Found(check_instance_url(entry.url), entry.role) for entry in entries]
    if len({one.url for one in found}) != len(found):
        raise ConfigurationError(f"{path} lists a URL twice; each instance has one role.")
    return found


def _decode(path: Path, content: bytes) -> list[_Entry]:
    if path.suffix in (".yaml", ".yml"):
        entries: list[_Entry] = read_yaml(content, list[_Entry])
        return entries
    return msgspec.json.decode(content, type=list[_Entry])
