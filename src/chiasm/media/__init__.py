"""Media of requests: fetch their bytes once and safely, read their size, name them by content, decode them.

Nothing here needs torch or numpy: the proxy uses ``Fetcher``, ``inspect`` and ``identifier``; encoder instances use
``decode``.
"""

from typing import TYPE_CHECKING

from chiasm.lazy import names_from
from chiasm.media.config import MediaConfig

if TYPE_CHECKING:
    from chiasm.media.fetch import Fetcher
    from chiasm.media.identify import identifier
    from chiasm.media.image import ImageInfo, decode, inspect

__all__ = ["Fetcher", "ImageInfo", "MediaConfig", "decode", "identifier", "inspect"]
__getattr__ = names_from(
    __name__,
    {"Fetcher": "fetch", "ImageInfo": "image", "decode": "image", "identifier": "identify", "inspect": "image"},
)
