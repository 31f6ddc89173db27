"""What the package carries besides its modules."""

from __future__ import annotations

from importlib import resources


def test_it_says_that_it_is_typed() -> None:
    assert resources.files("chiasm").joinpath("py.typed").is_file()
