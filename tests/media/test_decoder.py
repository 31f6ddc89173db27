"""The process in which images are decoded that may take long."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from chiasm.errors import MediaError
from chiasm.media import MediaConfig, decode, inspect
from chiasm.media.decoder import Decoder

from . import hostile


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(MediaConfig(decode_cpu_seconds=0.5))
    yield made
    made.close()


async def pixels(decoder: Decoder, threads: ThreadPoolExecutor, data: bytes) -> bytes:
    found, seconds = await decoder.decode(data, inspect(data).pixels, Image.Image.tobytes, threads)
    assert seconds > 0
    return found


async def test_the_process_returns_the_same_pixels(decoder: Decoder, threads: ThreadPoolExecutor) -> None:
    for what in ("TIFF", "AVIF", "animated WebP", "BMP of runs"):
        data = hostile.SLOW[what]()
        assert await pixels(decoder, threads, data) == decode(data).tobytes(), what


async def test_an_ordinary_image_starts_no_process(decoder: Decoder, threads: ThreadPoolExecutor) -> None:
    data = hostile.encode("PNG")
    assert await pixels(decoder, threads, data) == decode(data).tobytes()
    assert decoder._process is None


async def test_an_image_that_takes_too_long_is_refused_and_the_next_is_decoded(
    decoder: Decoder, threads: ThreadPoolExecutor
) -> None:
    with pytest.raises(MediaError, match="takes more than") as caught:
        await pixels(decoder, threads, hostile.png(tail=hostile.chunk(b"abCd") * 2_500_000))
    assert caught.value.code == "image_too_expensive"
    data = hostile.encode("TIFF")
    assert await pixels(decoder, threads, data) == decode(data).tobytes()


async def test_broken_images_are_refused_as_in_a_thread(decoder: Decoder, threads: ThreadPoolExecutor) -> None:
    data = hostile.encode("TIFF", compression="tiff_lzw")
    broken = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    whole = hostile.encode("AVIF")
    for one in (broken, whole[:-20]):
        with pytest.raises(MediaError) as direct:
            decode(one)
        with pytest.raises(MediaError) as apart:
            await pixels(decoder, threads, one)
        assert (apart.value.message, apart.value.code) == (direct.value.message, direct.value.code)


async def test_a_larger_image_than_its_header_has_promised_is_refused(
    decoder: Decoder, threads: ThreadPoolExecutor
) -> None:
    with pytest.raises(MediaError) as caught:
        await decoder.decode(hostile.encode("TIFF"), 64 * 63, Image.Image.tobytes, threads)
    assert caught.value.code == "image_too_large"


async def test_a_process_that_crashes_costs_only_its_image(decoder: Decoder, threads: ThreadPoolExecutor) -> None:
    data = hostile.encode("TIFF")
    await pixels(decoder, threads, data)
    assert decoder._process is not None
    os.kill(decoder._process.pid, signal.SIGSEGV)
    decoder._process.wait()
    with pytest.raises(MediaError) as caught:
        await pixels(decoder, threads, data)
    assert caught.value.code == "invalid_image"
    assert await pixels(decoder, threads, data) == decode(data).tobytes()


async def test_images_decoded_apart_keep_no_thread_busy(decoder: Decoder, threads: ThreadPoolExecutor) -> None:
    slow = [asyncio.ensure_future(pixels(decoder, threads, hostile.encode("TIFF"))) for _ in range(4)]
    quick = hostile.encode("PNG")
    assert await pixels(decoder, threads, quick) == decode(quick).tobytes()
    assert len(await asyncio.gather(*slow)) == 4


async def test_an_image_that_keeps_its_thread_is_known(
    decoder: Decoder, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiasm.media.decoder._STUCK_SECONDS", 0.0)
    begun, ends = threading.Event(), threading.Event()

    def stay(image: Image.Image) -> None:
        begun.set()
        ends.wait()

    task = asyncio.ensure_future(decoder.decode(hostile.encode("PNG"), 64 * 64, stay, threads))
    await asyncio.to_thread(begun.wait)
    assert decoder.is_stuck
    ends.set()
    await task
    assert not decoder.is_stuck


async def test_closing_ends_the_process(threads: ThreadPoolExecutor) -> None:
    decoder = Decoder(MediaConfig())
    await pixels(decoder, threads, hostile.encode("TIFF"))
    process = decoder._process
    assert process is not None
    decoder.close()
    assert process.poll() is not None
    decoder.close()
