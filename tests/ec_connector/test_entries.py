"""An entry is loaded as it was saved, without a copy, and any safetensors reader can read its file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from chiasm.ec_transfer import ECTransferRole
from chiasm.ec_transfer.entry_file import EntryHeader, bytes_of, header_of, open_entry
from chiasm.errors import StorageError

from .instance import Instance, Request, config_for, embedding_of, entry_path, identifier_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool]


def stored_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(bytes_of(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_dtype_and_bytes_are_kept(encoder: Instance, pd: Instance, dtype: torch.dtype) -> None:
    embedding = embedding_of("a", rows=37, columns=3 * 48, dtype=dtype)
    loaded = pd.load(encoder.encode("a", embedding))
    assert loaded is not None
    assert (loaded.shape, loaded.dtype, loaded.device) == (embedding.shape, embedding.dtype, embedding.device)
    assert stored_bytes(loaded) == stored_bytes(embedding)
    assert loaded.is_contiguous()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 9), max_size=4), dtype=st.sampled_from(DTYPES))
def test_any_shape_is_kept(encoder: Instance, pd: Instance, shape: list[int], dtype: torch.dtype) -> None:
    embedding = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    loaded = pd.load(encoder.encode((tuple(shape), dtype), embedding))
    assert loaded is not None
    assert (loaded.shape, loaded.dtype) == (embedding.shape, dtype)
    assert stored_bytes(loaded) == stored_bytes(embedding)


def test_a_large_tensor_is_kept(encoder: Instance, pd: Instance) -> None:
    embedding = torch.arange(10_000_000, dtype=torch.int32).view(1000, -1)
    loaded = pd.load(encoder.encode("a", embedding))
    assert loaded is not None
    assert torch.equal(loaded, embedding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu_is_loaded_to_a_gpu(folder: Path) -> None:
    gpu = Instance(config_for(folder, device="cuda:0"))
    loaded = gpu.load(gpu.encode("a", embedding_of("a").cuda()))
    assert loaded is not None
    assert loaded.device == torch.device("cuda:0")
    assert torch.equal(loaded.cpu(), embedding_of("a"))


def test_the_bits_of_nan_are_kept(encoder: Instance, pd: Instance) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(256, 256)
    loaded = pd.load(encoder.encode("a", patterns.view(torch.bfloat16)))
    assert loaded is not None
    assert torch.equal(loaded.view(torch.int16), patterns)


def test_a_view_that_is_not_contiguous_is_saved(encoder: Instance, pd: Instance) -> None:
    transposed = embedding_of("a", rows=8, columns=16).T[3:]
    loaded = pd.load(encoder.encode("a", transposed))
    assert loaded is not None
    assert torch.equal(loaded, transposed)


def test_a_tensor_that_requires_grad_is_saved(encoder: Instance, pd: Instance) -> None:
    embedding = embedding_of("a", dtype=torch.float32).requires_grad_()
    loaded = pd.load(encoder.encode("a", embedding))
    assert loaded is not None
    assert torch.equal(loaded, embedding.detach())


def test_a_contiguous_tensor_is_not_copied() -> None:
    embedding = embedding_of("a")
    data = bytes_of(embedding)
    embedding.fill_(3)
    assert bytes(data) == stored_bytes(torch.full_like(embedding, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_safetensors_reader_can_read_the_file(encoder: Instance, folder: Path, dtype: torch.dtype) -> None:
    embedding = embedding_of("a", dtype=dtype)
    path = entry_path(folder, encoder.encode("a", embedding))
    tensors = load_file(path)
    assert list(tensors) == ["ec_cache"]
    assert tensors["ec_cache"].dtype is dtype
    assert stored_bytes(tensors["ec_cache"]) == stored_bytes(embedding)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["identifier"] == identifier_of("a")
        assert file.metadata()["fingerprint"] == "5eed"


def test_a_loaded_tensor_is_the_mapped_file(encoder: Instance, pd: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pd.load(identifier)
    assert loaded is not None
    assert loaded.data_ptr() % 4096 == 0
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        assert str(entry_path(folder, identifier)) in maps.read()


def test_an_entry_does_not_keep_a_small_disk_full_when_it_is_evicted(folder: Path, encoder: Instance) -> None:
    """A file that is mapped takes room although it is removed; so where there is little, it is copied."""
    space = os.statvfs(folder)
    pd = Instance(config_for(folder, ECTransferRole.CONSUMER, max_bytes=3 * space.f_blocks * space.f_frsize))
    identifier = encoder.encode("a")
    loaded = pd.load(identifier)
    pd.step(Request(()))
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a"))
    assert str(entry_path(folder, identifier)) not in Path("/proc/self/maps").read_text(errors="replace")


def test_a_loaded_tensor_keeps_no_file_open(encoder: Instance, pd: Instance) -> None:
    identifier = encoder.encode("a")
    before = len(os.listdir("/proc/self/fd"))
    loaded = pd.load(identifier)
    assert len(os.listdir("/proc/self/fd")) == before
    assert loaded is not None


def test_writing_to_a_loaded_tensor_does_not_change_the_file(encoder: Instance, pd: Instance) -> None:
    identifier = encoder.encode("a")
    loaded = pd.load(identifier)
    assert loaded is not None
    loaded.zero_()
    again = pd.load(identifier)
    assert again is not None
    assert torch.equal(again, embedding_of("a"))


def test_a_dtype_that_safetensors_lacks_is_refused(encoder: Instance) -> None:
    with pytest.raises(StorageError, match="complex64"):
        encoder.encode("a", torch.zeros(2, 2, dtype=torch.complex64))
    assert encoder.worker.stats.save_failures == 1


def test_a_shape_that_is_too_long_for_the_header_is_refused(encoder: Instance, folder: Path) -> None:
    with pytest.raises(StorageError, match="dimensions"):
        encoder.encode("a", torch.zeros([1] * 3000))
    assert not [name for name in os.listdir(folder) if name.endswith(("tmp", "safetensors"))]


def test_entries_are_private_to_their_owner(encoder: Instance, folder: Path) -> None:
    path = entry_path(folder, encoder.encode("a"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_stats_count_entries_bytes_and_seconds(encoder: Instance, pd: Instance) -> None:
    identifier = encoder.encode("a")
    encoder.worker.save_caches(encoder.encoder_cache, identifier)  # exists already
    pd.load(identifier)
    saved, loaded = encoder.worker.stats, pd.worker.stats
    assert (saved.saves, saved.saved_bytes) == (1, embedding_of("a").nbytes)
    assert (loaded.loads, loaded.loaded_bytes) == (1, embedding_of("a").nbytes)
    assert saved.save_seconds > 0
    assert loaded.load_seconds > 0


# ---- where files are not mapped ------------------------------------------------------------------------------------


def test_an_entry_that_is_not_mapped_is_read_into_memory(encoder: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    path = entry_path(folder, identifier)
    entry = open_entry(str(path), identifier, "5eed", None, mapped=False)
    assert entry.matches_checksum()
    path.unlink()
    assert torch.equal(entry.tensor(), embedding_of("a"))


def test_an_entry_that_is_not_mapped_is_lost_if_its_file_changes(encoder: Instance, folder: Path) -> None:
    identifier = encoder.encode("a")
    path = entry_path(folder, identifier)
    entry = open_entry(str(path), identifier, "5eed", None, mapped=False)
    os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match="The file has changed"):
        entry.tensor()


# ---- the header ----------------------------------------------------------------------------------------------------


def test_a_header_is_read_as_it_was_written() -> None:
    header = header_of(identifier_of("a"), "5eed", embedding_of("a"))._replace(checksum="0" * 32)
    assert EntryHeader.from_bytes(header.to_bytes()) == header


@given(st.data())
def test_a_changed_header_is_never_read_as_the_original(data: st.DataObject) -> None:
    header = header_of(identifier_of("a"), "5eed", embedding_of("a"))._replace(checksum="0" * 32)
    raw = bytearray(header.to_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] = data.draw(st.integers(0, 255).filter(lambda value: value != raw[place]))
    read = EntryHeader.from_bytes(bytes(raw))
    assert read is None or (read != header and read.to_bytes() == raw)


@given(st.binary(max_size=5000))
def test_arbitrary_bytes_are_not_a_header(raw: bytes) -> None:
    assert EntryHeader.from_bytes(raw) is None
