"""vLLM decodes images itself: it reads every format that the proxy lets through, with the size that the proxy told the PD."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image, ImageChops

from chiasm.media import decode, inspect
from chiasm.media.formats import FORMATS

media = pytest.importorskip("vllm.multimodal.media.image")

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encode(format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", (32, 16), "white")
    image.paste((255, 0, 0), (0, 0, 16, 8))
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize(
    "data",
    [
        *(pytest.param(encode(one.name), id=one.key) for one in FORMATS),
        *(
            pytest.param(encode(name, exif=exif(turn)), id=f"{name}-{turn}")
            for name in ("JPEG", "TIFF", "AVIF", "WEBP", "PNG")
            for turn in (3, 6)
        ),
        *(pytest.param(encode(name, xmp=XMP), id=f"{name}-xmp") for name in ("JPEG", "AVIF", "WEBP")),
        pytest.param(encode("TIFF", tiffinfo={700: XMP}), id="TIFF-xmp"),
    ],
)
def test_vllm_sees_the_same_image(data: bytes) -> None:
    info = inspect(data)
    theirs = media.ImageMediaIO().load_bytes(data).media
    ours = decode(data)
    assert theirs.size == ours.size == (info.width, info.height)
    assert theirs.mode == ours.mode == "RGB"
    assert ImageChops.difference(theirs, ours).getextrema() == ((0, 0),) * 3
