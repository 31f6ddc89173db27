"""A small random checkpoint, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.bench import synthetic


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make("qwen3_vl", tmp_path_factory.mktemp("checkpoints") / "small")
