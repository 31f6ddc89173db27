"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from chiasm.engine.request import GenerateRequest
from chiasm.server import encode, media
from chiasm.server.answer import Form, answer, engine_requests
from chiasm.server.chunks import ChatChunks
from chiasm.server.exchange import Exchange
from chiasm.server.generation import Choice
from chiasm.server.logprobs import chat_logprobs
from chiasm.server.prompts import chat_prompt, check_messages
from chiasm.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    decode,
    stream_options,
)
from chiasm.server.sampling import cache_salt, num_choices
from chiasm.server.stages import Stage, stage_of
from chiasm.wire import Role

if TYPE_CHECKING:
    from chiasm.engine.engine import LanguageEngine

_decoder = msgspec.json.Decoder(ChatRequest)


async def chat_completions(exchange: Exchange) -> None:
    """Answer a chat, or, on an encoder, encode its images."""
    instance = exchange.instance
    request = await instance.parse(lambda: decode(_decoder, exchange.body), len(exchange.body))
    instance.check_model(request.model)
    check_messages(request, instance.config.max_messages)
    if instance.is_encoder:
        await encode.encode_images(exchange, request)
    else:
        await _generate(exchange, request)


async def _generate(exchange: Exchange, request: ChatRequest) -> None:
    engine = exchange.instance.language_engine
    stage = stage_of(engine.config.role, request)
    requests = await _engine_requests(exchange, engine, request, stage)
    # The images as they came are large, and an answer may take long.
    request.messages = []
    exchange.release_body()
    await answer(exchange, engine, _FORM, stage, requests, stream_options(request))


async def _engine_requests(
    exchange: Exchange, engine: LanguageEngine, request: ChatRequest, stage: Stage
) -> Sequence[GenerateRequest]:
    """Media, then prompt, then pixels: what is cheap and may be wrong comes first."""
    num_choices(request)
    salt = cache_salt(request)
    if engine.config.role != Role.AGGREGATED:
        parts = media.media_parts(request, media.IMAGE_EMBEDS, engine.config.max_items)
        items = media.published_items(engine.processor, parts)
        async with exchange.until_deadline():
            prompt = await chat_prompt(exchange, engine, request, items)
        return engine_requests(exchange, engine, request, stage, [prompt])
    parts = media.media_parts(request, media.IMAGE_URL, engine.config.max_items)
    images = await media.fetch_images(exchange, engine, parts, salt=salt)
    items = [(name, engine.processor.geometry_of_size(info.height, info.width)) for name, _, info in images]
    async with exchange.until_deadline():
        prompt = await chat_prompt(exchange, engine, request, items)
    (generate,) = engine_requests(exchange, engine, request, stage, [prompt])
    return [replace(generate, pixels=await media.preprocess_images(exchange, engine.processor, images))]


def _choice(index: int, choice: Choice, logprobs: ChatLogprobs | None) -> ChatChoice:
    assert choice.finish_reason is not None
    return ChatChoice(
        index=index,
        message=AssistantMessage("".join(choice.text)),
        finish_reason=choice.finish_reason,
        logprobs=logprobs,
        stop_reason=choice.stop_reason,
    )


_FORM = Form(
    id_prefix="chatcmpl",
    chunks=ChatChunks,
    response=ChatResponse,
    choice=_choice,
    logprobs=lambda tokenizer, logprobs, _: chat_logprobs(tokenizer, logprobs),
)
