"""The file of one entry: a safetensors file that says what it holds and can be told from a torn or foreign one.

The first 4096 bytes are the safetensors header: an 8-byte length and JSON, padded with spaces. The tensor's bytes follow,
so they begin on a page of their own, and any safetensors reader finds them as the tensor ``ec_cache``. The JSON's
``__metadata__`` carries the format's version, the identifier, the fingerprint and a checksum.

The checksum (XXH3, 128 bits) covers every byte of the tensor and the rest of the header. It is there for files that a
crash, a lost page or another program left; it is no signature, and who may write into the folder may forge it.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import xxhash

from chiasm.errors import StorageError

HEADER_BYTES = 4096
TENSOR_NAME = "ec_cache"

_FORMAT = "chiasm.ec/1"
_LENGTH_BYTES = 8
_LARGE_BYTES = 32 << 20
_PIECE_BYTES = 1 << 20
_TOUCH_INTERVAL_NS = 10**9
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
    rb'"identifier":"([0-9a-f]{64})","fingerprint":"([0-9a-f]*)","checksum":"([0-9a-f]{32})"\},'
    rb'"ec_cache":\{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]{0,999})\]'
)
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Signature(NamedTuple):
    """What tells one file from the next under the same path, and from itself after a change."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class InvalidEntryError(Exception):
    """A file stands where an entry should, and is none: torn, foreign, or of another model."""

    def __init__(self, reason: str, signature: Signature) -> None:
        super().__init__(reason)
        self.signature = signature


class EntryHeader(NamedTuple):
    """What an entry's file says of itself. ``dtype`` is the name that safetensors uses, ``checksum`` 32 hex digits."""

    identifier: str
    fingerprint: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str = ""

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    def to_bytes(self) -> bytes:
        """The first 4096 bytes of the file. Raises StorageError for a shape too long to be written there."""
        shape = ",".join(map(str, self.shape))
        text = (
            f'{{"__metadata__":{{"format":"{_FORMAT}","identifier":"{self.identifier}",'
            f'"fingerprint":"{self.fingerprint}","checksum":"{self.checksum}"}},'
            f'"{TENSOR_NAME}":{{"dtype":"{self.dtype}","shape":[{shape}],"data_offsets":[0,{self.data_bytes}]}}}}'
        )
        room = HEADER_BYTES - _LENGTH_BYTES
        if len(text) > room:
            raise StorageError(f"a tensor of {len(self.shape)} dimensions does not fit into the header of an entry")
        return room.to_bytes(_LENGTH_BYTES, "little") + text.encode("ascii").ljust(room)

    @classmethod
    def from_bytes(cls, raw: bytes) -> EntryHeader | None:
        """The header that ``to_bytes`` writes as exactly these bytes, or None if there is none."""
        match = _HEADER.search(raw)
        if match is None:
            return None
        identifier, fingerprint, checksum, dtype, shape = (group.decode("ascii") for group in match.groups())
        header = cls(identifier, fingerprint, dtype, tuple(map(int, filter(None, shape.split(",")))), checksum)
        return header if dtype in _DTYPES and header.to_bytes() == raw else None

    def hasher(self) -> xxhash.xxh3_128:
        """A hash that has taken in all of the header but the checksum, and now wants the tensor's bytes."""
        return xxhash.xxh3_128(self._replace(checksum="").to_bytes())


class Known(NamedTuple):
    """A header that was read and checked, and the file that it stands in."""

    signature: Signature
    header: EntryHeader


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in row-major order; its own memory if it is contiguous and on the CPU."""
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cuda":
        staging = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        tensor = staging.copy_(tensor)
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().data


def header_of(identifier: str, fingerprint: str, tensor: torch.Tensor) -> EntryHeader:
    """The header, without its checksum, of an entry that holds ``tensor``. Raises StorageError for its dtype."""
    dtype = _DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise StorageError(f"an entry cannot hold {tensor.dtype}; it can hold {', '.join(map(str, _DTYPE_NAMES))}")
    return EntryHeader(identifier, fingerprint, dtype, tuple(tensor.shape))


def dtype_of(header: EntryHeader) -> torch.dtype:
    return _DTYPES[header.dtype]


def write_entry(descriptor: int, header: EntryHeader, data: memoryview) -> None:
    """Fill an open file with the entry. Raises OSError when the disk does not take all of it.

    The header comes last: until then the file is no entry. A large tensor is hashed while it is written, since both run
    outside the interpreter's lock; for a small one a thread costs more than it saves.
    """
    hasher = header.hasher()
    if len(data) < _LARGE_BYTES:
        hasher.update(data)
        _write_all(descriptor, data, HEADER_BYTES)
    else:
        hashing = threading.Thread(target=hasher.update, args=(data,))
        hashing.start()
        try:
            _write_all(descriptor, data, HEADER_BYTES)
        finally:
            hashing.join()
    _write_all(descriptor, memoryview(header._replace(checksum=hasher.hexdigest()).to_bytes()), 0)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class Pin(NamedTuple):
    """Where another process finds the copy that a scheduler role keeps, whatever becomes of the file."""

    process: int
    descriptor: int
    known: Known

    @property
    def path(self) -> str:
        return f"/proc/{self.process}/fd/{self.descriptor}"


class Entry:
    """The file of one entry, found to be whole in length and to be what was asked for.

    With ``mapped`` its pages are mapped copy-on-write: the tensor is the page cache itself, writing to it changes no
    file, and removing the file leaves it as it is. Without, the file is read into memory when the tensor is asked for,
    through ``file`` if the entry keeps it open, else through its path.
    """

    def __init__(self, path: str, known: Known, mapping: torch.Tensor | None, file: OpenFile | None = None) -> None:
        self.known = known
        self._path = path
        self._mapping = mapping
        self._file = file

    @property
    def header(self) -> EntryHeader:
        return self.known.header

    def tensor(self) -> torch.Tensor:
        """The embedding, on the CPU. Raises OSError when a file that is not mapped cannot be read any more."""
        return self._data().view(dtype_of(self.header)).view(self.header.shape)

    def copied(self, *, checked: bool) -> Entry | None:
        """The same entry in memory that has no name, so that nobody cuts it off or changes it; ``pin`` says where.

        None if the checksum turns out to be wrong; it is not looked at again if it has been ``checked`` before. For an
        entry that keeps its file open. Raises OSError.
        """
        assert self._file is not None
        memory = OpenFile(os.memfd_create("chiasm-entry", os.MFD_CLOEXEC))
        hasher = self.header.hasher()
        done = 0
        # Written, not mapped: a page that is written costs less than one that is touched first.
        for piece in _pieces(self._file.descriptor, 0, self.known.signature.size_bytes):
            if not checked:
                hasher.update(piece[max(HEADER_BYTES - done, 0) :])
            _write_all(memory.descriptor, piece, done)
            done += len(piece)
        if not checked and hasher.hexdigest() != self.header.checksum:
            return None
        signature = Signature.of(os.fstat(memory.descriptor))
        return Entry(self._path, Known(signature, self.header), None, memory)

    def matches_checksum(self) -> bool:
        """Whether the tensor's bytes are those that were written; reads all of them. Raises OSError as ``tensor``."""
        hasher = self.header.hasher()
        if self._file is None:
            hasher.update(self._data().numpy().data)
        else:
            for piece in _pieces(self._file.descriptor, HEADER_BYTES, self.known.signature.size_bytes):
                hasher.update(piece)
        return hasher.hexdigest() == self.header.checksum

    def pin(self) -> Pin | None:
        """What another process opens it by as long as this object lives; None if it does not keep its file open."""
        return None if self._file is None else Pin(os.getpid(), self._file.descriptor, self.known)

    def _data(self) -> torch.Tensor:
        if self._mapping is None:
            signature = self.known.signature
            self._mapping = _read_again(self._path, signature) if self._file is None else _read(self._file, signature)
        return self._mapping[HEADER_BYTES:]


class OpenFile:
    """A descriptor that is closed with the last reference to this object."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def open_entry(
    path: str, identifier: str, fingerprint: str, known: Known | None, *, mapped: bool, kept_open: bool = False
) -> Entry:
    """Open the entry at ``path``, and count that as a use of it unless there was another within the last second.

    The header is not read again when the file is still the one of ``known``. The checksum is not looked at: see
    Entry.matches_checksum. Raises FileNotFoundError when there is no file, InvalidEntryError when it is no such entry.
    """
    file = OpenFile(_open(path))
    status = os.fstat(file.descriptor)
    signature = Signature.of(status)
    if known is None or known.signature != signature:
        known = Known(signature, _read_header(file.descriptor, status, identifier, fingerprint))
    _touch(file.descriptor, status)
    mapping = _map(file.descriptor, signature.size_bytes) if mapped else None
    return Entry(path, known, mapping, file if kept_open else None)


def open_pinned(pin: Pin) -> Entry:
    """The copy that another process keeps, mapped. Raises OSError when that has let go of it, or is on another host."""
    file = OpenFile(os.open(pin.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    signature = Signature.of(os.fstat(file.descriptor))
    if signature != pin.known.signature:
        raise OSError(errno.ESTALE, "another file has taken its place", pin.path)
    return Entry(pin.path, pin.known, _map(file.descriptor, signature.size_bytes))


def _open(path: str) -> int:
    try:
        # O_NONBLOCK: a pipe under an entry's name must not make anyone wait.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            raise
        raise InvalidEntryError("not a regular file", Signature.of(status)) from error


def _read_header(descriptor: int, status: os.stat_result, identifier: str, fingerprint: str) -> EntryHeader:
    def invalid(reason: str) -> InvalidEntryError:
        return InvalidEntryError(reason, Signature.of(status))

    if not stat.S_ISREG(status.st_mode):
        raise invalid("not a regular file")
    header = EntryHeader.from_bytes(os.pread(descriptor, HEADER_BYTES, 0))
    if header is None:
        raise invalid("not an entry's file, or torn")
    if header.identifier != identifier:
        raise invalid("the entry of another item")
    if header.fingerprint != fingerprint:
        raise invalid("the entry of another model")
    if HEADER_BYTES + header.data_bytes != status.st_size:
        raise invalid("torn")
    return header


def _touch(descriptor: int, status: os.stat_result) -> None:
    """Move the access time, by which the least recently used entry is known, to now."""
    now = time.time_ns()
    if now - status.st_atime_ns < _TOUCH_INTERVAL_NS:
        return
    try:
        os.utime(descriptor, ns=(now, status.st_mtime_ns))
    except OSError:
        return  # Another user's file or a read-only mount: its owner keeps the order.


def _map(descriptor: int, size_bytes: int) -> torch.Tensor:
    """Map the file copy-on-write. Unlike Python's mmap, what this returns keeps no descriptor open."""
    try:
        return torch.from_file(f"/dev/fd/{descriptor}", shared=False, size=size_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"cannot map {size_bytes} bytes: {error}") from error


def _read_again(path: str, signature: Signature) -> torch.Tensor:
    file = OpenFile(_open(path))
    if Signature.of(os.fstat(file.descriptor)) != signature:
        raise OSError(errno.ESTALE, "another file has taken its place", path)
    return _read(file, signature)


def _read(file: OpenFile, signature: Signature) -> torch.Tensor:
    """The whole file. Not mapped: whoever cuts off a file under its readers must not kill them."""
    data = torch.empty(signature.size_bytes, dtype=torch.uint8)
    left = data.numpy().data
    while left:
        read = os.preadv(file.descriptor, [left], signature.size_bytes - len(left))
        if read == 0:
            raise OSError(errno.ESTALE, "the file has become shorter")
        left = left[read:]
    return data


def _pieces(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    """The file's bytes, each piece valid until the next is asked for."""
    buffer = memoryview(bytearray(min(_PIECE_BYTES, max(end - begin, 0))))
    while begin < end:
        read = os.preadv(descriptor, [buffer[: end - begin]], begin)
        if read == 0:
            raise OSError(errno.ESTALE, "the file has become shorter")
        yield buffer[:read]
        begin += read
