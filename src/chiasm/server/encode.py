"""The chat endpoint of an encoder: images in, published embeddings out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import msgspec

from chiasm.engine.request import EncodedItem, EncodeItem
from chiasm.errors import InvalidRequestError
from chiasm.http import Exchange
from chiasm.http.timing import TimingEntry, write_timing
from chiasm.server.context import EncodingEngine, ServerContext
from chiasm.server.images import fetch_images
from chiasm.server.prefill_decode import answer_part
from chiasm.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatRequest,
    PromptTokensDetails,
    Response,
    Usage,
)
from chiasm.server.sampling import cache_salt
from chiasm.wire import ECItem


async def encode_images(
    context: ServerContext,
    exchange: Exchange,
    engine: EncodingEngine,
    request: ChatRequest,
    long_urls: Mapping[bytes, bytes],
) -> None:
    """Encode the images of a chat without text and publish the embeddings, each under its ``uuid``.

    ``long_urls`` are those for which the chat has stand-ins. An image without ``uuid`` is named by its content. The response
    says how to size the placeholders of each image.
    """
    answer_part(engine.config.role, request)
    if request.stream:
        raise InvalidRequestError("An encoder does not stream; send stream=false.", param="stream")
    _refuse_text(request)
    images = await fetch_images(
        context, exchange, engine, request, long_urls, salt=cache_salt(request), trust_names=True
    )
    if not images:
        raise InvalidRequestError("There is no image to encode.", param="messages")

    distinct = {image.identifier: image for image in images}
    encoded = await engine.encode(
        context.unique_id(exchange.request_id),
        [EncodeItem(name, image.data, image.info.height, image.info.width) for name, image in distinct.items()],
        exchange.deadline,
    )

    by_name = {item.identifier: item for item in encoded}
    item_indices: dict[str, list[int]] = {name: [] for name in distinct}
    for index, image in enumerate(images):
        item_indices[image.identifier].append(index)
    response = Response(
        id=f"chatcmpl-{exchange.request_id}",
        object="chat.completion",
        created=int(time.time()),
        model=context.model,
        choices=[ChatChoice(index=0, message=AssistantMessage(""), finish_reason="stop")],
        usage=Usage(0, 0, 0, PromptTokensDetails(0)),
        ec_transfer_params={
            name: ECItem(item_indices=indices, metadata=msgspec.Raw(msgspec.json.encode(by_name[name].metadata)))
            for name, indices in item_indices.items()
        },
    )
    timing = _server_timing(exchange, encoded, [by_name[image.identifier] for image in images])
    await exchange.reply(msgspec.json.encode(response), headers=[("server-timing", timing)])


def _refuse_text(request: ChatRequest) -> None:
    for message in request.messages:
        content = message.content or ""
        if content if isinstance(content, str) else any(part.type == "text" for part in content):
            raise InvalidRequestError(
                "This instance is an encoder and takes images only; send text to a pd or aggregated instance, or to the "
                "proxy.",
                param="messages",
            )


def _server_timing(exchange: Exchange, encoded: Sequence[EncodedItem], in_order: Sequence[EncodedItem]) -> str:
    """Return the ``Server-Timing``; ``in_order`` has one entry for each image of the request, so an item may occur twice."""
    return write_timing(
        [
            *exchange.timing,
            TimingEntry("queue", max(item.queue_seconds for item in encoded)),
            TimingEntry("preprocess", sum(item.preprocess_seconds for item in encoded)),
            TimingEntry("encode", sum(item.encode_seconds for item in encoded)),
            TimingEntry("publish", sum(item.publish_seconds for item in encoded)),
            TimingEntry("total", time.monotonic() - exchange.arrival),
            *(
                TimingEntry(
                    f"item{index}",
                    item.queue_seconds + item.preprocess_seconds + item.encode_seconds + item.publish_seconds,
                    item.outcome,
                )
                for index, item in enumerate(in_order)
            ),
            *(stage for index, item in enumerate(in_order) for stage in _stages(exchange, index, item)),
        ]
    )


def _stages(exchange: Exchange, index: int, item: EncodedItem) -> list[TimingEntry]:
    """Return when the stages of one image were; they may have begun for another request."""
    if item.began is None:
        return []
    seconds = (item.preprocess_seconds, item.encode_seconds, item.publish_seconds)
    return [
        TimingEntry(f"{name}{index}", took, at=max(0.0, began - exchange.arrival))
        for name, took, began in zip(item.began._fields, seconds, item.began, strict=True)
    ]
