"""What a header may cost: the walks over it, and what Pillow reads after them."""

from __future__ import annotations

import contextlib
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import MediaError
from chiasm.media import MediaConfig, decode, inspect
from chiasm.media.formats import FORMATS, format_of
from chiasm.media.headers import jpeg as jpeg_header
from chiasm.media.headers.steps import MAX_SCANS, MAX_STEPS, ExcessiveHeaderError, Steps
from chiasm.media.image import decode_quickly

from . import hostile

SMALL = MediaConfig(max_image_pixels=10_000)
BEGINNINGS = {one.name: hostile.encode(one.name) for one in FORMATS}


@pytest.mark.parametrize("what", hostile.EXCESSIVE)
def test_a_header_with_more_parts_than_an_image_needs_is_refused(what: str) -> None:
    data = hostile.EXCESSIVE[what]()
    for read in (inspect, decode):
        with pytest.raises(MediaError, match="asks for more than an image needs: more than") as caught:
            read(data)
        assert caught.value.code == "invalid_image"


@pytest.mark.parametrize("what", hostile.EXCESSIVE)
def test_the_walk_over_a_hostile_header_ends_within_its_budget(what: str) -> None:
    data = hostile.EXCESSIVE[what]()
    steps, format = Steps(), format_of(data)
    assert format is not None
    with pytest.raises(ExcessiveHeaderError):
        format.walk(data, steps, 10_000)
    assert steps.taken <= MAX_STEPS + 1


@pytest.mark.parametrize("what", hostile.SLOW)
def test_what_the_header_does_not_bound_is_not_decoded_in_a_thread(what: str) -> None:
    data = hostile.SLOW[what]()
    assert decode_quickly(data, MediaConfig()) is None


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_ordinary_files_are_decoded_in_a_thread(format: str) -> None:
    assert decode_quickly(hostile.encode(format), MediaConfig()) is not None


def test_an_ordinary_progressive_jpeg_is_decoded_in_a_thread() -> None:
    assert decode_quickly(hostile.encode("JPEG", 1000, progressive=True), MediaConfig()) is not None


@pytest.mark.parametrize("scans", [10, MAX_SCANS])
def test_scans_are_counted(scans: int) -> None:
    assert jpeg_header.walk(hostile.jpeg_of_scans(scans), Steps(), 10_000) == scans


def test_an_end_inside_a_segment_hides_no_scan() -> None:
    data = hostile.jpeg_of_scans(10)
    at = data.rfind(b"\xff\xda")
    hidden = data[:at] + hostile.segment(0xFE, b"\xff\xd9") + data[at:]
    assert jpeg_header.walk(hidden, Steps(), 10_000) == 10


def test_a_marker_inside_a_segment_of_the_header_counts_as_no_scan() -> None:
    data = hostile.jpeg(hostile.segment(0xFE, b"\xff\xda" * 1000))
    assert jpeg_header.walk(data, Steps(), 10_000) == 1


def test_images_behind_the_end_of_a_jpeg_are_no_reason_to_refuse_it() -> None:
    assert inspect(hostile.encode("JPEG") * 200)[:2] == (64, 64)


def test_a_large_colour_profile_is_no_reason_to_refuse_an_image() -> None:
    for format in ("JPEG", "PNG", "WEBP", "AVIF"):
        data = hostile.encode(format, icc_profile=bytes(700_000))
        assert inspect(data)[:2] == (64, 64), format


def test_text_chunks_of_a_png_are_bounded_together() -> None:
    bomb = hostile.chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000)))
    with pytest.raises(MediaError):
        inspect(hostile.png(bomb * 20))


@settings(deadline=None, max_examples=300)
@given(
    format=st.sampled_from(sorted(BEGINNINGS)),
    cut=st.integers(0, 400),
    more=st.one_of(
        st.binary(max_size=100),
        st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=24), st.integers(1, 3000)),
        st.builds(
            lambda size, kind, times: (struct.pack(">I", size) + kind) * times,
            st.integers(0, 40),
            st.sampled_from([b"meta", b"iprp", b"ipco", b"moov", b"eXIf", b"IDAT", b"fcTL"]),
            st.integers(1, 3000),
        ),
    ),
    rest=st.booleans(),
)
def test_no_header_costs_more_than_the_budget_or_raises_anything_but_media_errors(
    format: str, cut: int, more: bytes, rest: bool
) -> None:
    whole = BEGINNINGS[format]
    data = whole[:cut] + more + (whole[cut:] if rest else b"")
    if (found := format_of(data)) is not None:
        steps = Steps()
        with contextlib.suppress(ExcessiveHeaderError, ValueError, IndexError, OverflowError, struct.error):
            found.walk(data, steps, 10_000)
        assert steps.taken <= MAX_STEPS + 1
    with contextlib.suppress(MediaError):
        inspect(data, SMALL)
