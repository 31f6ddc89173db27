"""Checks of the folder through which embeddings are exchanged, as this machine sees it."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from chiasm.doctor.base import Check, Finding, size
from chiasm.ec_transfer.folder_check import file_system_of

_FOLDER = Check("storage folder")
_SPACE = Check("storage space")

_MEMORY = frozenset({"tmpfs", "ramfs"})
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "glusterfs", "beegfs", "gpfs", "9p", "virtiofs"})
_STORE_ID = "store-id"
_STORE_ID_CHARACTERS = 32
_UNWRITABLE_WHY = "encoders cannot publish embeddings there, and every request with an image fails."


def planned_folder(path: Path) -> Iterator[Finding]:
    """Whether instances of this machine, run by this user, can exchange embeddings through ``path``."""
    parent = _existing(path)
    if parent != path:
        if os.access(parent, os.W_OK | os.X_OK):
            yield _FOLDER.ok(f"{path} is not there yet; instances make it, in {parent} ({_kind(parent)})")
        else:
            yield _FOLDER.problem(
                f"{path} is not there, and {parent} may not be written to by this user",
                why=_UNWRITABLE_WHY,
                do="make it, for the user that the instances run as.",
                command=f"sudo install -d -m 700 -o {_user()} {path}",
            )
        return
    yield from _usable(path)


def shared_folder(path: Path, store_ids: Collection[str]) -> Iterator[Finding]:
    """Whether ``path`` is the folder that running instances, which name it by ``store_ids``, use."""
    if not path.is_dir():
        yield _FOLDER.problem(
            f"{path} is not a folder on this machine",
            why="instances on this machine would exchange embeddings through another one than they were told.",
            do="mount the shared folder here, or name the one that the instances were given.",
        )
        return
    yield from _usable(path)
    try:
        with (path / _STORE_ID).open("rb") as file:
            own = file.read(_STORE_ID_CHARACTERS).decode("ascii", errors="replace")
    except FileNotFoundError:
        own = ""
    except OSError as error:
        yield _FOLDER.skipped(
            f"{path / _STORE_ID} cannot be read ({error.strerror}), so that it stays open whose folder it is"
        )
        return
    if not store_ids:
        yield _FOLDER.skipped("the instances don't name their folder, so that it stays open whether it is this one")
    elif set(store_ids) == {own}:
        yield _FOLDER.ok(f"{path} is the folder that all instances use")
    else:
        yield _FOLDER.problem(
            f"{path} is not the folder that all instances use: it is {own or 'a folder without a name'}, theirs "
            f"{', '.join(sorted(store_ids))}",
            why="embeddings that are written into one folder are not found in another.",
            do="give all instances the same --shared-storage-path, mounted from the same place on every machine and in every "
            "container.",
        )


def room(path: Path, max_bytes: int, image_bytes: int | None) -> Iterator[Finding]:
    """Whether the folder can hold what it may, and one image's embedding at least."""
    parent = _existing(path)
    space = os.statvfs(parent)
    free = space.f_bavail * space.f_frsize
    there = free + (_held(path) if parent == path else 0)
    bound = f"{size(free)} are free, embeddings may take {size(max_bytes)}"
    of_one = "" if image_bytes is None else f"; that of an image of 1024 × 1024 takes {size(image_bytes)}"
    least = image_bytes or 0
    if least > min(there, max_bytes):
        yield _SPACE.problem(
            f"{bound}{of_one}",
            why="such an image's embedding has no room at all: the request fails.",
            do="free some space, name another folder by --shared-storage-path, or raise --ec-max-bytes.",
        )
    elif max_bytes > there:
        yield _SPACE.warning(
            f"{bound}{of_one}",
            why="the disk is full before the bound is reached, and then embeddings that find no room are lost.",
            do="bound them to what there is.",
            command=f"--ec-max-bytes {max(1, there // 2 >> 20)}MiB",
        )
    else:
        yield _SPACE.ok(f"{bound}{of_one}")


def is_memory(path: Path) -> bool:
    """Whether what lies at ``path`` takes memory."""
    return file_system_of(_existing(path)) in _MEMORY


def _usable(path: Path) -> Iterator[Finding]:
    if not path.is_dir():
        yield _FOLDER.problem(
            f"{path} is no folder",
            why=_UNWRITABLE_WHY,
            do="name a folder, or one that is to be made, by --shared-storage-path.",
        )
        return
    if path.stat().st_mode & stat.S_IWOTH:
        yield _FOLDER.problem(
            f"{path} is writable by every user",
            why="anybody on this machine could plant embeddings there; instances refuse it.",
            do="name a folder in it that doesn't exist yet, or take the permission away.",
            command=f"chmod o-w {path}",
        )
        return
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        yield _FOLDER.problem(
            f"a file in {path} could not be written and locked: {error.strerror}",
            why=_UNWRITABLE_WHY,
            do="let the user that the instances run as write there; a network file system must be mounted with locks.",
            command=f"sudo chown {_user()} {path}",
        )
        return
    yield _FOLDER.ok(f"{path} can be written to and locked ({_kind(path)})")


def _kind(path: Path) -> str:
    kind = file_system_of(path)
    if not kind:
        return "file system not known"
    if kind in _MEMORY:
        return f"{kind}: in memory, for instances of one machine"
    network = kind in _NETWORK or kind.startswith("fuse")
    return f"{kind}: {'over the network' if network else 'on a disk of this machine'}"


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _held(path: Path) -> int:
    try:
        with os.scandir(path) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries if entry.is_file())
    except OSError:
        return 0


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
