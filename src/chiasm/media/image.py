"""Images: their name, their size from the header alone, and their pixels.

``inspect`` and ``decode`` take size and rotation from the same function, so that the encoder sees an image of the size that
the proxy has told the PD. Before Pillow reads a header, the format's ``walk`` has bounded what that costs. What decoding costs
is bounded by ``decoder``.
"""

from __future__ import annotations

import logging
import warnings
from io import BytesIO
from typing import NamedTuple

from blake3 import blake3
from PIL import Image, ImageFile, PngImagePlugin

from chiasm.errors import Code, MediaError
from chiasm.media.config import MediaConfig
from chiasm.media.formats import SUPPORTED, Format, format_of, other_kind
from chiasm.media.headers.steps import UNKNOWN, ExcessiveHeaderError, Steps

# max_image_pixels is always enforced. Pillow's own limit is higher and only warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Clients can send broken metadata at will; it must not fill the log.
warnings.filterwarnings("ignore", module=r"PIL\.")
# In a log of all levels, it has one or two lines for each part of a file, and a file has as many parts as a client likes.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# Of all text chunks together, decompressed; one of them may have 1 MiB.
PngImagePlugin.MAX_TEXT_MEMORY = 8 << 20

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
_QUICK_PIXELS = 64_000_000
"""Decoding goes over at most so many pixels in the caller's thread, each scan of a JPEG counted."""
_SIDES_SWAPPED = 5
"""Orientations from here on swap height and width."""
_WITHOUT_SCALE = {
    "F": "32-bit floating-point numbers",
    "I": "32-bit integers",
    "LAB": "Lab colours",
}
"""Modes of Pillow that say nothing of what is black and what is white, or that it can't convert."""


class ImageInfo(NamedTuple):
    """What the header of an image says."""

    height: int
    """In pixels, after EXIF rotation."""
    width: int
    """In pixels, after EXIF rotation."""
    format: str
    """As in its media type: a ``key`` of ``media.formats``."""

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
    the data is not an image in a supported format, if its header is truncated or has more parts than an image needs, or if it
    has more pixels than ``config.max_image_pixels``.
    """
    opened = _open(data, config or MediaConfig())
    opened.image.close()
    return ImageInfo(opened.height, opened.width, opened.format.key)


def decode(data: bytes, config: MediaConfig | None = None) -> Image.Image:
    """Return the image as RGB, with the size that ``inspect`` returns. Blocks, so call it in a thread.

    Applies the EXIF rotation, takes the first frame of an animation or page of a document, puts transparent parts on white,
    scales 16 bits per channel to 8, and converts CMYK without a colour profile. Raises MediaError for everything that
    ``inspect`` refuses and for pixel data that is truncated or corrupt.

    A hostile file takes as long as it likes. Servers use a ``Decoder``, which bounds that.
    """
    return _load(_open(data, config or MediaConfig()))


def decode_quickly(data: bytes, config: MediaConfig) -> Image.Image | None:
    """Return what ``decode`` does; None if the header doesn't show that this takes little time for the image's size."""
    opened = _open(data, config)
    if opened.passes is UNKNOWN or opened.passes * opened.width * opened.height > _QUICK_PIXELS:
        opened.image.close()
        return None
    return _load(opened)


def _load(opened: _Opened) -> Image.Image:
    with opened.image as image:
        try:
            image.load()
            rgb = _to_rgb(image)
        except Exception as error:
            raise _corrupt(f"The {opened.format.name} image") from error
    if opened.turn is not None:
        rgb = rgb.transpose(opened.turn)
    if rgb.size != (opened.width, opened.height):
        raise _corrupt(f"The header of the {opened.format.name} image")
    return rgb


class _Opened(NamedTuple):
    image: ImageFile.ImageFile
    format: Format
    height: int
    """In pixels, after rotation."""
    width: int
    turn: Image.Transpose | None
    """What Pillow's plugin leaves to be done after loading."""
    passes: int | None
    """How often decoding goes over the pixels; UNKNOWN if the header doesn't say."""


def _open(data: bytes, config: MediaConfig) -> _Opened:
    format = format_of(data)
    if format is None:
        kind = other_kind(data)
        found = (
            f"The file is {kind}. Send {SUPPORTED}."
            if kind
            else f"The file is not an image in a supported format ({SUPPORTED})."
        )
        raise MediaError(found, code=Code.INVALID_IMAGE)
    is_tiff = format.key == "tiff"
    try:
        passes = format.walk(data, Steps(), config.max_image_pixels)
        image = format.open(BytesIO(data))
        width, height = image.size
    except ExcessiveHeaderError as error:
        raise MediaError(
            f"The header of the {format.name} image asks for more than an image needs: {error}. Save the image again with "
            "another program.",
            code=Code.INVALID_IMAGE,
        ) from None
    except Exception as error:  # a plugin can raise anything for a hostile header
        raise _corrupt(f"The header of the {format.name} image") from error
    if width < 1 or height < 1:
        raise MediaError("The image has no pixels.", code=Code.INVALID_IMAGE)
    if width * height > config.max_image_pixels:
        raise MediaError(
            f"The image has {width} x {height} pixels, which is more than the limit of {config.max_image_pixels:,}. Send a "
            "smaller one.",
            code=Code.IMAGE_TOO_LARGE,
        )
    if is_tiff and image.mode in _WITHOUT_SCALE:
        raise MediaError(
            f"The TIFF image holds {_WITHOUT_SCALE[image.mode]}. Send one with 8 or 16 bits per channel, in grey, RGB or CMYK.",
            code=Code.INVALID_IMAGE,
        )
    orientation = _orientation(image)
    # Of a TIFF, Pillow rotates the pixels itself, and swaps the sides in advance if a tag says so, but not if XMP says so.
    is_swapped = is_tiff and image.tag_v2.get(_ORIENTATION_TAG) in range(_SIDES_SWAPPED, 9)  # type: ignore[attr-defined]
    if orientation >= _SIDES_SWAPPED and not is_swapped:
        height, width = width, height
    return _Opened(image, format, height, width, None if is_tiff else _TRANSPOSE.get(orientation), passes)


def _corrupt(what: str) -> MediaError:
    return MediaError(f"{what} is truncated or corrupt.", code=Code.INVALID_IMAGE)


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the orientation, 1 to 8, from EXIF or XMP data. Ignores what is behind the pixels, as only decoding finds it."""
    try:
        # Not the method of the plugin for PNG, which decodes the pixels first.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG)
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
