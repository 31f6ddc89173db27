"""The images of a request: what each role takes, and what it does with them.

Encoder and aggregated instances take images (``image_url``) and fetch them. The others take the names of embeddings that an
encoder publishes, with the metadata that sizes their placeholders (``image_embeds``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from chiasm.chat_body import refused_part
from chiasm.ec_transfer import check_identifier
from chiasm.errors import Code, InvalidRequestError
from chiasm.http import Exchange
from chiasm.http.fleet_calls import Caller, check_fleet
from chiasm.http.timing import TimingEntry
from chiasm.media import ImageInfo, identifier, inspect
from chiasm.media.url import is_data_url
from chiasm.models.base import ItemGeometry, Metadata, Pixels, Processor
from chiasm.server.context import EncodingEngine, GeneratingEngine, ServerContext
from chiasm.server.protocol import ChatRequest, ImageURL, Part

_T = TypeVar("_T")
_V = TypeVar("_V")
_IMAGE_URL = "image_url"
_IMAGE_EMBEDS = "image_embeds"
_HINTS = {
    _IMAGE_URL: "This instance has no encoder and takes no images; send the request to the proxy or to an aggregated "
    "instance.",
    _IMAGE_EMBEDS: "This instance encodes images itself; send them as image_url parts.",
}


class Image(NamedTuple):
    """An image that has been fetched."""

    identifier: str
    data: bytes
    info: ImageInfo


def _parts(request: ChatRequest, taken: str, max_items: int) -> list[Part]:
    """Return all parts of a chat that are not text, in order; each is of type ``taken`` and complete.

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
                if hint := _HINTS.get(part.type):
                    raise InvalidRequestError(f"{where} has the type {part.type!r}. {hint}", param="messages")
                raise refused_part(index, place, part.type)
            if getattr(part, taken) is None:
                raise InvalidRequestError(f"{where} has no {taken}.", param="messages")
            if part.uuid is not None:
                check_identifier(part.uuid)
            parts.append(part)
    if len(parts) > max_items:
        raise InvalidRequestError(
            f"The request has {len(parts)} images and {max_items} is the limit.",
            param="messages",
            code=Code.TOO_MANY_IMAGES,
        )
    return parts


# ---- names of embeddings -----------------------------------------------------------------------------------------------


def published_items(
    request: ChatRequest, processor: Processor, *, max_items: int, caller: Caller
) -> list[tuple[str, ItemGeometry]]:
    """Return identifier and geometry of each ``image_embeds`` part. Raises InvalidRequestError, ForbiddenError."""
    items: list[tuple[str, ItemGeometry]] = []
    seen: dict[str, ItemGeometry] = {}
    parts = _parts(request, _IMAGE_EMBEDS, max_items)
    if parts:
        check_fleet(caller, "Asking about an image by its name (image_embeds)")
    for part in parts:
        name = check_identifier(part.uuid)
        metadata = _metadata(part.image_embeds)
        try:
            geometry = processor.geometry_of_metadata(metadata)
        except InvalidRequestError as error:
            raise InvalidRequestError(error.message, param="messages", code=error.code) from None
        if seen.setdefault(name, geometry) != geometry:
            raise InvalidRequestError("Two parts with the same uuid differ in their size.", param="messages")
        items.append((name, geometry))
    return items


def _metadata(value: object) -> Metadata:
    """Return metadata as the processor takes it; vLLM sends the values of one item flat or nested by one level."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            'image_embeds must be an object with the size of the image, such as {"image_size": [height, width]}; '
            "tensors are not supported.",
            param="messages",
        )
    return {str(key): _flat(values) for key, values in value.items()}


def _flat(values: Any) -> Any:
    match values:
        case [list() as inner]:
            return inner
    return values


# ---- images ------------------------------------------------------------------------------------------------------------


async def fetch_images(
    context: ServerContext,
    exchange: Exchange,
    engine: GeneratingEngine | EncodingEngine,
    request: ChatRequest,
    *,
    salt: str,
    trust_names: bool = False,
) -> list[Image]:
    """Fetch, check and name the images of the ``image_url`` parts, all at the same time.

    They are named by their content. With ``trust_names``, the ``uuid`` of a part is such a name, computed by the proxy, and
    nobody else may give one: embeddings are found by these names, so a wrong one would answer about another image.

    Raises InvalidRequestError, ForbiddenError, MediaError, DeadlineExceededError.
    """

    turns = asyncio.Semaphore(context.config.media.max_fetches_per_request)

    async def fetch(part: Part) -> Image:
        url = part.image_url.url if isinstance(part.image_url, ImageURL) else part.image_url
        assert url is not None
        is_data = is_data_url(url)
        fetched = b""
        if is_data:
            exchange.hold(len(url) * 3 // 4)
        else:
            async with turns:
                fetched = await context.fetcher.fetch(url, exchange.hold)

        def examine() -> Image:
            data = context.fetcher.decode_data_url(url.encode(errors="replace")).data if is_data else fetched
            info = inspect(data, context.config.media)
            name = part.uuid if trust_names else None
            return Image(name or identifier(data, fingerprint=engine.model_fingerprint, salt=salt), data, info)

        return await context.in_thread(examine)

    parts = _parts(request, _IMAGE_URL, engine.config.max_items)
    if trust_names and any(part.uuid is not None for part in parts):
        check_fleet(exchange.caller, "Naming an image (uuid)")
    return await _for_each(exchange, "fetch", fetch, parts)


async def preprocess_images(
    context: ServerContext, exchange: Exchange, processor: Processor, images: Sequence[Image]
) -> dict[str, Pixels]:
    """Return pixels by identifier, with each distinct image once. Raises MediaError, DeadlineExceededError."""

    def preprocess(image: Image) -> Awaitable[Pixels]:
        return context.decode(image.data, image.info.pixels, processor.preprocess)

    distinct = {image.identifier: image for image in images}
    pixels = await _for_each(exchange, "preprocess", preprocess, list(distinct.values()))
    return dict(zip(distinct, pixels, strict=True))


async def _for_each(
    exchange: Exchange, timing_name: str, function: Callable[[_V], Awaitable[_T]], values: Sequence[_V]
) -> list[_T]:
    """Call an async function on all values at the same time, within the deadline; the first error cancels the rest."""
    if not values:
        return []
    started = time.monotonic()
    async with exchange.until_deadline():
        tasks = [asyncio.ensure_future(function(value)) for value in values]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    exchange.timing.append(TimingEntry(timing_name, time.monotonic() - started))
    return results
