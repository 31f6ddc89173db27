"""Images of a request: which parts an instance of each role takes, and what it makes of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from chiasm.ec_transfer import check_identifier
from chiasm.errors import InvalidRequestError
from chiasm.media import ImageInfo, decode, identifier, inspect
from chiasm.models.base import ItemGeometry, Metadata, Pixels, Processor
from chiasm.server.exchange import Exchange
from chiasm.server.protocol import ChatRequest, ImageURL, Part

if TYPE_CHECKING:
    from chiasm.engine.base import Engine

IMAGE_URL = "image_url"
IMAGE_EMBEDS = "image_embeds"
_NOT_HERE = {
    IMAGE_URL: "This instance has no encoder and takes no images: send the request to the proxy or to an aggregated "
    "instance.",
    IMAGE_EMBEDS: "This instance encodes images itself: send them as image_url parts.",
}


class ImageFile(NamedTuple):
    """An image of a request, fetched."""

    identifier: str
    data: bytes
    info: ImageInfo


def media_parts(request: ChatRequest, taken: str, max_items: int) -> list[Part]:
    """All parts of a chat that are not text, in order; each of type ``taken``, and complete.

    Raises InvalidRequestError.
    """
    parts: list[Part] = []
    for index, message in enumerate(request.messages):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            where = f"messages[{index}].content[{place}]"
            if part.type == "text":
                if part.text is None:
                    raise InvalidRequestError(f"{where} has no text.", param="messages")
                continue
            if part.type != taken:
                reason = _NOT_HERE.get(part.type, f"Content parts may be text or {taken} here.")
                raise InvalidRequestError(f"{where} has the type {part.type[:50]!r}. {reason}", param="messages")
            if getattr(part, taken) is None:
                raise InvalidRequestError(f"{where} has no {taken}.", param="messages")
            if part.uuid is not None:
                check_identifier(part.uuid)
            parts.append(part)
    if len(parts) > max_items:
        raise InvalidRequestError(
            f"The request has {len(parts)} images and {max_items} is the limit.",
            param="messages",
            code="too_many_items",
        )
    return parts


# ---- pd: what an encoder has published ---------------------------------------------------------------------------------


def published_items(processor: Processor, parts: Sequence[Part]) -> list[tuple[str, ItemGeometry]]:
    """Identifier and geometry of each ``image_embeds`` part. Raises InvalidRequestError."""
    items: list[tuple[str, ItemGeometry]] = []
    seen: dict[str, ItemGeometry] = {}
    for part in parts:
        name = check_identifier(part.uuid)
        geometry = processor.geometry_of_metadata(_metadata(part.image_embeds))
        if seen.setdefault(name, geometry) != geometry:
            raise InvalidRequestError("Two parts with the same uuid differ in their size.", param="messages")
        items.append((name, geometry))
    return items


def _metadata(value: object) -> Metadata:
    """Metadata as the processor takes it: vLLM sends the values of one item flat, or nested by one level."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            'image_embeds must be an object that gives the image\'s size, such as {"image_size": [height, width]}; '
            "tensors are not taken.",
            param="messages",
        )
    return {str(key): _flat(values) for key, values in value.items()}


def _flat(values: Any) -> Any:
    match values:
        case [list() as inner]:
            return inner
    return values


# ---- encoder and aggregated: images ----------------------------------------------------------------------------------


async def fetch_images(
    exchange: Exchange, engine: Engine, parts: Sequence[Part], *, salt: str = "", named: bool = False
) -> list[ImageFile]:
    """Fetch, check and name the images of ``image_url`` parts, all at once.

    Names are by content; with ``named``, a part's ``uuid`` is one already, made by whoever hashed the content before.

    Raises MediaError, and TimeoutError at the request's deadline.
    """
    started = time.monotonic()
    async with exchange.until_deadline():
        fetches = [asyncio.ensure_future(_fetch(exchange, engine, part, salt, named)) for part in parts]
        try:
            images = await asyncio.gather(*fetches)
        finally:
            for fetch in fetches:
                fetch.cancel()
    if parts:
        exchange.timing.fetch_seconds = time.monotonic() - started
    return images


async def _fetch(exchange: Exchange, engine: Engine, part: Part, salt: str, named: bool) -> ImageFile:
    instance = exchange.instance
    fetcher = instance.fetcher
    url = part.image_url.url if isinstance(part.image_url, ImageURL) else part.image_url
    assert url is not None
    is_data = url[:5].lower() == "data:"
    fetched = b"" if is_data else await fetcher.fetch(url)

    def examine() -> ImageFile:
        data = fetcher.decode_data_url(url.encode(errors="replace")) if is_data else fetched
        info = inspect(data, instance.config.media)
        name = part.uuid if named else None
        return ImageFile(name or identifier(data, fingerprint=engine.model_fingerprint, salt=salt), data, info)

    return await instance.in_thread(examine)


async def preprocess_images(exchange: Exchange, processor: Processor, images: Sequence[ImageFile]) -> dict[str, Pixels]:
    """Pixels by identifier, each distinct image once. Raises MediaError, and TimeoutError at the deadline."""
    if not images:
        return {}
    instance = exchange.instance
    started = time.monotonic()
    distinct = {image.identifier: image.data for image in images}

    def preprocess(data: bytes) -> Pixels:
        return processor.preprocess(decode(data, instance.config.media))

    async with exchange.until_deadline():
        jobs = [
            asyncio.ensure_future(instance.in_thread(lambda data=data: preprocess(data)))  # type: ignore[misc]
            for data in distinct.values()
        ]
        try:
            pixels = await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
    exchange.timing.preprocess_seconds = time.monotonic() - started
    return dict(zip(distinct, pixels, strict=True))
