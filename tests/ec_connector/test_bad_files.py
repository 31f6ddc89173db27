"""A file that is torn, foreign or of another model is treated as missing, counted and removed, and affects nobody else."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from chiasm.ec_transfer import ECConnectorMetadata, ECTransferRole
from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader

from .instance import Instance, Item, Request, config_for, embedding_of, entry_path, identifier_of

ROWS = 40  # two and a half pages


@pytest.fixture
def identifier(encoder: Instance) -> str:
    return encoder.encode("a", embedding_of("a", ROWS, 128))


def corrupt_entries(pd: Instance) -> int:
    return pd.scheduler.stats.corrupt_entries + pd.worker.stats.corrupt_entries


def assert_treated_as_missing(pd: Instance, folder: Path, identifier: str) -> None:
    """Assert that the step goes on without the entry, that the file is counted and removed, and that it can be replaced."""
    assert pd.load(identifier) is None
    assert not pd.scheduler.has_cache_item(identifier)
    assert not entry_path(folder, identifier).exists()
    assert corrupt_entries(pd) == 1

    encoder = Instance(config_for(folder, ECTransferRole.PRODUCER))
    encoder.encoder_cache[identifier] = embedding_of("again")
    encoder.worker.save_caches(encoder.encoder_cache, identifier)
    loaded = pd.load(identifier)
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("again"))


def rewrite(path: Path, change: Callable[[bytearray], None]) -> None:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


def zero(raw: bytearray, start: int, stop: int) -> None:
    raw[start:stop] = bytes(stop - start)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda raw: raw.clear(), id="empty"),
        pytest.param(lambda raw: zero(raw, 0, len(raw)), id="all zeros"),
        pytest.param(lambda raw: zero(raw, 0, HEADER_BYTES), id="header lost"),
        pytest.param(lambda raw: zero(raw, HEADER_BYTES, len(raw)), id="data lost"),
        pytest.param(lambda raw: zero(raw, 2 * HEADER_BYTES, 3 * HEADER_BYTES), id="page lost"),
        pytest.param(lambda raw: raw.__setitem__(-1, raw[-1] ^ 1), id="last bit flipped"),
        pytest.param(
            lambda raw: raw.__setitem__(HEADER_BYTES + 4321, raw[HEADER_BYTES + 4321] ^ 128), id="bit flipped"
        ),
        pytest.param(lambda raw: raw.extend(bytes(1)), id="too long"),
        pytest.param(lambda raw: raw.__delitem__(slice(-1, None)), id="too short"),
        pytest.param(lambda raw: raw.__delitem__(slice(100, None)), id="header torn"),
        pytest.param(lambda raw: raw.__setitem__(slice(0, 8), b"\xff" * 8), id="absurd header length"),
        pytest.param(lambda raw: raw.__setitem__(slice(None), raw.replace(b"[40,128]", b"[80,064]")), id="other shape"),
        pytest.param(lambda raw: raw.__setitem__(slice(None), raw.replace(b"[40,128]", b"[128,40]")), id="turned"),
        pytest.param(lambda raw: raw.__setitem__(slice(None), raw.replace(b'"BF16"', b'"I16" ')), id="other dtype"),
        pytest.param(
            lambda raw: raw.__setitem__(slice(None), raw.replace(b"chiasm.ec/1", b"chiasm.ec/2")), id="version"
        ),
        pytest.param(lambda raw: raw.__setitem__(slice(None), raw.replace(b'"5eed"', b'"0ddd"')), id="other model"),
    ],
)
def test_a_damaged_file_is_treated_as_missing(
    pd: Instance, folder: Path, identifier: str, change: Callable[[bytearray], None]
) -> None:
    rewrite(entry_path(folder, identifier), change)
    assert_treated_as_missing(pd, folder, identifier)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_file_is_removed(encoder: Instance, pd: Instance, folder: Path, data: st.DataObject) -> None:
    identifier = identifier_of("a")
    encoder.encode("a")
    path = entry_path(folder, identifier)
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    assert not pd.scheduler.has_cache_item(identifier)
    assert not path.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_one_changed_byte_is_removed(
    encoder: Instance, pd: Instance, folder: Path, data: st.DataObject
) -> None:
    identifier = encoder.encode("a")
    path = entry_path(folder, identifier)
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    rewrite(path, lambda raw: raw.__setitem__(place, raw[place] ^ data.draw(st.integers(1, 255))))
    assert pd.load(identifier) is None
    assert not path.exists()


def test_the_entry_of_another_item_is_removed(encoder: Instance, pd: Instance, folder: Path, identifier: str) -> None:
    other = encoder.encode("b")
    os.replace(entry_path(folder, other), entry_path(folder, identifier))
    assert_treated_as_missing(pd, folder, identifier)


def test_a_safetensors_file_of_another_program_is_removed(pd: Instance, folder: Path, identifier: str) -> None:
    save_file({"ec_cache": embedding_of("a", ROWS, 128)}, entry_path(folder, identifier))
    assert_treated_as_missing(pd, folder, identifier)


def test_an_entry_of_another_model_is_removed(pd: Instance, folder: Path) -> None:
    other_model = replace(config_for(folder, ECTransferRole.PRODUCER), fingerprint="0ddd")
    assert_treated_as_missing(pd, folder, Instance(other_model).encode("b"))


def test_a_header_that_would_be_too_long_if_it_were_written_here_is_removed(
    pd: Instance, folder: Path, identifier: str
) -> None:
    header = EntryHeader(identifier, "a" * 2500, "BF16", (0,), checksum="0" * 32).to_bytes()
    text = header[8:].rstrip().replace(b"[0]", b"[" + b"9," * 499 + b"9]")
    entry_path(folder, identifier).write_bytes(header[:8] + text.ljust(HEADER_BYTES - 8))
    assert_treated_as_missing(pd, folder, identifier)


def test_a_shape_that_no_tensor_can_have_is_removed(pd: Instance, folder: Path, identifier: str) -> None:
    header = EntryHeader(identifier, "5eed", "BF16", (0, 10**30))
    header = header._replace(checksum=header.hasher().hexdigest())
    entry_path(folder, identifier).write_bytes(header.to_bytes())
    assert_treated_as_missing(pd, folder, identifier)


def test_a_pipe_is_removed_without_waiting(pd: Instance, folder: Path, identifier: str) -> None:
    entry_path(folder, identifier).unlink()
    os.mkfifo(entry_path(folder, identifier))
    assert_treated_as_missing(pd, folder, identifier)


def test_a_symbolic_link_is_not_followed(encoder: Instance, pd: Instance, folder: Path, identifier: str) -> None:
    path = entry_path(folder, identifier)
    target = path.rename(folder.parent / "elsewhere")
    path.symlink_to(target)
    assert_treated_as_missing(pd, folder, identifier)
    assert target.exists()


def test_a_folder_at_the_path_of_an_entry_is_left_alone(pd: Instance, folder: Path) -> None:
    identifier = identifier_of("a")
    entry_path(folder, identifier).mkdir()
    assert not pd.scheduler.has_cache_item(identifier)
    assert not pd.scheduler.has_cache_item(identifier)
    assert entry_path(folder, identifier).is_dir()
    assert corrupt_entries(pd) == 1


def test_a_damaged_item_does_not_affect_others_of_the_step(
    encoder: Instance, pd: Instance, folder: Path, identifier: str
) -> None:
    other = encoder.encode("b")
    rewrite(entry_path(folder, identifier), lambda raw: zero(raw, HEADER_BYTES, len(raw)))
    pd.step(Request((Item(identifier), Item(other))))
    assert list(pd.encoder_cache) == [other]
    assert (pd.worker.stats.loads, pd.worker.stats.load_failures) == (1, 1)


def test_damage_between_probe_and_load_in_another_process_is_noticed(
    pd: Instance, folder: Path, identifier: str
) -> None:
    assert pd.schedule(Request((Item(identifier),))).loads == (identifier,)
    rewrite(entry_path(folder, identifier), lambda raw: zero(raw, 0, len(raw)))
    pd.execute(ECConnectorMetadata((identifier,)))
    assert pd.encoder_cache == {}
    assert pd.worker.stats.corrupt_entries == 1


def test_damage_after_a_good_load_is_noticed(pd: Instance, folder: Path, identifier: str) -> None:
    assert pd.load(identifier) is not None
    rewrite(entry_path(folder, identifier), lambda raw: zero(raw, 2 * HEADER_BYTES, 3 * HEADER_BYTES))
    assert_treated_as_missing(pd, folder, identifier)


def test_a_good_file_that_has_replaced_the_bad_one_is_not_removed(
    encoder: Instance, pd: Instance, folder: Path, identifier: str
) -> None:
    path = entry_path(folder, identifier)
    rewrite(path, lambda raw: zero(raw, HEADER_BYTES, len(raw)))
    metadata = pd.schedule(Request((Item(identifier),)))  # holds the bad file
    path.unlink()
    encoder.worker.save_caches(encoder.encoder_cache, identifier)
    pd.execute(metadata)
    assert identifier not in pd.encoder_cache
    assert pd.load(identifier) is not None


@pytest.mark.usefixtures("ordinary_user")
def test_a_bad_file_that_cannot_be_removed_is_counted_once(pd: Instance, folder: Path, identifier: str) -> None:
    rewrite(entry_path(folder, identifier), lambda raw: raw.clear())
    folder.chmod(0o500)
    try:
        assert not pd.scheduler.has_cache_item(identifier)
        assert not pd.scheduler.has_cache_item(identifier)
    finally:
        folder.chmod(0o700)
    assert corrupt_entries(pd) == 1


def test_a_probe_of_a_bad_file_does_not_wait_for_the_lock(pd: Instance, folder: Path, identifier: str) -> None:
    path = entry_path(folder, identifier)
    rewrite(path, lambda raw: raw.clear())
    with (folder / ".usage").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not pd.scheduler.has_cache_item(identifier)
        assert path.exists()
    assert not pd.scheduler.has_cache_item(identifier)
    assert not path.exists()
    assert corrupt_entries(pd) == 1


def test_an_encoder_finds_no_damaged_entry_and_publishes_over_it(
    encoder: Instance, folder: Path, identifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(entry_path(folder, identifier), lambda raw: zero(raw, 2 * HEADER_BYTES, 3 * HEADER_BYTES))
    other = Instance(config_for(folder, ECTransferRole.PRODUCER))
    monkeypatch.setattr(os, "unlink", lambda path: None)  # as if the file belonged to another user
    assert not other.scheduler.has_cache_item(identifier)
    monkeypatch.undo()
    other.encoder_cache[identifier] = embedding_of("a", ROWS, 128)
    other.worker.save_caches(other.encoder_cache, identifier)
    assert other.scheduler.has_cache_item(identifier)
    loaded = Instance(config_for(folder, ECTransferRole.CONSUMER)).load(identifier)
    assert loaded is not None
    assert torch.equal(loaded, embedding_of("a", ROWS, 128))


def test_what_a_reader_cannot_use_is_removed(pd: Instance, folder: Path, identifier: str) -> None:
    assert pd.load(identifier) is not None
    pd.worker.discard(identifier, "its shape is wrong")
    assert not entry_path(folder, identifier).exists()
    assert corrupt_entries(pd) == 1
    pd.worker.discard(identifier, "its shape is wrong")
    assert corrupt_entries(pd) == 1
