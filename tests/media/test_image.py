"""An image's name, what its header says, and its decoded pixels."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from chiasm.ec_transfer import check_identifier
from chiasm.errors import MediaError
from chiasm.media import MediaConfig, decode, identifier, inspect
from chiasm.media.formats import FORMATS, SUPPORTED

LOSSLESS = ["PNG", "GIF", "BMP", "TIFF"]
WITH_EXIF = ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"]
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> list[Any]:
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def png(width: int, height: int, bits: int = 8, colour_type: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG that is assembled by hand, so that its header can claim anything."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# ---- names ---------------------------------------------------------------------------------------------------------

PRINT = "f" * 64


def test_a_name_is_a_valid_identifier() -> None:
    name = identifier(b"image", fingerprint=PRINT)
    assert check_identifier(name) == name
    assert name == identifier(b"image", fingerprint=PRINT, salt="")


def test_media_model_and_tenant_each_change_the_name() -> None:
    names = {
        identifier(b"image", fingerprint=PRINT),
        identifier(b"another", fingerprint=PRINT),
        identifier(b"image", fingerprint="e" * 64),
        identifier(b"image", fingerprint=PRINT, salt="tenant"),
    }
    assert len(names) == 4


@settings(deadline=None)
@given(st.binary(), st.text(), st.text(), st.binary(), st.text(), st.text())
def test_different_triples_have_different_names(m1: bytes, f1: str, s1: str, m2: bytes, f2: str, s2: str) -> None:
    one, other = identifier(m1, fingerprint=f1, salt=s1), identifier(m2, fingerprint=f2, salt=s2)
    assert (one == other) == ((m1, f1, s1) == (m2, f2, s2))


def test_moving_bytes_from_one_field_to_the_next_changes_the_name() -> None:
    assert identifier(b"c", fingerprint="b", salt="a") != identifier(b"bc", fingerprint="", salt="a")
    assert identifier(b"c", fingerprint="ab") != identifier(b"c", fingerprint="b", salt="a")


# ---- headers and pixels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [one.name for one in FORMATS])
def test_size_and_format_come_from_the_header(format: str) -> None:
    data = encode(Image.new("RGB", (30, 20)), format)
    info = inspect(data)
    assert info == (20, 30, format.lower())
    assert info.media_type == f"image/{format.lower()}"
    assert info.pixels == 600
    assert decode(data).size == (30, 20)


def test_inspect_needs_only_the_header() -> None:
    whole = encode(Image.effect_noise((300, 200), 50).convert("RGB"))
    assert inspect(whole[:200]) == (200, 300, "png")


def test_a_single_pixel_is_an_image() -> None:
    data = encode(Image.new("RGB", (1, 1), "red"))
    assert inspect(data) == (1, 1, "png")
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_keep_their_pixels(format: str) -> None:
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    assert pixels(decode(encode(image, format))) == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("format", WITH_EXIF)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_applies_to_size_and_pixels(format: str, orientation: int) -> None:
    image = Image.new("RGB", (32, 16), "white")
    image.paste((255, 0, 0), (0, 0, 16, 8))  # red in the upper left
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, format, exif=exif)
    turned = decode(data)
    info = inspect(data)
    assert turned.size == (info.width, info.height) == ((16, 32) if orientation >= 5 else (32, 16))
    upright = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    red = (turned.width * (1 + 2 * upright[0]) // 4, turned.height * (1 + 2 * upright[1]) // 4)
    channels = turned.getpixel(red)
    assert isinstance(channels, tuple)
    assert channels[0] > 200
    assert channels[1] < 60


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_exif_rotation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert inspect(encode(Image.new("RGB", (3, 2)), exif=exif)) == (2, 3, "png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_ignored() -> None:
    data = png(3, 2, data=bytes(2 * 10), extra=chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"))
    assert inspect(data) == (2, 3, "png")
    assert decode(data).size == (3, 2)


def test_exif_after_the_pixels_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encode(Image.new("RGB", (3, 2)))
    late = whole[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:]
    assert inspect(late) == (2, 3, "png")
    assert decode(late).size == (3, 2)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format, options in (
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100}),
    ):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert inspect(data)[:2] == (8, 8)
        red, green, blue = decode(data).getpixel((4, 4))  # type: ignore[misc]
        assert red > 250, format
        assert max(green, blue) < 5, format


def test_cmyk_becomes_rgb() -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert inspect(data) == (8, 8, "jpeg")
    red, green, blue = decode(data).getpixel((4, 4))  # type: ignore[misc]
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    rows = b"\0" + struct.pack(">4H", 0, 0x5555, 0x8080, 0xFFFF)
    assert pixels(decode(png(4, 1, bits=16, colour_type=0, data=rows))) == [(v,) * 3 for v in (0, 85, 128, 255)]
    rows = b"\0" + struct.pack(">3H", 0xFFFF, 0x8080, 0)
    assert decode(png(1, 1, bits=16, colour_type=2, data=rows)).getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert decode(encode(Image.new(mode, (3, 3)))).mode == "RGB"


def test_transparent_parts_are_white() -> None:
    assert decode(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))).getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert decode(encode(palette)).getpixel((0, 0)) == (0, 255, 0)
    assert decode(encode(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encode(palette, "GIF", transparency=1, optimize=False)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encode(Image.new("RGB", (2, 2), "red"), transparency=(255, 0, 0))).getpixel((0, 0)) == (255,) * 3


def test_an_mpo_file_of_a_phone_is_read_as_jpeg() -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert inspect(data) == (8, 16, "jpeg")
    assert decode(data).getpixel((4, 4))[0] > 200  # type: ignore[index]


# ---- TIFF and AVIF ---------------------------------------------------------------------------------------------------


def tiff(tags: dict[int, tuple[int, int, int]], *, big: bool = False, tail: bytes = b"") -> bytes:
    """A TIFF that is assembled by hand: type, count and value of each tag. ``tail`` begins at byte 1024."""
    entries = b"".join(struct.pack("<HHQQ" if big else "<HHLL", tag, *entry) for tag, entry in sorted(tags.items()))
    head = (
        struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags))
        if big
        else struct.pack("<2sHLH", b"II", 42, 8, len(tags))
    )
    return (head + entries + bytes(8)).ljust(1024, b"\0") + tail


SMALL: dict[int, tuple[int, int, int]] = {
    256: (3, 1, 2),
    257: (3, 1, 1),
    258: (3, 1, 8),
    259: (3, 1, 1),
    262: (3, 1, 1),
    273: (4, 1, 1024),
    278: (3, 1, 1),
    279: (4, 1, 2),
}


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_either_kind_is_read(big: bool) -> None:
    data = tiff(SMALL, big=big, tail=b"\0\xff")
    assert inspect(data) == (1, 2, "tiff")
    assert pixels(decode(data)) == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiffs_are_read(compression: str) -> None:
    image = Image.linear_gradient("L").convert("RGB")
    assert pixels(decode(encode(image, "TIFF", compression=compression))) == pixels(image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_white_is_white_in_every_mode_of_a_tiff(mode: str, compression: str) -> None:
    white: Any = {"1": 1, "I;16": 65535, "I;16B": 65535, "CMYK": 0}.get(mode)
    image = Image.new(mode, (4, 4), white) if white is not None else Image.new("RGBA", (4, 4), "white").convert(mode)
    found = decode(encode(image, "TIFF", compression=compression))
    assert set(pixels(found)) == {(255, 255, 255)}


def test_sixteen_bits_of_a_tiff_are_scaled() -> None:
    image = Image.new("I;16", (2, 1), 0x5555)
    assert pixels(decode(encode(image, "TIFF"))) == [(85, 85, 85)] * 2


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_a_tiff_without_a_scale_is_refused_by_name(mode: str) -> None:
    data = encode(Image.new(mode, (3, 3)), "TIFF")
    for read in (inspect, decode):
        with pytest.raises(MediaError, match=r"The TIFF image holds .*8 or 16 bits") as caught:
            read(data)
        assert caught.value.code == "invalid_image"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_xmp_rotation_applies_to_size_and_pixels(format: str) -> None:
    image = Image.new("RGB", (32, 16), "white")
    image.paste((255, 0, 0), (0, 0, 16, 8))
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP)
        data = encode(image, format, pnginfo=info)
    elif format == "TIFF":
        data = encode(image, format, tiffinfo={700: XMP.encode()})
    else:
        data = encode(image, format, xmp=XMP.encode())
    assert inspect(data)[:2] == (32, 16)
    red, green, _ = decode(data).getpixel((12, 8))  # type: ignore[misc]
    assert red > 200
    assert green < 60


EXCESSIVE: dict[str, dict[int, tuple[int, int, int]]] = {
    "strips": {273: (4, 1 << 20, 1024)},
    "strips of bytes": {273: (1, 1 << 22, 1024)},
    "tiles": {324: (3, 1 << 21, 1024)},
    "resolutions": {282: (5, 1 << 19, 1024)},
    "large tiles": {322: (4, 1, 60_000), 323: (4, 1, 60_000)},
}


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("what", EXCESSIVE)
def test_a_tiff_that_asks_for_more_than_an_image_needs_is_refused_by_its_header(what: str, big: bool) -> None:
    data = tiff(SMALL | EXCESSIVE[what], big=big, tail=bytes(4 << 20))
    for read in (inspect, decode):
        with pytest.raises(MediaError, match="The header of the TIFF image") as caught:
            read(data)
        assert caught.value.code == "invalid_image"


def test_the_number_of_tags_of_a_tiff_is_bounded() -> None:
    many = dict.fromkeys(range(1000, 1000 + 5000), (3, 1, 0))
    with pytest.raises(MediaError, match="The header of the TIFF image"):
        inspect(tiff(SMALL | many))


def test_the_limit_on_pixels_holds_for_tiff_and_avif() -> None:
    with pytest.raises(MediaError, match="40000 x 40000"):
        inspect(tiff(SMALL | {256: (3, 1, 40_000), 257: (3, 1, 40_000)}))
    data = encode(Image.new("RGB", (100, 100)), "AVIF")
    with pytest.raises(MediaError, match="100 x 100"):
        inspect(data, MediaConfig(max_image_pixels=9_999))


def test_an_avif_is_known_by_any_of_its_brands() -> None:
    data = encode(Image.new("RGB", (30, 20)), "AVIF")
    assert data[8:12] == b"avif"
    assert inspect(data[:8] + b"mif1" + data[12:]) == (20, 30, "avif")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg:svg>", "SVG"),
        (b"\n <!DOCTYPE html><html>", "web page"),
        (b"<HTML>", "web page"),
        (b"<!-- a --><head>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": "no such key"}', "JSON"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x20ftypisom\0\0\0\0mp42", "video"),
        (b"%PDF-1.7", "PDF"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"8BPS", "Photoshop"),
        (b"\x1f\x8b\x08", "gzip"),
    ],
)
def test_other_kinds_of_files_are_refused_by_name(data: bytes, says: str) -> None:
    for read in (inspect, decode):
        with pytest.raises(MediaError, match=f"The file is .*{says}.*Send {SUPPORTED}") as caught:
            read(data)
        assert caught.value.code == "invalid_image"


def test_every_list_of_formats_is_the_one_list() -> None:
    root = Path(__file__).parents[2]
    texts = [path for folder in ("src", "docs") for kind in ("*.py", "*.md") for path in (root / folder).rglob(kind)]
    lists = [
        (path, found)
        for path in (root / "README.md", *texts)
        for found in re.findall(r"PNG, [\w, ]*? or \w+", path.read_text())
    ]
    assert {found for _, found in lists} == {SUPPORTED}, lists


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    for read in (inspect, decode):
        with pytest.raises(MediaError, match="20000 x 20000") as caught:
            read(png(20_000, 20_000))
        assert caught.value.code == "image_too_large"


def test_the_limit_on_pixels_is_exact() -> None:
    data = encode(Image.new("RGB", (10, 10)))
    assert inspect(data, MediaConfig(max_image_pixels=100)).pixels == 100
    with pytest.raises(MediaError):
        inspect(data, MediaConfig(max_image_pixels=99))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"<html>not an image</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"II*\0\x08\0\0\0",
        b"\x89PNG\r\n\x1a\n",
        png(10, 10)[:20],
        png(0, 10),
        b"\xff\xd8\xff\xe0\x00",
        b"GIF89a\x01",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"BM",
    ],
)
def test_data_that_is_not_an_image_is_refused(data: bytes) -> None:
    for read in (inspect, decode):
        with pytest.raises(MediaError) as caught:
            read(data)
        assert caught.value.code == "invalid_image"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_truncated_pixels_are_an_error(format: str) -> None:
    data = encode(Image.effect_noise((200, 200), 80).convert("RGB"), format)
    with pytest.raises(MediaError):
        decode(data[: len(data) // 2])


@settings(deadline=None)
@given(
    data=st.binary(max_size=200),
    head=st.sampled_from(
        [
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"GIF89a",
            b"BM",
            b"",
            b"II*\0\x08\0\0\0",
            b"MM\0+",
            b"\0\0\0\x14ftypavif",
        ]
    ),
)
def test_no_bytes_raise_anything_but_media_errors(data: bytes, head: bytes) -> None:
    config = MediaConfig(max_image_pixels=10_000)
    for read in (inspect, decode):
        with contextlib.suppress(MediaError):
            read(head + data, config)


def test_a_hostile_text_chunk_is_bounded() -> None:
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20)))
    with pytest.raises(MediaError):
        inspect(png(4, 4, data=bytes(4 * 13), extra=bomb))
