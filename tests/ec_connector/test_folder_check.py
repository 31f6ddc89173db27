"""An instance refuses a folder that it cannot use when it starts, and says what to do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from chiasm.ec_transfer import ECTransferRole
from chiasm.ec_transfer.folder_check import examine_folder, file_system_of, files_may_be_mapped
from chiasm.errors import ConfigurationError

from .instance import Instance, config_for


def test_a_usable_folder_has_no_findings_and_stays_empty(folder: Path) -> None:
    folder.mkdir()
    assert examine_folder(folder) == []
    assert list(folder.iterdir()) == []


def test_a_folder_that_can_be_created_has_no_findings(tmp_path: Path) -> None:
    assert examine_folder(tmp_path / "not" / "there" / "yet") == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_locked_or_written_is_found() -> None:
    (finding,) = examine_folder(Path("/proc/self/task"))
    assert "cannot be written and locked" in finding.message
    assert examine_folder(Path("/proc/self/task"), writes=False) == []


@pytest.mark.usefixtures("ordinary_user")
def test_a_folder_that_cannot_be_created_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        (finding,) = examine_folder(tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)
    assert "this user cannot create it" in finding.problem
    assert "install -d" in finding.advice


def test_the_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    instance = Instance(config_for(tmp_path / "not" / "there" / "yet"))
    assert instance.load(instance.encode("a")) is not None


@pytest.mark.parametrize("max_bytes", [4096, -1])
def test_a_limit_below_the_size_of_a_header_is_refused(folder: Path, max_bytes: int) -> None:
    with pytest.raises(ConfigurationError, match="max_bytes"):
        Instance(config_for(folder, max_bytes=max_bytes))


@pytest.mark.parametrize("fingerprint", ["no hex", "AB", "a" * 129, '","'])
def test_a_fingerprint_that_is_not_hex_is_refused(folder: Path, fingerprint: str) -> None:
    with pytest.raises(ConfigurationError, match="fingerprint"):
        Instance(replace(config_for(folder), fingerprint=fingerprint))


def test_a_path_is_required() -> None:
    with pytest.raises(ConfigurationError, match="needs shared_storage_path"):
        Instance(config_for(None))


@pytest.mark.parametrize("below", [".", "entries"])
def test_a_path_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is not a folder"):
        Instance(config_for(tmp_path / "file" / below))


def test_a_folder_that_every_user_may_write_to_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o1777)
    (finding,) = examine_folder(folder)
    assert "every user" in finding.problem
    assert f"chmod go-w {folder}" in finding.advice
    with pytest.raises(ConfigurationError) as raised:
        Instance(config_for(folder))
    assert raised.value.message == finding.message


@pytest.mark.usefixtures("ordinary_user")
def test_a_read_only_folder_serves_consumers_and_refuses_producers(folder: Path) -> None:
    identifier = Instance(config_for(folder)).encode("a")
    folder.chmod(0o500)
    (folder / ".usage").chmod(0o400)
    try:
        assert Instance(config_for(folder, ECTransferRole.CONSUMER)).load(identifier) is not None
        with pytest.raises(ConfigurationError, match="Permission denied"):
            Instance(config_for(folder, ECTransferRole.PRODUCER))
    finally:
        folder.chmod(0o700)


def test_files_are_mapped_on_local_file_systems_only(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw shared:1 - ext4 /dev/vda rw\n"
        "2 1 0:2 / /mnt/far rw shared:2 master:1 - nfs4 server:/export rw\n"
        "3 1 0:3 / /mnt/far/near rw - tmpfs tmpfs rw\n"
        "4 1 0:4 / /mnt/with\\040blank rw - fuse.sshfs host: rw\n"
    )
    paths = ("/", "/mnt/far/x", "/mnt/far/near", "/mnt/farther")
    kinds = {path: file_system_of(Path(path), table) for path in paths}
    assert kinds == {"/": "ext4", "/mnt/far/x": "nfs4", "/mnt/far/near": "tmpfs", "/mnt/farther": "ext4"}
    assert file_system_of(Path("/mnt/with blank/x"), table) == "fuse.sshfs"
    assert file_system_of(Path("/"), tmp_path / "no such table") == ""
    assert files_may_be_mapped(Path("/"), table)
    assert not files_may_be_mapped(Path("/mnt/far"), table)
    assert files_may_be_mapped(Path("/"), tmp_path / "no such table")


@pytest.mark.parametrize(("mode", "fault"), [(0o777, "every user"), (0o770, "by a group"), (0o1777, "every user")])
@pytest.mark.parametrize("role", [ECTransferRole.PRODUCER, ECTransferRole.CONSUMER])
def test_a_folder_that_others_may_write_is_refused(folder: Path, mode: int, fault: str, role: ECTransferRole) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigurationError, match=fault):
        Instance(config_for(folder, role=role))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(ConfigurationError, match=r"belongs to another user \(12345\).*chown"):
        Instance(config_for(folder))
