"""The folder for embeddings: private, bounded, and gone with its owner."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from chiasm.errors import ConfigurationError
from chiasm.launch import folders
from chiasm.launch.folders import LockedFolder, StorageFolder, in_memory, remove_stale


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep away from the folders of this user's other deployments."""
    (tmp_path / "shm").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(folders, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def test_it_is_in_shared_memory_and_private(tmp_path: Path) -> None:
    folder = StorageFolder()
    assert folder.path.parent == tmp_path / "shm"
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert 0 < folder.max_bytes <= folders.DEFAULT_MAX_BYTES
    folder.remove()


def test_it_is_among_temporary_files_if_shared_memory_has_no_room(tmp_path: Path) -> None:
    folder = StorageFolder(max_bytes=1 << 60)
    assert folder.path.parent == tmp_path / "tmp"
    assert folder.max_bytes == 1 << 60
    folder.remove()


@pytest.mark.parametrize("full", [{"f_bavail": 0}, {"f_favail": 0}], ids=["bytes", "files"])
def test_small_files_are_not_kept_in_memory_without_room(full: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_memory() == folders.SHARED_MEMORY
    room = {"f_bavail": 1 << 30, "f_frsize": 1, "f_files": 1 << 20, "f_favail": 1 << 20}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**room | full))
    assert in_memory() is None


def test_a_folder_that_cannot_be_made_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Cannot make a folder in .*/missing: No such file.*TMPDIR"):
        LockedFolder("some-", tmp_path / "missing")


@pytest.fixture
def _no_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a service may write nowhere but in its own folders."""

    def refuse() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)


@pytest.mark.usefixtures("_no_temporary_files")
def test_without_a_folder_for_temporary_files_the_reason_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"Temporary files can't be written: No usable .* TMPDIR"):
        StorageFolder()


def test_an_instance_that_can_write_no_temporary_files_says_so() -> None:
    code = (
        "import tempfile\n"
        "def refuse(): raise FileNotFoundError(2, 'No usable temporary directory found')\n"
        "tempfile.gettempdir = refuse\n"
        "from chiasm.cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, "instance", "demo", "--role", "aggregated", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: Temporary files can't be written: No usable temporary directory found.")


def test_removing_it_removes_its_files_and_can_be_repeated() -> None:
    folder = StorageFolder()
    (folder.path / "entry").write_bytes(b"x")
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_the_next_start_removes_the_folder_of_a_killed_owner(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal; from chiasm.launch import folders\n"
        f"folders.SHARED_MEMORY = pathlib.Path({str(tmp_path / 'shm')!r})\n"
        "folder = folders.StorageFolder(1); (folder.path / 'entry').touch(); print(folder.path, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    owner = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    left = Path(owner.stdout.strip())
    assert (left / "entry").exists()
    folder = StorageFolder(1)
    assert not left.exists()
    assert folder.path.exists()
    folder.remove()


def test_the_folder_of_a_live_owner_stays() -> None:
    first = StorageFolder()
    second = StorageFolder()
    assert first.path.exists()
    first.remove()
    second.remove()


def test_other_names_and_links_stay(tmp_path: Path) -> None:
    folder = StorageFolder()
    name = folder.path.name
    folder.remove()
    (tmp_path / "shm" / name).symlink_to(tmp_path / "tmp")
    (tmp_path / "shm" / "other").mkdir()
    remove_stale(tmp_path / "shm", folders.STORAGE_PREFIX)
    assert (tmp_path / "shm" / name).is_symlink()
    assert (tmp_path / "shm" / "other").is_dir()
    assert (tmp_path / "tmp").is_dir()
