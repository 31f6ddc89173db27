"""What an encoder answers to a chat that holds nothing but images."""

from __future__ import annotations

from typing import Any

import msgspec

from chiasm.engine.request import EncodedItem, EncodeItem
from chiasm.errors import InvalidRequestError
from chiasm.server import media
from chiasm.server.exchange import Exchange
from chiasm.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    PromptTokensDetails,
    Usage,
)
from chiasm.server.sampling import cache_salt
from chiasm.server.stages import stage_of


async def encode_images(exchange: Exchange, request: ChatRequest) -> None:
    """Encode and publish the images under their ``uuid``, and say what sizes their placeholders.

    An image without one is named by its content.
    """
    engine = exchange.instance.encoder_engine
    stage_of(engine.config.role, request)
    if request.stream:
        raise InvalidRequestError("An encoder does not stream; send stream=false.", param="stream")
    parts = media.media_parts(request, media.IMAGE_URL, engine.config.max_items)
    _refuse_text(request)
    if not parts:
        raise InvalidRequestError("There is no image to encode.", param="messages")
    images = await media.fetch_images(exchange, engine, parts, salt=cache_salt(request), named=True)
    names = [image.identifier for image in images]
    by_identifier = dict(zip(names, images, strict=True))
    distinct = [
        EncodeItem(name, image.data, image.info.height, image.info.width) for name, image in by_identifier.items()
    ]
    encoded = await engine.encode(exchange.engine_id, distinct, exchange.deadline)
    by_name = {item.identifier: item for item in encoded}
    response = ChatResponse(
        id=f"chatcmpl-{exchange.request_id}",
        created=exchange.created,
        model=exchange.instance.model,
        choices=[ChatChoice(index=0, message=AssistantMessage(""), finish_reason="stop")],
        usage=Usage(0, 0, 0, PromptTokensDetails(0)),
        ec_transfer_params=_ec_transfer_params(names, by_name),
    )
    timing = exchange.timing.encoder_header([by_name[name] for name in names])
    await exchange.reply(msgspec.json.encode(response), headers=[("server-timing", timing)])


def _ec_transfer_params(names: list[str], by_name: dict[str, EncodedItem]) -> dict[str, dict[str, Any]]:
    """By identifier: the places of the item among the request's images, and its metadata."""
    params: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        entry = params.setdefault(name, {"item_indices": [], "metadata": by_name[name].metadata})
        entry["item_indices"].append(index)
    return params


def _refuse_text(request: ChatRequest) -> None:
    for message in request.messages:
        if isinstance(message.content, str) and message.content:
            break
        if isinstance(message.content, list) and any(part.type == "text" for part in message.content):
            break
    else:
        return
    raise InvalidRequestError(
        "This instance is an encoder and takes images only; send text to a pd or aggregated instance, or to the proxy.",
        param="messages",
    )
