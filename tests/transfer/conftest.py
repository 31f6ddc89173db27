"""For all tests of the transfer plane."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chiasm.transfer import tcp

from .holder import PATIENCE_SECONDS


@pytest.fixture(autouse=True, scope="package")
def _patience() -> Iterator[None]:
    """No connection counts as broken because the machine is busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tcp, "PATIENCE_SECONDS", PATIENCE_SECONDS)
        yield
