"""The images of requests: how they are fetched, inspected, named and decoded.

An image passes the files in this order: ``fetch`` gets its bytes (from a ``data_url``, or over HTTP from a ``url`` whose
``addresses``, found by a ``resolver``, are allowed, with the ``content_encoding`` undone), ``formats`` says what kind of
file it is, ``headers`` bounds what its header may cost, and ``image`` reads its size, names it by content and decodes it,
within the limits of ``config``. ``decoder`` bounds what decoding may cost, with the help of a ``decoding_process``. The
proxy uses ``Fetcher``, ``inspect`` and ``identifier``; encoders also use ``Decoder``. Nothing here loads torch.
"""

from typing import TYPE_CHECKING

from chiasm.lazy import names_from
from chiasm.media.config import MediaConfig

if TYPE_CHECKING:
    from chiasm.media.fetch import Fetcher
    from chiasm.media.image import ImageInfo, decode, identifier, inspect

__all__ = ["Fetcher", "ImageInfo", "MediaConfig", "decode", "identifier", "inspect"]
__getattr__ = names_from(
    __name__,
    {"Fetcher": "fetch", "ImageInfo": "image", "decode": "image", "identifier": "image", "inspect": "image"},
)
