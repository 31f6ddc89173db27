"""Where a store is: the URL of ``--ec-store``, and what of it may be shown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from chiasm.errors import ConfigurationError

URL_VARIABLE = "CHIASM_EC_STORE"
USER_VARIABLE = "CHIASM_EC_STORE_USER"
PASSWORD_VARIABLE = "CHIASM_EC_STORE_PASSWORD"

_REDIS_PORT = 6379
_DAY_SECONDS = 86400
_FOLDER_GIB = 16
_FORMS = "write redis://host:6379/0, rediss://user:password@host:6379/0 or file:///folder"


@dataclass(frozen=True)
class StoreAddress:
    """A store's address. Neither ``str`` nor ``repr`` shows user and password."""

    scheme: str
    """``redis``, ``rediss`` (with TLS) or ``file``."""
    host: str = ""
    port: int = 0
    database: int = 0
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    ttl_seconds: int = _DAY_SECONDS
    """How long a server keeps an entry after it was written, unless it evicts it earlier; 0: without end."""
    folder: Path = Path()
    max_bytes: int = 0
    """What a folder holds; a server has a limit of its own."""

    @property
    def has_tls(self) -> bool:
        return self.scheme == "rediss"

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{self.folder}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}/{self.database}"

    @classmethod
    def parse(cls, url: str, environment: Mapping[str, str] = os.environ) -> StoreAddress:
        """Read a URL. User and password that it lacks come from the environment. Raises ConfigurationError.

        No message shows the URL, since it may hold a password.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
            given = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:
            raise _wrong(f"it is no URL; {_FORMS}") from None
        if parts.fragment:
            raise _wrong("a URL of a store has no fragment (#); write # in a password as %23")
        if parts.scheme == "file":
            if parts.netloc or not parts.path.startswith("/"):
                raise _wrong("a folder is named by its whole path, with three slashes: file:///folder")
            size = _number("max_gib", given.pop("max_gib", str(_FOLDER_GIB)), low=1)
            _refuse(given, "max_gib")
            return cls("file", folder=Path(unquote(parts.path)), max_bytes=size << 30)
        if parts.scheme not in ("redis", "rediss"):
            raise _wrong(f"its scheme is none of redis, rediss and file; {_FORMS}")
        if not parts.hostname:
            raise _wrong(f"it names no host; {_FORMS}")
        ttl = _number("ttl_seconds", given.pop("ttl_seconds", str(_DAY_SECONDS)))
        _refuse(given, "ttl_seconds")
        return cls(
            parts.scheme,
            host=parts.hostname,
            port=port or _REDIS_PORT,
            database=_number("the database", parts.path.strip("/") or "0"),
            user=unquote(parts.username or "") or environment.get(USER_VARIABLE, ""),
            password=unquote(parts.password or "") or environment.get(PASSWORD_VARIABLE, ""),
            ttl_seconds=ttl,
        )


def _number(name: str, text: str, low: int = 0) -> int:
    if text.isascii() and text.isdigit() and low <= int(text[:12]) < 1 << 31:
        return int(text[:12])
    raise _wrong(f"{name} must be an integer of at least {low}")


def _refuse(given: Mapping[str, str], known: str) -> None:
    if given:
        raise _wrong(f"the only setting behind its ? is {known}")


def _wrong(why: str) -> ConfigurationError:
    return ConfigurationError(f"The URL of --ec-store can't be used: {why}.")
