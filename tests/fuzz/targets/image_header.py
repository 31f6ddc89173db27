"""The walk over the header of an image file, and what Pillow then makes of it, without decoding."""

from __future__ import annotations

import contextlib
import io
import warnings

from PIL import Image

from chiasm.errors import MediaError
from chiasm.media import inspect

FORMATS = {"JPEG": {"progressive": True}, "PNG": {}, "WEBP": {}, "GIF": {}, "TIFF": {}, "BMP": {}, "AVIF": {}}


def seeds() -> list[bytes]:
    image = Image.new("RGB", (9, 5), "red")
    exif = Image.Exif()
    exif[274] = 6
    files = []
    for name, options in FORMATS.items():
        file = io.BytesIO()
        image.save(file, name, **options)
        files.append(file.getvalue())
    for name in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        image.save(file, name, exif=exif.tobytes())
        files.append(file.getvalue())
    return files


def take(data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(MediaError):
            found = inspect(data)
            assert found.width > 0
            assert found.height > 0
            return True
    return False
