"""Packages that import a public name when it is first used, so that their configuration loads without the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def names_from(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Return a ``__getattr__`` for ``package``; ``modules`` says which of its modules defines each name."""

    def find(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return find
