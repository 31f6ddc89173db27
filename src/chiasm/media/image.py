"""Images: their size from the header alone, and their pixels.

Which plugin of Pillow reads a file is decided by the file's first bytes, and only the plugins named here are ever
loaded. Sizes and rotation come from one function for both, so that what the proxy tells PD is what the encoder sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from chiasm.errors import MediaError
from chiasm.media.config import MediaConfig

SUPPORTED = "PNG, JPEG, WebP, GIF or BMP"

# The bound on pixels is ours and always holds; Pillow's own lies higher and would only warn.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Anybody may send broken EXIF; that is no news for the log.
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAPPED = 5
"""Orientations from here on exchange height and width."""


class ImageInfo(NamedTuple):
    """What an image's header says."""

    height: int
    """Pixels, after rotation by EXIF."""
    width: int
    """Pixels, after rotation by EXIF."""
    format: str
    """``png``, ``jpeg``, ``webp``, ``gif`` or ``bmp``."""

    @property
    def media_type(self) -> str:
        return f"image/{self.format}"

    @property
    def pixels(self) -> int:
        return self.height * self.width


def inspect(data: bytes, config: MediaConfig | None = None) -> ImageInfo:
    """Size and format, from the header alone. Takes well under a millisecond; hostile files may take longer: use a thread.

    Raises MediaError for what isn't an image of a supported format, for a header that is cut off, and for more pixels
    than ``config.max_image_pixels``.
    """
    image, format, orientation = _open(data, config or MediaConfig())
    with image:
        width, height = image.size
    if orientation >= _SIDES_SWAPPED:
        height, width = width, height
    return ImageInfo(height, width, format)


def decode(data: bytes, config: MediaConfig | None = None) -> Image.Image:
    """The image as RGB, of the size that ``inspect`` says. Blocks: use a thread.

    EXIF rotation is applied; the first frame of an animation counts; transparent parts are laid on white; 16 bits a
    channel are scaled to 8; CMYK is converted without a colour profile. Raises MediaError for everything that
    ``inspect`` refuses and for pixel data that is cut off or broken.
    """
    image, format, orientation = _open(data, config or MediaConfig())
    with image:
        try:
            image.load()
            rgb = _to_rgb(image)
        except Exception as error:
            raise MediaError(f"the {format.upper()} image is cut off or broken", code="invalid_image") from error
    turn = _TRANSPOSE.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


class _Opened(NamedTuple):
    image: ImageFile.ImageFile
    format: str
    orientation: int


_Opener = Callable[[BytesIO], ImageFile.ImageFile]


def _opener(data: bytes) -> tuple[str, _Opener] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", PngImagePlugin.PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        # Not the factory, which would read a phone's file of several images (MPO) with one more plugin.
        return "jpeg", JpegImagePlugin.JpegImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp", WebPImagePlugin.WebPImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif", GifImagePlugin.GifImageFile
    if data.startswith(b"BM"):
        return "bmp", BmpImagePlugin.BmpImageFile
    return None


def _open(data: bytes, config: MediaConfig) -> _Opened:
    found = _opener(data)
    if found is None:
        raise MediaError(f"this is not an image in a supported format ({SUPPORTED})", code="invalid_image")
    format, opener = found
    try:
        image = opener(BytesIO(data))
        width, height = image.size
    except Exception as error:  # a plugin fed with a hostile header raises whatever comes
        raise MediaError(
            f"the header of the {format.upper()} image is cut off or broken", code="invalid_image"
        ) from error
    if width < 1 or height < 1:
        raise MediaError("the image has no pixels", code="invalid_image")
    if width * height > config.max_image_pixels:
        raise MediaError(
            f"the image has {width} x {height} pixels; at most {config.max_image_pixels:,} in all are taken",
            code="image_too_large",
        )
    return _Opened(image, format, _orientation(image))


def _orientation(image: ImageFile.ImageFile) -> int:
    """1 to 8. From what the header holds, never from EXIF data behind the pixels, which needs them decoded."""
    block = image.info.get("exif")
    if not isinstance(block, bytes):
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        value = exif.get(_ORIENTATION_TAG)
    except Exception:  # broken EXIF is no reason to refuse an image
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits a pixel. A plain conversion to 8 bits would clip at 255 where scaling is meant.
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.mode in {"LA", "PA", "RGBA", "La", "RGBa"} or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    # A copy where nothing is to convert, since the file's own object is closed.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
