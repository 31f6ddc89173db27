"""How much memory a process may take: what is free on the machine, or in its container."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chiasm import memory
from chiasm.engine.device import check_memory
from chiasm.errors import ConfigurationError
from chiasm.launch.folders import LEAST_BYTES, memory_for_embeddings

GIB = 1 << 30


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a container that may take 4 GiB and has taken half a GiB, and as much for pages of files."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    (folder / "memory.max").write_text(f"{4 * GIB}\n")
    (folder / "memory.current").write_text(f"{GIB}\n")
    (folder / "memory.stat").write_text(f"anon {GIB // 2}\nactive_file {GIB // 4}\ninactive_file {GIB // 4}\n")
    monkeypatch.setattr(memory, "_CGROUP", folder)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 256 * GIB}))
    return folder


def test_a_container_limits_the_free_memory_and_may_drop_pages_of_files(container: Path) -> None:
    assert memory.free_memory() == 3.5 * GIB
    (container / "memory.max").write_text("max\n")
    assert memory.free_memory() == 256 * GIB
    (container / "memory.max").unlink()
    assert memory.free_memory() == 256 * GIB


@pytest.mark.usefixtures("container")
def test_encoders_together_take_a_quarter_of_what_their_container_has_left() -> None:
    assert memory_for_embeddings(1) == 3.5 * GIB // 4
    assert memory_for_embeddings(2) == 3.5 * GIB // 8
    assert memory_for_embeddings(64) == LEAST_BYTES


@pytest.mark.usefixtures("container")
def test_a_checkpoint_that_is_larger_than_its_container_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(8 * GIB)
    with pytest.raises(ConfigurationError, match=r"8\.0 GiB of weights, but only 3\.5 GiB of memory is free"):
        check_memory(tmp_path, torch.device("cpu"))
