"""BMP: only its compression matters, as there are no parts to count."""

from __future__ import annotations

from chiasm.media.headers.steps import UNKNOWN, Steps

_RUN_LENGTHS = (1, 2)
"""Compressions that Pillow decodes in Python."""


def walk(data: bytes, steps: Steps, max_pixels: int) -> int | None:
    """Look at the header of a BMP. See ``steps.Walk``."""
    steps.take("headers")
    return UNKNOWN if int.from_bytes(data[30:34], "little") in _RUN_LENGTHS else 1
