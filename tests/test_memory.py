"""How much memory a process may take: what is free on the machine, or in its container."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from chiasm import control_groups, memory
from chiasm.engine.device import check_memory
from chiasm.errors import ConfigurationError
from chiasm.launch.folders import LEAST_BYTES, memory_for_embeddings

GIB = 1 << 30


def limit_to(folder: Path, num_bytes: int) -> None:
    """Write the files of a group that may take so much and has taken half a GiB, and as much for pages of files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{num_bytes}\n")
    (folder / "memory.current").write_text(f"{GIB}\n")
    (folder / "memory.stat").write_text(f"anon {GIB // 2}\nactive_file {GIB // 4}\ninactive_file {GIB // 4}\n")


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a container that may take 4 GiB."""
    folder = tmp_path / "cgroup"
    limit_to(folder, 4 * GIB)
    monkeypatch.setattr(control_groups, "_ROOT", folder)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 256 * GIB}))
    return folder


def test_a_container_limits_the_free_memory_and_may_drop_pages_of_files(container: Path) -> None:
    assert memory.free_memory() == 3.5 * GIB
    (container / "memory.max").write_text("max\n")
    assert memory.free_memory() == 256 * GIB
    (container / "memory.max").unlink()
    assert memory.free_memory() == 256 * GIB


@pytest.mark.parametrize("limited", ["system.slice/chiasm.service", "system.slice", "."])
def test_a_service_has_the_free_memory_of_its_group_and_of_those_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: str
) -> None:
    own = tmp_path / "own"
    own.write_text("1:name=systemd:/\n0::/system.slice/chiasm.service\n")
    monkeypatch.setattr(control_groups, "_OWN", own)
    monkeypatch.setattr(control_groups, "_ROOT", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 256 * GIB}))
    assert memory.free_memory() == 256 * GIB
    limit_to(tmp_path / limited, 4 * GIB)
    assert memory.free_memory() == 3.5 * GIB


@pytest.mark.usefixtures("container")
def test_encoders_together_take_a_quarter_of_what_their_container_has_left() -> None:
    assert memory_for_embeddings(1) == 3.5 * GIB // 4
    assert memory_for_embeddings(2) == 3.5 * GIB // 8
    assert memory_for_embeddings(64) == LEAST_BYTES


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of 1 GiB for encoders and 8 GiB for language, which take no room on the disk."""
    sizes = {"model.visual.norm.weight": GIB, "lm_head.weight": 8 * GIB}
    ends = list(itertools.accumulate(sizes.values(), initial=0))
    offsets = zip(sizes, itertools.pairwise(ends), strict=True)
    header = json.dumps(
        {name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} for name, (begin, end) in offsets}
    ).encode()
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.write(len(header).to_bytes(8, "little") + header)
        weights.truncate(8 + len(header) + ends[-1])
    return tmp_path


@pytest.mark.usefixtures("container")
def test_a_checkpoint_that_is_larger_than_its_container_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"9\.0 GiB of weights, but only 3\.5 GiB of memory is free"):
        check_memory(checkpoint, torch.device("cpu"))


@pytest.mark.usefixtures("container")
def test_only_the_weights_of_the_part_that_an_instance_loads_must_fit(checkpoint: Path) -> None:
    check_memory(checkpoint, torch.device("cpu"), "vision")
    with pytest.raises(ConfigurationError, match=r"8\.0 GiB of language weights"):
        check_memory(checkpoint, torch.device("cpu"), "language")
