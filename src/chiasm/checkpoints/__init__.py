"""Checkpoints that ship with the package."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


class UnknownCheckpoint(KeyError):
    """No checkpoint of that name ships with the package."""

    def __str__(self) -> str:
        return str(self.args[0])


def names() -> list[str]:
    """Return the names of the shipped checkpoints, sorted."""
    return sorted(path.parent.name for path in _HERE.glob("*/config.json"))


def folder(name: str) -> Path:
    """Return the folder of the checkpoint called ``name``, in the layout that transformers loads.

    Raises ``UnknownCheckpoint`` (a ``KeyError``) if there is none.
    """
    if name not in names():
        raise UnknownCheckpoint(f"no checkpoint {name!r} ships with the package; there are: {', '.join(names())}")
    return _HERE / name
