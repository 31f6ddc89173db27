"""The file of one entry: a safetensors file that says what it holds, so that torn and foreign files are recognized.

The first 4096 bytes are the safetensors header: an 8-byte length and JSON, padded with spaces. The tensor follows, starting on
a page of its own; any safetensors reader finds it under the name ``ec_cache``. ``__metadata__`` in the JSON holds the version
of the format, the identifier, the fingerprint and a checksum.

The checksum (XXH3, 128 bits) covers every byte of the tensor and the rest of the header. It detects what a crash, a lost page
or another program has left behind. It is not a signature: anyone who may write to the folder can forge it.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import xxhash

from chiasm.ec_transfer.bounded_folder import Signature, write_whole
from chiasm.errors import StorageError

HEADER_BYTES = 4096
TENSOR_NAME = "ec_cache"

_FORMAT = "chiasm.ec/1"
_LENGTH_BYTES = 8
_LARGE_BYTES = 32 << 20
_PIECE_BYTES = 1 << 20
_TOUCH_INTERVAL_NS = 10**9
_DIMENSION_END = 1 << 31
"""No size of a dimension is as large. Torch takes none that is much larger, even if there are no elements."""
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER = re.compile(
    rb'"identifier":"([0-9a-f]{64})","fingerprint":"([0-9a-f]{0,128})","checksum":"([0-9a-f]{32})"\},'
    rb'"ec_cache":\{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]{0,999})\]'
)
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class InvalidEntryError(Exception):
    """The file at an entry's path is not this entry: it is torn, foreign, or of another model."""

    def __init__(self, reason: str, signature: Signature) -> None:
        super().__init__(reason)
        self.signature = signature


class EntryHeader(NamedTuple):
    """The header of an entry's file. ``dtype`` is the name in safetensors; ``checksum`` has 32 hex digits."""

    identifier: str
    fingerprint: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str = ""

    @property
    def data_bytes(self) -> int:
        return data_bytes(self.dtype, self.shape)

    @property
    def has_known_dtype(self) -> bool:
        return self.dtype in _DTYPES

    def to_bytes(self) -> bytes:
        """Return the first 4096 bytes of the file. Raises StorageError if the shape is too long for them."""
        shape = ",".join(map(str, self.shape))
        text = (
            f'{{"__metadata__":{{"format":"{_FORMAT}","identifier":"{self.identifier}",'
            f'"fingerprint":"{self.fingerprint}","checksum":"{self.checksum}"}},'
            f'"{TENSOR_NAME}":{{"dtype":"{self.dtype}","shape":[{shape}],"data_offsets":[0,{self.data_bytes}]}}}}'
        )
        room = HEADER_BYTES - _LENGTH_BYTES
        if len(text) > room:
            raise StorageError(f"A tensor of {len(self.shape)} dimensions does not fit in the header of an entry.")
        return room.to_bytes(_LENGTH_BYTES, "little") + text.encode("ascii").ljust(room)

    @classmethod
    def from_bytes(cls, raw: bytes) -> EntryHeader | None:
        """Return the header that ``to_bytes`` turns into exactly these bytes, or None if there is none."""
        match = _HEADER.search(raw)
        if match is None:
            return None
        identifier, fingerprint, checksum, dtype, shape = (group.decode("ascii") for group in match.groups())
        header = cls(identifier, fingerprint, dtype, tuple(map(int, filter(None, shape.split(",")))), checksum)
        is_possible = dtype in _DTYPES and all(size < _DIMENSION_END for size in header.shape)
        return header if is_possible and header.to_bytes() == raw else None

    def hasher(self) -> xxhash.xxh3_128:
        """Start the checksum: return a hash of the header without its checksum, to be updated with the tensor's bytes."""
        return xxhash.xxh3_128(self._replace(checksum="").to_bytes())


class Known(NamedTuple):
    """A header that has been read and checked, and the file that it is in."""

    signature: Signature
    header: EntryHeader


def data_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor; ``dtype`` is the name in safetensors. Raises KeyError for an unknown one."""
    return math.prod(shape) * _DTYPES[dtype].itemsize


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the tensor's elements in row-major order, without a copy if it is contiguous and on the CPU."""
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cuda":
        staging = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        tensor = staging.copy_(tensor)
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().data


def header_of(identifier: str, fingerprint: str, tensor: torch.Tensor) -> EntryHeader:
    """Return the header for ``tensor``, without its checksum. Raises StorageError if safetensors lacks the dtype."""
    dtype = _DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise StorageError(f"An entry cannot hold {tensor.dtype}; it can hold {', '.join(map(str, _DTYPE_NAMES))}.")
    return EntryHeader(identifier, fingerprint, dtype, tuple(tensor.shape))


def dtype_of(header: EntryHeader) -> torch.dtype:
    return _DTYPES[header.dtype]


def tensor_of(header: EntryHeader, data: torch.Tensor) -> torch.Tensor:
    """Return the embedding with these bytes (uint8), without a copy."""
    return data.view(dtype_of(header)).view(header.shape)


def write_entry(descriptor: int, header: EntryHeader, data: memoryview) -> None:
    """Write the entry to an open file. Raises OSError if not all of it can be written.

    The header is written last, so that the file is not a valid entry before. A large tensor is hashed while it is written,
    since both release the interpreter's lock; for a small one a thread costs more than it saves.
    """
    hasher = header.hasher()
    if len(data) < _LARGE_BYTES:
        hasher.update(data)
        write_whole(descriptor, data, HEADER_BYTES)
    else:
        hashing = threading.Thread(target=hasher.update, args=(data,))
        hashing.start()
        try:
            write_whole(descriptor, data, HEADER_BYTES)
        finally:
            hashing.join()
    write_whole(descriptor, memoryview(header._replace(checksum=hasher.hexdigest()).to_bytes()), 0)


class Entry:
    """The file of one entry, whose length and header have been checked.

    Given as a tensor, the file is mapped copy-on-write: the embedding is the page cache itself, writing to it changes no file,
    and removing the file doesn't affect it. Otherwise the file is kept open, and read into memory when the tensor is needed.
    """

    def __init__(self, known: Known, file: torch.Tensor | OpenFile) -> None:
        self.known = known
        self._file = file

    @property
    def header(self) -> EntryHeader:
        return self.known.header

    def tensor(self) -> torch.Tensor:
        """Return the embedding, on the CPU. Raises OSError if the file is not mapped and can't be read or has changed."""
        return tensor_of(self.header, self._data())

    def copied(self, *, checked: bool) -> Entry | None:
        """Copy the file, which is kept open, to anonymous memory, which nobody else can truncate or change.

        The copy is a file that is kept open, too. Returns None if the checksum is wrong; with ``checked``, it is not computed
        again. Raises OSError.
        """
        assert isinstance(self._file, OpenFile)
        memory = OpenFile(os.memfd_create("chiasm-entry", os.MFD_CLOEXEC))
        hasher = self.header.hasher()
        done = 0
        # Written, not mapped: writing a page costs less than the page fault of touching it first.
        for piece in _pieces(self._file.descriptor, self.known.signature.size_bytes):
            if not checked:
                hasher.update(piece[max(HEADER_BYTES - done, 0) :])
            write_whole(memory.descriptor, piece, done)
            done += len(piece)
        if not checked and hasher.hexdigest() != self.header.checksum:
            return None
        signature = Signature.of(os.fstat(memory.descriptor))
        return Entry(Known(signature, self.header), memory)

    def matches_checksum(self) -> bool:
        """Whether the tensor's bytes are those that were written. Reads all of them. Raises OSError like ``tensor``."""
        hasher = self.header.hasher()
        hasher.update(self._data().numpy().data)
        return hasher.hexdigest() == self.header.checksum

    @property
    def descriptor(self) -> int:
        """That of a file that is kept open, as long as this object lives."""
        assert isinstance(self._file, OpenFile)
        return self._file.descriptor

    def _data(self) -> torch.Tensor:
        if isinstance(self._file, OpenFile):
            self._file = _read(self._file.descriptor, self.known.signature)
        return self._file[HEADER_BYTES:]


class OpenFile:
    """A file descriptor that is closed when the last reference to this object goes away."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def open_entry(path: str, identifier: str, fingerprint: str, known: Known | None, *, mapped: bool) -> Entry:
    """Open the entry at ``path``, and note the use of it unless another was noted within the last second.

    The header is read unless the file is still the one of ``known``. The checksum is left to Entry.matches_checksum. Raises
    FileNotFoundError if there is no file, InvalidEntryError if the file is not this entry, OSError if it cannot be read.
    """
    file = OpenFile(_open(path))
    status = os.fstat(file.descriptor)
    signature = Signature.of(status)
    if known is None or known.signature != signature:
        known = Known(signature, _read_header(file.descriptor, status, identifier, fingerprint))
    _touch(file.descriptor, status)
    return Entry(known, map_file(file.descriptor, signature.size_bytes) if mapped else file)


def _open(path: str) -> int:
    try:
        # O_NONBLOCK: opening a pipe under an entry's name must not block.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            raise
        raise InvalidEntryError("it is not a regular file", Signature.of(status)) from error


def _read_header(descriptor: int, status: os.stat_result, identifier: str, fingerprint: str) -> EntryHeader:
    def invalid(reason: str) -> InvalidEntryError:
        return InvalidEntryError(reason, Signature.of(status))

    if not stat.S_ISREG(status.st_mode):
        raise invalid("it is not a regular file")
    header = EntryHeader.from_bytes(os.pread(descriptor, HEADER_BYTES, 0))
    if header is None:
        raise invalid("it is torn or not an entry")
    if header.identifier != identifier:
        raise invalid("it is the entry of another item")
    if header.fingerprint != fingerprint:
        raise invalid("it is the entry of another model")
    if HEADER_BYTES + header.data_bytes != status.st_size:
        raise invalid("it is torn")
    return header


def _touch(descriptor: int, status: os.stat_result) -> None:
    """Set the access time, which tells the least recently used entries, to now."""
    now = time.time_ns()
    if now - status.st_atime_ns < _TOUCH_INTERVAL_NS:
        return
    try:
        os.utime(descriptor, ns=(now, status.st_mtime_ns))
    except OSError:
        return  # The file of another user, or a read-only mount: its owner keeps the order.


def map_file(descriptor: int, size_bytes: int) -> torch.Tensor:
    """Map a file copy-on-write. Unlike with Python's mmap, no descriptor stays open. Raises OSError."""
    try:
        return torch.from_file(f"/dev/fd/{descriptor}", shared=False, size=size_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"Cannot map {size_bytes} bytes: {error}") from error


def _read(descriptor: int, signature: Signature) -> torch.Tensor:
    """Return the whole file. It is read and not mapped, since truncating a mapped file kills its readers."""
    _check_unchanged(descriptor, signature)
    return read_range(descriptor, 0, signature.size_bytes)


def read_range(descriptor: int, begin: int, num_bytes: int) -> torch.Tensor:
    """Return a copy of a part of a file, uint8 ``[num_bytes]``. Raises OSError if the file is shorter."""
    data = torch.empty(num_bytes, dtype=torch.uint8)
    done = 0
    while done < num_bytes:
        done += _read_into(descriptor, data.numpy().data[done:], begin + done)
    return data


def _pieces(descriptor: int, size_bytes: int) -> Iterator[memoryview]:
    """Yield the file's bytes in pieces, each of which is valid until the next."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    at = 0
    while at < size_bytes:
        read = _read_into(descriptor, buffer[: size_bytes - at], at)
        yield buffer[:read]
        at += read


def _read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read some bytes, and return how many. Raises OSError at the end of the file."""
    read = os.preadv(descriptor, [buffer], offset)
    if read == 0:
        raise OSError(errno.ESTALE, "The file has become shorter")
    return read


def _check_unchanged(descriptor: int, signature: Signature) -> None:
    if Signature.of(os.fstat(descriptor)) != signature:
        raise OSError(errno.ESTALE, "The file has changed")
