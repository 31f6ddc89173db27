"""The process in which images are decoded that may take long."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from chiasm.bounded_process import BoundedProcess
from chiasm.errors import MediaError
from chiasm.media import MediaConfig, decode, decoding_process, inspect
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
    assert decoder._process.pid is None


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


async def test_a_process_that_crashes_costs_only_its_image(
    decoder: Decoder, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = hostile.encode("TIFF")
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_process", BoundedProcess("-c", "import os; os.abort()"))
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
    pid = decoder._process.pid
    assert pid is not None
    decoder.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    decoder.close()


def test_an_image_that_needs_too_much_memory_is_refused() -> None:
    without_room = (
        "from chiasm import bounded_process\n"
        "from chiasm.media import decoding_process\n"
        "decoding_process._BYTES_PER_PIXEL = bounded_process._BYTES_BESIDE = bounded_process._BYTES_PER_CORE = 0\n"
        "import chiasm.media.image\n"
        "decoding_process.main()\n"
    )
    data = hostile.encode("TIFF", 4000, compression="tiff_lzw")
    process = BoundedProcess("-c", without_room)
    answer = process.ask(struct.pack(decoding_process.ORDER, 4000 * 4000), data, cpu_seconds=10.0)
    process.end()
    outcome, *_ = struct.unpack_from(decoding_process.ANSWER, answer)
    assert outcome == decoding_process.Outcome.TOO_EXPENSIVE


READ_ALL = """
import asyncio, logging
from concurrent.futures import ThreadPoolExecutor
from chiasm.errors import MediaError
from chiasm.media import MediaConfig, inspect
from chiasm.media.decoder import Decoder
from tests.media import hostile

logging.basicConfig(level=logging.DEBUG)
logging.getLogger("asyncio").setLevel(logging.WARNING)

def broken(format, **options):
    data = hostile.encode(format, 200, **options)
    return data[: len(data) // 2] + bytes(byte ^ 0x5A for byte in data[len(data) // 2 :])

async def main():
    files = [make() for make in (*hostile.SLOW.values(), *hostile.EXCESSIVE.values())]
    files += [broken(format) for format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF")]
    files += [broken("TIFF", compression=one) for one in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")]
    files += [hostile.jpeg(hostile.segment(0xE1, b"Exif" + bytes(2) + hostile.tiff_directory(500)))]
    decoder = Decoder(MediaConfig())
    with ThreadPoolExecutor(1) as threads:
        for data in files:
            try:
                await decoder.decode(data, inspect(data).pixels, lambda image: image.size, threads)
            except MediaError:
                pass
    decoder.close()

asyncio.run(main())
"""


def test_no_image_writes_lines_to_the_log_of_any_level() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", READ_ALL], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
