"""For all tests of the transfer plane."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .holder import be_patient


@pytest.fixture(autouse=True, scope="package")
def _patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        be_patient(patch)
        yield
