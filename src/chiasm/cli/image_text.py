"""Images for output that has no colours: a character's ink stands for how far a spot's colour is from the background's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_INK = " .:-=+*#%@"
_NOISE = 48
"""Differences from the background, of 255, that are left blank."""
_CELL_RATIO = 0.5
"""A character cell is about half as wide as it is high."""


def draw_in_characters(image: Image, width: int) -> str:
    """``image`` as lines of ``width`` characters; what is coloured like most of it is blank."""
    from PIL import Image as PillowImage
    from PIL import ImageChops, ImageStat

    height = max(1, round(image.height * width / image.width * _CELL_RATIO))
    small = image.convert("RGB").resize((width, height), PillowImage.Resampling.BOX)
    red, green, blue = (int(channel) for channel in ImageStat.Stat(small).median)
    background = PillowImage.new("RGB", small.size, (red, green, blue))
    distances = ImageChops.difference(small, background).split()
    furthest = ImageChops.lighter(ImageChops.lighter(distances[0], distances[1]), distances[2]).tobytes()
    span = max(255 - _NOISE, 1) if max(furthest) <= _NOISE else max(furthest) - _NOISE
    inks = [_INK[max(0, distance - _NOISE) * (len(_INK) - 1) // span] for distance in furthest]
    return "\n".join("".join(inks[row * width : (row + 1) * width]).rstrip() for row in range(height))
