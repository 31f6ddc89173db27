"""Images: their name, their size from the header alone, and their pixels.

The first bytes of a file decide which plugin of Pillow reads it, and only the plugins that are imported here are used.
``inspect`` and ``decode`` take size and rotation from the same function, so that the encoder sees an image of the size that
the proxy has told the PD.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

from blake3 import blake3
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from chiasm.errors import Code, MediaError
from chiasm.media.config import MediaConfig

SUPPORTED = "PNG, JPEG, WebP, GIF or BMP"

# max_image_pixels is always enforced. Pillow's own limit is higher and only warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Clients can send broken EXIF data at will; it must not fill the log.
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
"""Orientations from here on swap height and width."""


class ImageInfo(NamedTuple):
    """What the header of an image says."""

    height: int
    """In pixels, after EXIF rotation."""
    width: int
    """In pixels, after EXIF rotation."""
    format: str
    """``png``, ``jpeg``, ``webp``, ``gif`` or ``bmp``."""

    @property
    def media_type(self) -> str:
        return f"image/{self.format}"

    @property
    def pixels(self) -> int:
        return self.height * self.width


def identifier(media: bytes, *, fingerprint: str, salt: str = "") -> str:
    """Return the 64 lower-case hex digits that name the embedding of ``media``.

    They are the BLAKE3 hash of salt, fingerprint and media, each preceded by its length, so that different triples never
    give the same input. ``fingerprint`` names model, processor settings and dtype, as instances report it; ``salt`` keeps
    tenants apart.
    """
    digest = blake3()
    for part in (salt.encode(errors="surrogatepass"), fingerprint.encode(errors="surrogatepass"), media):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def inspect(data: bytes, config: MediaConfig | None = None) -> ImageInfo:
    """Return size and format, from the header alone.

    Usually takes well under a millisecond, but a hostile file may take longer, so call it in a thread. Raises MediaError if
    the data is not an image in a supported format, if its header is truncated, or if it has more pixels than
    ``config.max_image_pixels``.
    """
    image, format, orientation = _open(data, config or MediaConfig())
    with image:
        width, height = image.size
    if orientation >= _SIDES_SWAPPED:
        height, width = width, height
    return ImageInfo(height, width, format)


def decode(data: bytes, config: MediaConfig | None = None) -> Image.Image:
    """Return the image as RGB, with the size that ``inspect`` returns. Blocks, so call it in a thread.

    Applies the EXIF rotation, takes the first frame of an animation, puts transparent parts on white, scales 16 bits per
    channel to 8, and converts CMYK without a colour profile. Raises MediaError for everything that ``inspect`` refuses and
    for pixel data that is truncated or corrupt.
    """
    image, format, orientation = _open(data, config or MediaConfig())
    with image:
        try:
            image.load()
            rgb = _to_rgb(image)
        except Exception as error:
            raise MediaError(f"The {format.upper()} image is truncated or corrupt.", code=Code.INVALID_IMAGE) from error
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
        # Not Pillow's factory function, which would use another plugin for a phone's file of several images (MPO).
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
        raise MediaError(f"The file is not an image in a supported format ({SUPPORTED}).", code=Code.INVALID_IMAGE)
    format, opener = found
    try:
        image = opener(BytesIO(data))
        width, height = image.size
    except Exception as error:  # a plugin can raise anything for a hostile header
        raise MediaError(
            f"The header of the {format.upper()} image is truncated or corrupt.", code=Code.INVALID_IMAGE
        ) from error
    if width < 1 or height < 1:
        raise MediaError("The image has no pixels.", code=Code.INVALID_IMAGE)
    if width * height > config.max_image_pixels:
        raise MediaError(
            f"The image has {width} x {height} pixels, which is more than the limit of {config.max_image_pixels:,}. Send a "
            "smaller one.",
            code=Code.IMAGE_TOO_LARGE,
        )
    return _Opened(image, format, _orientation(image))


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8. Ignores EXIF data after the pixels, which is known only once they are decoded."""
    block = image.info.get("exif")
    if not isinstance(block, bytes):
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        value = exif.get(_ORIENTATION_TAG)
    except Exception:  # broken EXIF data is no reason to refuse an image
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits per pixel. Pillow's own conversion to 8 bits clips at 255 instead of scaling.
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.mode in {"LA", "PA", "RGBA", "La", "RGBa"} or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    # A copy even if nothing is converted, since the file's own object is closed afterwards.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
