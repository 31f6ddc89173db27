from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.ec_transfer import ECTransferRole, reader
from chiasm.ec_transfer.stores import guard, recovery, redis

from .instance import Instance, config_for


@pytest.fixture(autouse=True)
def stores_are_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no fault of a store."""
    for name in ("_CONNECT_SECONDS", "_CALL_SECONDS", "_WRITE_SECONDS"):
        monkeypatch.setattr(redis, name, 30.0)
    monkeypatch.setattr(recovery, "_SECONDS", 30.0)


@pytest.fixture(autouse=True)
def holders_answer_when_they_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no holder has said that it has is not coming, also while one is being met."""
    monkeypatch.setattr(reader, "_MEETING_SECONDS", 0.0)


@pytest.fixture
def faults_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that has failed isn't asked again in this test."""
    for name in ("_FIRST_PAUSE_SECONDS", "_LONGEST_PAUSE_SECONDS"):
        monkeypatch.setattr(guard, name, 1000.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "entries"


@pytest.fixture
def encoder(folder: Path) -> Instance:
    return Instance(config_for(folder, ECTransferRole.PRODUCER))


@pytest.fixture
def pd(folder: Path) -> Instance:
    return Instance(config_for(folder, ECTransferRole.CONSUMER))
