"""Images: fetched once, sized by their file's header, named by content."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

from chiasm.errors import Code, MediaError
from chiasm.http.body import Holder
from chiasm.media import Fetcher, identifier, inspect
from chiasm.media.data_url import encode_data_url
from chiasm.media.url import is_data_url
from chiasm.proxy.request import MediaPart

_PART_BYTES = 256
"""The greatest size of what a content part holds beside the image."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image. Equal bytes under one salt and fingerprint have one identifier."""

    identifier: str
    height: int
    width: int
    url: bytes
    """The image as a ``data:`` URL in plain base64; the client's own, if it sent such a one."""
    is_rewritten: bool
    """Whether the client's own URL had to be fetched, or is not in the form that every instance reads."""

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def part_bytes(self) -> int:
        """The size of its ``image_url_part``, about."""
        return len(self.url) + _PART_BYTES

    def image_url_part(self) -> bytes:
        """Return the content part that carries its bytes."""
        return b"".join(self.image_url_pieces())

    def image_url_pieces(self) -> tuple[bytes, ...]:
        """Return what joins to that part; joining large pieces lets other threads run."""
        # Neither value can hold a character that JSON would have to escape.
        uuid = b'"},"uuid":"%b"}' % self.identifier.encode()
        return b'{"type":"image_url","image_url":{"url":"', self.url, uuid

    def image_embeds_part(self) -> bytes:
        """Return the content part that stands for its embedding, sized by its pixels."""
        return embeds_part(self.identifier, b'{"image_size":[%d,%d]}' % (self.height, self.width))


class Items(NamedTuple):
    """A request's images in the order of its media parts; an image that occurs twice is listed twice."""

    items: list[Item]
    fetch_seconds: float | None
    """Wall time of fetching; None if there was nothing to fetch."""
    fetches: dict[int, tuple[float, float]]
    """When an image was fetched, by its index, on the clock of ``time.monotonic``."""


def embeds_part(identifier: str, metadata: bytes) -> bytes:
    """Return the content part that stands for an embedding, sized by the encoder's ``metadata`` (JSON)."""
    return b'{"type":"image_embeds","image_embeds":%b,"uuid":"%b"}' % (metadata, identifier.encode())


async def read_items(
    parts: Sequence[MediaPart],
    *,
    fetcher: Fetcher,
    executor: Executor,
    fingerprint: str,
    salt: str,
    holder: Holder,
) -> Items:
    """Read all images at the same time, each distinct URL once; the first failure ends the others.

    ``holder`` is told how many bytes are in memory in addition to the body. Raises MediaError and what ``holder`` raises.
    """
    loop = asyncio.get_running_loop()
    fetched: dict[bytes, tuple[float, float]] = {}
    started = time.monotonic()
    turns = asyncio.Semaphore(fetcher.config.max_fetches_per_request)

    async def read(url: bytes) -> Item:
        if is_data_url(url):
            item = await loop.run_in_executor(executor, _item_of_data_url, fetcher, url, fingerprint, salt)
            if item.url is not url:
                holder.hold(len(item.url))
            return item
        arrived_bytes = 0

        def hold(size_bytes: int) -> None:
            nonlocal arrived_bytes
            holder.hold(size_bytes)
            arrived_bytes += size_bytes

        async with turns:
            began = time.monotonic()
            data = await fetcher.fetch(_text(url), hold)
        fetched[url] = began, time.monotonic()
        holder.hold(len(data) * 4 // 3)
        item = await loop.run_in_executor(executor, _item_of_bytes, fetcher, data, fingerprint, salt)
        holder.give_back(arrived_bytes)
        return item

    # data: URLs aren't compared: hashing one takes as long as reading it.
    distinct: dict[bytes | int, bytes] = {}
    keys = [part.url if not is_data_url(part.url) else index for index, part in enumerate(parts)]
    for key, part in zip(keys, parts, strict=True):
        distinct[key] = part.url
    if len(distinct) == 1:
        by_key = {key: await read(url) for key, url in distinct.items()}
    else:
        tasks = [asyncio.ensure_future(read(url)) for url in distinct.values()]
        try:
            by_key = dict(zip(distinct, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
    fetch_seconds = max(end for _, end in fetched.values()) - started if fetched else None
    fetches = {index: fetched[part.url] for index, part in enumerate(parts) if part.url in fetched} if fetched else {}
    return Items([by_key[key] for key in keys], fetch_seconds, fetches)


def _text(url: bytes) -> str:
    try:
        return url.decode()
    except UnicodeDecodeError:
        raise MediaError("The media URL is not valid UTF-8.", code=Code.INVALID_URL) from None


def _item_of_data_url(fetcher: Fetcher, url: bytes, fingerprint: str, salt: str) -> Item:
    found = fetcher.decode_data_url(url)
    info = inspect(found.data, fetcher.config)
    name = identifier(found.data, fingerprint=fingerprint, salt=salt)
    # The media type that the client gives isn't trusted; the file's bytes decide.
    header = b"data:%b;base64," % info.media_type.encode()
    if not found.is_plain or not url.startswith(header):
        url = b"".join((header, found.base64))
    return Item(name, info.height, info.width, url, is_rewritten=not found.is_plain)


def _item_of_bytes(fetcher: Fetcher, data: bytes, fingerprint: str, salt: str) -> Item:
    info = inspect(data, fetcher.config)
    name = identifier(data, fingerprint=fingerprint, salt=salt)
    url = encode_data_url(info.media_type, data)
    return Item(name, info.height, info.width, url, is_rewritten=True)
