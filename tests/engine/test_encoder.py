"""The encoder engine: what it publishes, how often, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from chiasm.engine import device
from chiasm.engine.core_sharing import CoreShare, Worker
from chiasm.engine.request import EncodeItem, ItemOutcome
from chiasm.errors import (
    Code,
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    MediaError,
    StorageError,
)
from chiasm.models.base import Pixels
from chiasm.models.checkpoint import stored_bytes
from tests.engine.conftest import A, B, Encoder, StartEncoder, entries, sample_image, until
from tests.launch.waiting import eventually


async def test_an_encoded_item_is_in_the_store_with_one_row_per_placeholder(encoder: Encoder, store: Path) -> None:
    (item,) = await encoder.encode(A)
    assert item.outcome is ItemOutcome.ENCODED
    assert item.encode_seconds > 0
    (file,) = entries(store)
    geometry = encoder.engine.processor.geometry_of_metadata(item.metadata)
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("ec_cache").shape[0] == len(geometry.rows)


def test_an_encoder_needs_memory_for_the_vision_tower_alone(
    encoders: StartEncoder, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "free_memory", lambda: stored_bytes(checkpoint, "vision"))
    encoders()
    with pytest.raises(ConfigurationError, match="memory is free"):
        device.check_memory(checkpoint, torch.device("cpu"))


async def test_an_item_in_the_store_is_not_encoded_again(encoder: Encoder) -> None:
    await encoder.encode(A)
    (again,) = await encoder.encode(A)
    assert again.outcome is ItemOutcome.HIT
    assert encoder.engine.stats().images_encoded == 1


async def test_ten_identical_images_at_once_are_encoded_once(encoder: Encoder) -> None:
    results = await asyncio.gather(*[encoder.encode(A) for _ in range(10)])
    assert encoder.engine.stats().images_encoded == 1
    assert {result[0].identifier for result in results} == {results[0][0].identifier}


async def test_an_encoder_keeps_its_cores_while_images_wait(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded_at_rest: list[int] = []
    compute, rest, encoded = encoder.engine._compute, Worker.rest, []

    def noted_compute(pixels: Pixels) -> Tensor:
        encoded.append(pixels)
        return compute(pixels)

    def noted_rest(worker: Worker) -> None:
        encoded_at_rest.append(len(encoded))
        rest(worker)

    monkeypatch.setattr(encoder.engine, "_compute", noted_compute)
    monkeypatch.setattr(Worker, "rest", noted_rest)
    await encoder.encode(A, B)
    assert set(encoded_at_rest) == {2}


async def test_an_encoder_leaves_its_cores_if_the_image_that_waits_is_broken(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bool] = []
    decode, released, show = encoder.engine._decoder.decode, asyncio.Event(), CoreShare.show

    async def late(data: bytes, *args: Any) -> Any:
        if data != A.data:
            await released.wait()
        return await decode(data, *args)

    def noted_show(share: CoreShare, slot: int, now: int, *, ended: bool = False, **how: bool) -> None:
        shown.append(ended)
        show(share, slot, now, ended=ended, **how)

    monkeypatch.setattr(encoder.engine._decoder, "decode", late)
    monkeypatch.setattr(CoreShare, "show", noted_show)
    broken = asyncio.create_task(encoder.encode(replace(A, data=A.data[: len(A.data) // 2])))
    await until(lambda: len(encoder.engine._in_flight) == 1)
    await encoder.encode(A)
    assert not shown[-1]
    released.set()
    with pytest.raises(MediaError):
        await broken
    assert shown[-1]


async def test_results_are_in_the_order_of_the_items(encoder: Encoder) -> None:
    items = await encoder.encode(A, B, A)
    assert items[0].identifier == items[2].identifier != items[1].identifier
    assert items[0].metadata != items[1].metadata


async def test_an_embedding_does_not_depend_on_its_neighbours(encoder: Encoder, store: Path) -> None:
    await asyncio.gather(encoder.encode(A), encoder.encode(B))
    together = {file.name: file.read_bytes() for file in entries(store)}
    for file in entries(store):
        file.unlink()
    await encoder.encode(B)
    await encoder.encode(A)
    assert {file.name: file.read_bytes() for file in entries(store)} == together


@pytest.mark.parametrize("data", [b"", b"not an image", A.data[:60], A.data[: len(A.data) // 2]])
async def test_a_broken_image_is_refused_and_the_next_one_is_encoded(encoder: Encoder, data: bytes) -> None:
    with pytest.raises(MediaError):
        await encoder.engine.encode("bad", [EncodeItem("f" * 64, data, 96, 96)], time.monotonic() + 10)
    (item,) = await encoder.encode(A)
    assert item.outcome is ItemOutcome.ENCODED


async def test_the_engine_asserts_that_the_server_has_limited_the_items(encoder: Encoder) -> None:
    with pytest.raises(AssertionError):
        await encoder.encode(*[A] * 17)


async def test_a_deadline_that_passed_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(DeadlineExceededError):
        await encoder.engine.encode("late", [EncodeItem("e" * 64, A.data, 96, 96)], time.monotonic())


async def test_an_embedding_that_cannot_be_published_is_an_error_and_the_next_one_is_published(
    encoder: Encoder, store: Path
) -> None:
    await encoder.encode(A)
    for file in entries(store):
        file.unlink()
    moved = shutil.move(store, store.with_name("moved"))
    os.mknod(store)  # a file where the folder was
    with pytest.raises(StorageError):
        await encoder.encode(A)
    os.unlink(store)
    shutil.move(moved, store)
    assert (await encoder.encode(A))[0].outcome is ItemOutcome.ENCODED


async def test_a_damaged_entry_is_encoded_again(encoder: Encoder, store: Path) -> None:
    await encoder.encode(A)
    (file,) = entries(store)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + bytes(100))
    assert (await encoder.encode(A))[0].outcome is ItemOutcome.ENCODED
    assert file.read_bytes() == whole


async def test_what_an_encoder_has_lost_comes_back_from_the_shared_cache(
    encoders: StartEncoder, store: Path, tmp_path: Path
) -> None:
    encoder = encoders(cache=f"file://{tmp_path}/cache")
    (item,) = await encoder.encode(A)
    (file,) = entries(store)
    whole = file.read_bytes()
    while item.outcome is not ItemOutcome.HIT:  # it is written behind, and the cache may answer too late
        file.unlink()
        (item,) = await encoder.encode(A)
    assert file.read_bytes() == whole


async def test_an_image_whose_embedding_the_store_can_never_hold_is_refused_by_name(
    encoder: Encoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was measured at start would not fit either, so the limit must change after it.
    monkeypatch.setattr(type(encoder.engine._ec_worker), "max_entry_bytes", 40 << 10)
    with pytest.raises(InvalidRequestError, match="--ec-max-bytes") as caught:
        await encoder.encode(A, sample_image(1, 256, 256))
    assert caught.value.code == Code.EMBEDDING_TOO_LARGE
    assert "An image was refused." in caplog.text
    assert (await encoder.encode(A))[0].outcome is ItemOutcome.ENCODED


async def test_a_store_that_can_hold_no_image_ends_the_start(encoders: StartEncoder) -> None:
    with pytest.raises(ConfigurationError, match="Raise --ec-max-bytes"):
        encoders(max_bytes=16 << 10)


async def test_an_item_of_a_cancelled_request_is_encoded_for_others_that_wait_for_it(encoder: Encoder) -> None:
    first, second = asyncio.create_task(encoder.encode(A)), asyncio.create_task(encoder.encode(A))
    await asyncio.sleep(0)
    first.cancel()
    (item,) = await second
    assert item.outcome is ItemOutcome.ENCODED
    assert not encoder.engine._in_flight


async def test_what_was_published_counts_also_if_its_request_has_ended(
    encoder: Encoder, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, has_ended = encoder.engine._ec_worker, threading.Event()
    save_caches = worker.save_caches

    def save_slowly(cache: dict[str, torch.Tensor], identifier: str) -> None:
        save_caches(cache, identifier)
        has_ended.wait(30)

    monkeypatch.setattr(worker, "save_caches", save_slowly)
    request = asyncio.create_task(encoder.encode(A))
    assert await asyncio.to_thread(eventually, lambda: entries(store))
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert encoder.engine.stats().images_encoded == 0
    has_ended.set()
    assert await asyncio.to_thread(eventually, lambda: encoder.engine.stats().images_encoded == 1)
