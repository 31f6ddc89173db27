"""The file of an embedding in a store that others can write to."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader, InvalidEntryError, bytes_of, header_of, open_entry

IDENTIFIER, FINGERPRINT = "a1" * 32, "beef"
_folder = tempfile.TemporaryDirectory(prefix="chiasm-fuzz-")
_path = Path(_folder.name) / "entry"


def seeds() -> list[bytes]:
    files = []
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        tensor = torch.ones((3, 4), dtype=dtype)
        header, data = header_of(IDENTIFIER, FINGERPRINT, tensor), bytes_of(tensor)
        hasher = header.hasher()
        hasher.update(data)
        files.append(header._replace(checksum=hasher.hexdigest()).to_bytes() + bytes(data))
    return files


def take(data: bytes) -> bool:
    header = EntryHeader.from_bytes(data[:HEADER_BYTES])
    assert header is None or header.to_bytes() == data[:HEADER_BYTES]
    _path.write_bytes(data)
    try:
        entry = open_entry(str(_path), IDENTIFIER, FINGERPRINT, None, mapped=False)
    except InvalidEntryError:
        return False
    tensor = entry.tensor()
    assert tensor.shape == entry.header.shape
    return entry.matches_checksum()
