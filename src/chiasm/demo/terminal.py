"""Images in a terminal: two pixels per character cell, in 24-bit colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from rich.text import Text

_UPPER_HALF = "▀"


def render(image: Image.Image, width: int) -> Text:
    """Return ``image`` as rich text of ``width`` columns.

    A cell shows the upper pixel in the colour of its character, and the lower one in its background. A cell is about
    twice as high as wide, so pixels are square and the aspect ratio is kept. Raises ValueError if ``width`` is below 1.
    """
    from rich.text import Text

    if width < 1:
        raise ValueError(f"an image cannot be {width} columns wide")
    rows = max(1, round(image.height * width / image.width / 2))
    pixels = image.convert("RGB").resize((width, 2 * rows), Image.Resampling.BOX).tobytes()
    lines = []
    for row in range(rows):
        line = Text(no_wrap=True, end="")
        for column in range(width):
            upper, lower = (3 * ((2 * row + half) * width + column) for half in (0, 1))
            line.append(_UPPER_HALF, f"{_hex(pixels[upper : upper + 3])} on {_hex(pixels[lower : lower + 3])}")
        lines.append(line)
    return Text("\n", no_wrap=True).join(lines)


def _hex(pixel: bytes) -> str:
    return f"#{pixel.hex()}"
