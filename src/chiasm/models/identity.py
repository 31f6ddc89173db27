"""The fingerprint: a name for everything that an embedding depends on, apart from the image itself."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from blake3 import blake3

from chiasm.errors import ConfigurationError
from chiasm.models.checkpoint import MALFORMED, open_checkpoint

_VERSION = b"chiasm entry 1"
"""Change it whenever the layout of entries or the preprocessing changes."""
_CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
_WHOLE_BYTES = 64 * 1024
"""Tensors up to this size are hashed in full, larger ones by samples."""
_SAMPLES = 16
_SAMPLE_BYTES = 1024


def fingerprint(folder: Path, dtype_name: str) -> str:
    """Hash config, preprocessing, dtype and weights of a checkpoint to 64 hex digits. Raises ConfigurationError.

    Of the weights it reads names, shapes and sizes, and samples from all over each tensor. That takes a fraction of a
    second for any model and tells apart different weights of the same architecture.
    """
    checkpoint = open_checkpoint(folder)
    digest = blake3(_VERSION)
    _add(digest, dtype_name.encode())
    for name in _CONFIG_FILES:
        path = folder / name
        _add(digest, path.read_bytes() if path.is_file() else b"")
    for file in checkpoint.weight_files():
        _add(digest, file.name.encode())
        _add_weights(digest, file)
    return digest.hexdigest()


def _add(digest: blake3, data: bytes) -> None:
    """Add the length, then the data, so that moving bytes from one part to the next changes the digest."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _add_weights(digest: blake3, file: Path) -> None:
    """Add a safetensors file, which has 8 bytes for the length of the header, the header as JSON, and the tensors."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 8 + int.from_bytes(data[:8], "little")
            header = data[8:start]
            offsets = sorted(
                tensor["data_offsets"] for name, tensor in json.loads(header).items() if name != "__metadata__"
            )
            _add(digest, header)
            _add(digest, size.to_bytes(8, "little"))
            for begin, end in offsets:
                for piece in _pieces(start + begin, start + end):
                    digest.update(data[piece])
    except (OSError, *MALFORMED) as error:
        raise ConfigurationError(f"{file} is damaged or not a safetensors file. Download it again: {error}") from error


def _pieces(begin: int, end: int) -> list[slice]:
    """Return the parts of a tensor's bytes that are hashed."""
    if end - begin <= _WHOLE_BYTES:
        return [slice(begin, end)]
    step = (end - begin - _SAMPLE_BYTES) // (_SAMPLES - 1)
    return [slice(begin + step * index, begin + step * index + _SAMPLE_BYTES) for index in range(_SAMPLES)]
