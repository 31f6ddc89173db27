"""The file of ``--api-key-file``: keys one a line, or in YAML with what each of them may do.

::

    keys:
      - key: 5f0c2f6b9a8c4e1d
        name: team-a                   # in logs and metrics; keys with one name count together
        tenant: acme                   # tenants share nothing that is cached
        max_requests_in_flight: 8
        max_requests_per_minute: 600
      - key: 0d9e8c7b6a5f4e3d
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from chiasm.errors import ConfigurationError
from chiasm.http.key_rules import check_key, read_private_text
from chiasm.wire import UNREADABLE_YAML
from chiasm.yaml_text import read_yaml

MAX_KEYS = 10_000
MAX_REQUESTS_PER_MINUTE = 100_000
_OPTION = "--api-key-file"
_YAML = re.compile(r"^keys:", re.MULTILINE)
"""What no file with one key a line has, since a key has at least 16 characters."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
_Name = Annotated[str, msgspec.Meta(pattern=_NAME)]


@dataclass(frozen=True)
class ApiKey:
    """One key, and what its holder may do."""

    key: str = field(repr=False)
    name: str = ""
    """Empty: it has none."""
    tenant: str = ""
    """Empty: its holder belongs to no tenant."""
    max_requests_in_flight: int | None = None
    max_requests_per_minute: int | None = None


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    name: _Name | None = None
    tenant: _Name | None = None
    max_requests_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_requests_per_minute: Annotated[int, msgspec.Meta(ge=1, le=MAX_REQUESTS_PER_MINUTE)] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Entry]


def read_api_keys(path: Path) -> list[ApiKey]:
    """Return the keys in a file, at least one. Raises ConfigurationError if it or one of them isn't fit."""
    text = read_private_text(_OPTION, path)
    keys = _of_yaml(path, text) if _YAML.search(text) else [ApiKey(line) for line in map(str.strip, text.splitlines())]
    found = [one for one in keys if one.key]
    if not found:
        raise ConfigurationError(f"{_OPTION}: {path} holds no key; write one a line.")
    if len(found) > MAX_KEYS:
        raise ConfigurationError(f"{_OPTION}: {path} holds more than {MAX_KEYS} keys.")
    for one in found:
        check_key(_OPTION, one.key)
    _check_names(path, found)
    return found


def _of_yaml(path: Path, text: str) -> list[ApiKey]:
    try:
        entries: list[_Entry] = read_yaml(text, _File).keys
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{_OPTION}: {path}: {error}.") from None
    except UNREADABLE_YAML as error:  # it may quote a key
        place = re.search(r"line \d+, column \d+", str(error))
        where = f", at {place[0]}" if place else ""
        raise ConfigurationError(f"{_OPTION}: {path} is not valid YAML{where}.") from None
    return [
        ApiKey(
            one.key,
            one.name or "",
            one.tenant or "",
            one.max_requests_in_flight,
            one.max_requests_per_minute,
        )
        for one in entries
    ]


def _check_names(path: Path, keys: Sequence[ApiKey]) -> None:
    """Raise ConfigurationError for a key that is there twice, and for keys with one name that may do different things."""
    by_key: set[str] = set()
    by_name: dict[str, ApiKey] = {}
    for one in keys:
        if one.key in by_key:
            raise ConfigurationError(f"{_OPTION}: {path} holds a key twice{f', of {one.name}' if one.name else ''}.")
        by_key.add(one.key)
        other = by_name.setdefault(one.name, one) if one.name else one
        if _rights(other) != _rights(one):
            raise ConfigurationError(
                f"{_OPTION}: {path}: the keys named {one.name} have different tenants or limits; keys of one name count "
                "together, so give them the same."
            )


def _rights(one: ApiKey) -> tuple[str, int | None, int | None]:
    return one.tenant, one.max_requests_in_flight, one.max_requests_per_minute
