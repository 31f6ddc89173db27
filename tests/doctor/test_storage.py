"""The folder for embeddings, as this machine sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiasm.doctor import Verdict, storage
from chiasm.ec_transfer.bounded_folder import BoundedFolder
from chiasm.launch.folders import SHARED_MEMORY
from tests.doctor.results import problem, the_one, verdicts, warning


def store(path: Path) -> str:
    """A folder as instances make it; its name."""
    path.mkdir(mode=0o700)
    return BoundedFolder(path, 1 << 20, lambda size_bytes: None).store_id()


def test_a_writable_folder_is_ok(tmp_path: Path) -> None:
    assert verdicts(storage.planned_folder(tmp_path)) == ["ok"]
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_folder_that_can_be_created_is_ok(tmp_path: Path) -> None:
    (found,) = storage.planned_folder(tmp_path / "a" / "b")
    assert found.verdict == "ok"
    assert "instances create it" in found.says
    assert not (tmp_path / "a").exists()


def test_a_file_instead_of_a_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not a folder" in problem(storage.planned_folder(tmp_path / "file")).says


def test_a_folder_that_everybody_may_write_to_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "writable by every user" in problem(storage.planned_folder(tmp_path)).says


@pytest.mark.usefixtures("ordinary_user")
def test_a_read_only_folder_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in problem(storage.planned_folder(tmp_path)).says
    assert "cannot create it" in problem(storage.planned_folder(tmp_path / "new")).says


def test_a_folder_in_which_no_file_can_be_written_is_a_problem() -> None:
    assert "cannot be written and locked" in problem(storage.planned_folder(Path("/proc/self/task"))).says


def test_the_folder_of_all_instances_is_ok(tmp_path: Path) -> None:
    name = store(tmp_path / "store")
    assert verdicts(storage.shared_folder(tmp_path / "store", {name})) == ["ok", "ok"]


def test_a_folder_of_other_instances_is_a_problem(tmp_path: Path) -> None:
    name = store(tmp_path / "store")
    found = problem(storage.shared_folder(tmp_path / "store", {"e" * 32}))
    assert name in found.says
    assert "e" * 32 in found.says


def test_a_folder_of_some_instances_is_a_problem(tmp_path: Path) -> None:
    name = store(tmp_path / "store")
    assert "not the folder that all" in problem(storage.shared_folder(tmp_path / "store", {name, "e" * 32})).says


def test_an_unused_folder_is_a_problem(tmp_path: Path) -> None:
    assert "a folder without a name" in problem(storage.shared_folder(tmp_path, {"e" * 32})).says


def test_an_unreported_folder_is_skipped(tmp_path: Path) -> None:
    assert verdicts(storage.shared_folder(tmp_path, set())) == ["ok", "skipped"]


def test_a_missing_folder_is_a_problem(tmp_path: Path) -> None:
    assert "not a folder on this machine" in problem(storage.shared_folder(tmp_path / "none", set())).says


def test_enough_room_is_ok(tmp_path: Path) -> None:
    assert verdicts(storage.room(tmp_path, 1 << 20, 1 << 10)) == ["ok"]
    assert verdicts(storage.room(tmp_path / "not" / "yet", 1 << 20, None)) == ["ok"]


def test_a_limit_larger_than_the_disk_is_warned_about(tmp_path: Path) -> None:
    found = warning(storage.room(tmp_path, 1 << 60, 1 << 10))
    assert "1073741824.0 GiB" in found.says
    assert found.command.startswith("--ec-max-bytes ")


def test_a_limit_smaller_than_one_image_is_a_problem(tmp_path: Path) -> None:
    assert "2.0 MiB" in problem(storage.room(tmp_path, 1 << 20, 2 << 20)).says


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm here")
def test_a_folder_in_memory_is_recognized(tmp_path: Path) -> None:
    assert storage.is_in_memory(SHARED_MEMORY / "not-yet")
    assert "in memory" in the_one(storage.planned_folder(SHARED_MEMORY / "not-yet"), Verdict.OK).says
