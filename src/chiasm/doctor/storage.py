"""Checks of the folder through which embeddings are exchanged, as this machine sees it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from chiasm.doctor.report import Check, Result, size
from chiasm.ec_transfer.bounded_folder import read_store_id
from chiasm.ec_transfer.folder_check import examine_folder, file_system_of, nearest_existing

FOLDER = Check("storage folder")
_SPACE = Check("storage space")

_MEMORY = frozenset({"tmpfs", "ramfs"})
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "glusterfs", "beegfs", "gpfs", "9p", "virtiofs"})


def planned_folder(path: Path) -> Iterator[Result]:
    """Check whether instances of this machine, run by this user, can exchange embeddings through ``path``."""
    if findings := examine_folder(path):
        yield from FOLDER.problems(findings, why="instances refuse to start with it.")
    elif path.exists():
        yield FOLDER.ok(f"{path} can be written to and locked ({_kind(path)})")
    else:
        yield FOLDER.ok(f"{path} does not exist yet; instances create it ({_kind(path)})")


def shared_folder(path: Path, store_ids: Collection[str]) -> Iterator[Result]:
    """Check whether ``path`` is the folder that running instances use, which they call ``store_ids``."""
    if not os.path.isdir(path):  # Path.is_dir raises PermissionError
        yield FOLDER.problem(
            f"{path} is not a folder on this machine",
            why="instances on this machine would exchange embeddings through another folder than they were given.",
            do="mount the shared folder here, or name the one that the instances were given.",
        )
        return
    yield from planned_folder(path)
    try:
        own = read_store_id(path)
    except OSError as error:
        yield FOLDER.skipped(f"the name of {path} cannot be read ({error.strerror}), so it can't be compared")
        return
    if not store_ids:
        yield FOLDER.skipped(f"the instances don't name their folder, so {path} can't be compared with it")
    elif set(store_ids) == {own}:
        yield FOLDER.ok(f"{path} is the folder that all instances use")
    else:
        yield FOLDER.problem(
            f"{path} is not the folder that all instances use: it is {own or 'a folder without a name'}, theirs "
            f"{', '.join(sorted(store_ids))}",
            why="embeddings that are written into one folder are not found in another.",
            do="give all instances the same --shared-storage-path, mounted from the same place on every machine and in every "
            "container.",
        )


def room(path: Path, max_bytes: int, image_bytes: int | None) -> Iterator[Result]:
    """Check whether the folder has room for ``max_bytes`` of embeddings, and at least for one image's."""
    space = os.statvfs(nearest_existing(path))
    free = space.f_bavail * space.f_frsize
    usable = free + _bytes_in(path)
    says = f"{size(free)} free, embeddings may take {size(max_bytes)}"
    if image_bytes is not None:
        says += f"; one image of 1024 × 1024 takes {size(image_bytes)}"
    if (image_bytes or 0) > min(usable, max_bytes):
        yield _SPACE.problem(
            says,
            why="there is no room for the embedding of such an image: the request fails.",
            do="free some space, name another folder with --shared-storage-path, or raise --ec-max-bytes.",
        )
    elif max_bytes > usable:
        yield _SPACE.warning(
            says,
            why="the disk is full before the limit is reached, and embeddings that don't fit are lost.",
            do="lower the limit to what there is.",
            command=f"--ec-max-bytes {max(1, usable // 2 >> 20)}MiB",
        )
    else:
        yield _SPACE.ok(says)


def is_in_memory(path: Path) -> bool:
    return file_system_of(path) in _MEMORY


def _kind(path: Path) -> str:
    kind = file_system_of(path)
    if not kind:
        return "unknown file system"
    if kind in _MEMORY:
        return f"{kind}: in memory, for instances of one machine"
    is_remote = kind in _NETWORK or kind.startswith("fuse")
    return f"{kind}: {'over the network' if is_remote else 'on a disk of this machine'}"


def _bytes_in(path: Path) -> int:
    try:
        with os.scandir(path) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries if entry.is_file())
    except OSError:
        return 0
