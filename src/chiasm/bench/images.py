"""Seeded images as files: the same arguments give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import io
import math

import numpy as np
from PIL import Image

_GRID = 12
_GRAIN = 6


def photo(name: str, side: int = 512) -> bytes:
    """A JPEG of ``side`` squared pixels with soft shapes and some grain, as a camera's; ``name`` seeds it."""
    generator = _generator(name)
    coarse = generator.integers(0, 256, (_GRID, _GRID, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    grain = generator.integers(-_GRAIN, _GRAIN + 1, (side, side, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(soft, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def noise(name: str, size_bytes: int) -> bytes:
    """A PNG of about ``size_bytes``: pixels that do not compress."""
    side = round(math.sqrt(size_bytes / 3))
    file = io.BytesIO()
    Image.fromarray(_generator(name).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
        file, "PNG", compress_level=0
    )
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    """The image as a file that keeps every pixel."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    """An image's file as clients send it."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
