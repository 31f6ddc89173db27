"""What a key that opens a server must be like, and files that hold keys."""

from __future__ import annotations

from pathlib import Path

from chiasm.errors import ConfigurationError, UnreadableError
from chiasm.ownership import other_writers

LEAST_KEY_CHARACTERS = 16
"""A shorter one could be guessed by somebody who may try a few thousand times a second."""
MAX_FILE_BYTES = 4 << 20


def check_key(where: str, key: str) -> None:
    """Raise ConfigurationError unless a key is long enough, and one that every client can send in a header.

    ``where`` is the option or the file that it comes from. The message doesn't repeat the key.
    """
    if len(key) < LEAST_KEY_CHARACTERS:
        fault = f"a key must have at least {LEAST_KEY_CHARACTERS} characters, and this one has {len(key)}"
    elif not (key.isascii() and key.isprintable()) or " " in key:
        fault = "a key must be of letters, digits and signs of ASCII, without blanks"
    else:
        return
    raise ConfigurationError(f"{where}: {fault}; `openssl rand -hex 16` makes a good one.")


def read_admin_keys(key: str | None, file: Path | None) -> list[str]:
    """Return the keys of an operator who gives one, or a file of them. Raises ConfigurationError for one that isn't fit."""
    keys = [] if key is None else [key]
    for one in keys:
        check_key("--admin-key or CHIASM_ADMIN_KEY", one)
    return keys if file is None else [*keys, *_keys_in(file)]


def _keys_in(path: Path) -> list[str]:
    """Return the keys in an operator's file, one a line and at least one. Raises ConfigurationError."""
    option = "--admin-key-file"
    found = [line.strip() for line in read_private_text(option, path).splitlines() if line.strip()]
    if not found:
        raise ConfigurationError(f"{option}: {path} holds no key; write one a line.")
    for key in found:
        check_key(option, key)
    return found


def read_private_text(option: str, path: Path) -> str:
    """Return what is in a file that nobody else may write. Raises ConfigurationError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise UnreadableError(f"{option}: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{option}: {path} cannot be read: it is not a text.") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{option}: {path} is larger than {MAX_FILE_BYTES >> 20} MiB.")
    if others := other_writers(path.stat()):
        raise ConfigurationError(
            f"{option}: {path} {others}, who could add a key; make it yours alone (chmod go-w {path})."
        )
    return text
