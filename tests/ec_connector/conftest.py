from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.ec_transfer import ECTransferRole

from .instance import Instance, config_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "entries"


@pytest.fixture
def encoder(folder: Path) -> Instance:
    return Instance(config_for(folder, ECTransferRole.PRODUCER))


@pytest.fixture
def pd(folder: Path) -> Instance:
    return Instance(config_for(folder, ECTransferRole.CONSUMER))
