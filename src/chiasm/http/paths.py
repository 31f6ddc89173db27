"""Paths as clients write them: with a slash too many, or almost right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_SLASHES = re.compile("//+")
_MODELS = "/v1/models/"
_LEAST_LIKENESS = 0.75
_COMPARED_CHARACTERS = 200


def normal_path(path: str) -> str:
    """Return the path without doubled slashes and without one at its end; a model's name is kept as it is."""
    if "//" not in path and not path.endswith("/"):
        return path
    normal = "/" + _SLASHES.sub("/", path).strip("/")
    at = path.find("models//")
    if at >= 0 and normal.startswith(_MODELS):  # the name may be the path of a folder
        return _MODELS + "/" + normal.removeprefix(_MODELS)
    return normal


def nearest_path(path: str, known: Iterable[str]) -> str | None:
    """Return the known path that a client probably means; None if none is like it."""
    asked = path[:_COMPARED_CHARACTERS].lower()
    paths = list(known)
    parts = [one for one in paths if one != "/" and (asked.endswith(one) or asked.startswith(f"{one}/"))]
    return next(iter(parts or difflib.get_close_matches(asked, paths, n=1, cutoff=_LEAST_LIKENESS)), None)
