"""Packages that import their public names on first use."""

from __future__ import annotations

from importlib import import_module

import pytest

PACKAGES = ["chiasm.http", "chiasm.launch", "chiasm.media", "chiasm.models", "chiasm.proxy", "chiasm.server"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_found(package: str) -> None:
    module = import_module(package)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_another_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=rf"module '{package}' has no attribute 'frobnicate'"):
        _ = import_module(package).frobnicate
