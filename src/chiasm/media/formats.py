"""The formats of image files: the one list of those that are read, and words for what is sent instead.

The first bytes of a file decide which plugin of Pillow reads it, and only the plugins that are named here are used: those that
decode by themselves. What a URL, a server or a file's name says about the type is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from chiasm.media.headers import avif, bmp, gif, jpeg, png, tiff, webp
from chiasm.media.headers.steps import Walk


class Format(NamedTuple):
    """A format that is read."""

    name: str
    """As people write it."""
    key: str
    """As in its media type."""
    recognizes: Callable[[bytes], bool]
    """Whether these are the first bytes of such a file."""
    walk: Walk
    """Bounds what ``open`` reads."""
    open: Callable[[BytesIO], ImageFile.ImageFile]
    """Reads the header only."""


_BRANDS_BYTES = 512
_SNIFFED_BYTES = 1024


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(starts)


def _brands(data: bytes) -> set[bytes]:
    """Return the brands of a file of ISO's base media format, such as AVIF and HEIF; none if it is another."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), _BRANDS_BYTES, len(data))
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}


def _is_avif(data: bytes) -> bool:
    return not _brands(data).isdisjoint({b"avif", b"avis"})


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


FORMATS = (
    Format("PNG", "png", _begins(b"\x89PNG\r\n\x1a\n"), png.walk, PngImagePlugin.PngImageFile),
    # Not Pillow's factory function, which would use another plugin for a phone's file of several images (MPO).
    Format("JPEG", "jpeg", _begins(b"\xff\xd8\xff"), jpeg.walk, JpegImagePlugin.JpegImageFile),
    Format("WebP", "webp", _is_webp, webp.walk, WebPImagePlugin.WebPImageFile),
    Format("GIF", "gif", _begins(b"GIF87a", b"GIF89a"), gif.walk, GifImagePlugin.GifImageFile),
    Format("BMP", "bmp", _begins(b"BM"), bmp.walk, BmpImagePlugin.BmpImageFile),
    Format("TIFF", "tiff", _begins(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), tiff.walk, TiffImagePlugin.TiffImageFile),
    # Pillow can be built without it.
    *(
        [Format("AVIF", "avif", _is_avif, avif.walk, AvifImagePlugin.AvifImageFile)]
        if AvifImagePlugin.SUPPORTED
        else []
    ),
)
SUPPORTED = f"{', '.join(one.name for one in FORMATS[:-1])} or {FORMATS[-1].name}"
"""For messages and documentation."""

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_WEB_PAGE = re.compile(
    rb"(?:<!--.*?-->\s*)*<(?:!doctype html|html|head|body|title|script|style|meta|iframe|div|table|h1|p|br|a|b)[\s>/]",
    re.IGNORECASE | re.DOTALL,
)
_SVG = re.compile(rb"<(?:\w+:)?svg[\s>]", re.IGNORECASE)
_OTHERS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("an AVIF image, which Pillow here was built without", _is_avif),
    ("a HEIF (HEIC) image", lambda data: bool(_brands(data) & _HEIF_BRANDS)),
    ("a video", lambda data: bool(_brands(data)) or data.startswith(b"\x1a\x45\xdf\xa3")),
    ("a JPEG 2000 image", _begins(b"\0\0\0\x0cjP  \r\n", b"\xff\x4f\xff\x51")),
    ("a JPEG XL image", _begins(b"\xff\x0a", b"\0\0\0\x0cJXL \r\n")),
    ("an icon (ICO)", _begins(b"\0\0\1\0")),
    ("a Photoshop file", _begins(b"8BPS")),
    ("a PDF", _begins(b"%PDF-")),
    ("PostScript", _begins(b"%!PS")),
    ("a ZIP archive", _begins(b"PK\x03\x04")),
    ("compressed with gzip", _begins(b"\x1f\x8b")),
    ("JSON", _begins(b"{", b"[")),
)


def format_of(data: bytes) -> Format | None:
    """Return the format of a file by its first bytes; None if it isn't one that is read."""
    return next((one for one in FORMATS if one.recognizes(data)), None)


def other_kind(data: bytes) -> str | None:
    """Return what a file is that ``format_of`` doesn't know, as in "it is …"; None if that isn't known either."""
    if not data:
        return "empty"
    text = data[:_SNIFFED_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<") and _SVG.search(text):
        return "an SVG drawing, which has no pixels yet"
    if _WEB_PAGE.match(text):
        return "a web page, not an image"
    if text.startswith(b"<?xml"):
        return "XML, not an image"
    return next((name for name, recognizes in _OTHERS if recognizes(data[:_SNIFFED_BYTES])), None)
