"""NIXL and UCX, installed or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.doctor import transports
from chiasm.doctor.transports import Nixl
from tests.doctor.nixl import HAS_NIXL
from tests.doctor.results import problem, verdicts


@pytest.mark.skipif(not HAS_NIXL, reason="NIXL is not installed")
def test_nixl_is_asked_for_its_plugins() -> None:
    (found,) = transports.nixl(is_needed=True)
    assert found.verdict == "ok"
    assert "UCX" in found.says


def test_nixl_that_cannot_be_used_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl", "nixl_cu12", "nixl_cu13"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('libcuda.so.1: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "can't be used" in (says := problem(transports.nixl(is_needed=False)).says)
    assert "libcuda.so.1: no such file" in says


def test_missing_nixl_is_a_problem_if_it_is_needed() -> None:
    modules = ("nixl_of_no_machine",)
    assert verdicts(transports.nixl(is_needed=False, modules=modules)) == ["skipped"]
    assert problem(transports.nixl(is_needed=True, modules=modules)).command == "pip install '.[nixl]'"


def test_nixl_without_ucx_is_a_problem() -> None:
    found = transports.judge_nixl(Nixl("nixl", ["POSIX"]), is_needed=True)
    assert "no UCX plugin, only POSIX" in problem([found]).says


@pytest.fixture
def _ucx_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "ucx_info"
    command.write_text(
        "#!/bin/sh\necho '#      Transport: tcp'\necho '#         Device: eth0'\necho '#      Transport: rc_mlx5'\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.usefixtures("_ucx_info")
def test_transports_are_listed_by_ucx_info(tmp_path: Path) -> None:
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    (found,) = transports.ucx(infiniband=tmp_path / "infiniband")
    assert found.verdict == "ok"
    assert "rc_mlx5, tcp (ucx_info); devices for RDMA: mlx5_0" in found.says


def test_missing_ucx_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = transports.ucx(modules=())
    assert found.verdict == "skipped"
    assert "UCX_LOG_LEVEL=info" in found.says
