"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from chiasm.engine.request import GenerateRequest
from chiasm.models.base import ItemGeometry, Pixels
from chiasm.server import encode, media
from chiasm.server.chunks import ChatChunks
from chiasm.server.exchange import Exchange
from chiasm.server.generation import Choice, Generation, Step
from chiasm.server.logprobs import chat_logprobs
from chiasm.server.prompts import chat_prompt, check_messages
from chiasm.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    StreamOptions,
    decode,
)
from chiasm.server.sampling import cache_salt, num_choices, sampling_of
from chiasm.server.streaming import stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chiasm.engine.engine import LanguageEngine
    from chiasm.engine.request import TokenLogprobs

_decoder = msgspec.json.Decoder(ChatRequest)


async def chat_completions(exchange: Exchange) -> None:
    """Answer a chat, or, on an encoder, encode its pictures."""
    instance = exchange.instance
    request = await instance.parse(lambda: decode(_decoder, exchange.body), len(exchange.body))
    instance.check_model(request.model)
    check_messages(request, instance.config.max_messages)
    if instance.is_encoder:
        await encode.encode_pictures(exchange, request)
    else:
        await _generate(exchange, request)


async def _generate(exchange: Exchange, request: ChatRequest) -> None:
    engine = exchange.instance.language_engine
    generation = Generation(exchange, engine, [await _engine_request(exchange, engine, request)])
    answer_id = f"chatcmpl-{exchange.request_id}"
    tokenizer = engine.processor.tokenizer
    if request.stream:
        options = request.stream_options or StreamOptions()
        chunks = ChatChunks(
            answer_id,
            exchange.created,
            exchange.instance.model,
            len(generation.choices),
            announces_usage=bool(options.include_usage),
        )

        def logprobs(step: Step) -> ChatLogprobs | None:
            return _logprobs(tokenizer, step.output.logprobs)

        preamble = b"".join(chunks.role(index) for index in range(len(generation.choices)))
        await stream(exchange, generation, chunks, logprobs, options, preamble)
        return
    choices = await generation.collect()
    response = ChatResponse(
        id=answer_id,
        created=exchange.created,
        model=exchange.instance.model,
        choices=[_choice(index, choice, tokenizer, bool(request.logprobs)) for index, choice in enumerate(choices)],
        usage=generation.usage(),
    )
    await exchange.reply(
        msgspec.json.encode(response), headers=[("server-timing", generation.server_timing(ended=True))]
    )


async def _engine_request(exchange: Exchange, engine: LanguageEngine, request: ChatRequest) -> GenerateRequest:
    """Media, then prompt, then pixels: what is cheap and may be wrong comes first."""
    choices = num_choices(request)
    salt = cache_salt(request)
    items: list[tuple[str, ItemGeometry]]
    pictures: list[media.Picture] = []
    if engine.config.role == "aggregated":
        parts = media.media_parts(request, media.IMAGE_URL, engine.config.max_items)
        pictures = await media.fetch_pictures(exchange, engine, parts, salt=salt)
        items = [(name, engine.processor.geometry_of_size(info.height, info.width)) for name, _, info in pictures]
    else:
        parts = media.media_parts(request, media.IMAGE_EMBEDS, engine.config.max_items)
        items = media.published_items(engine.processor, parts)
    async with exchange.until_deadline():
        prompt = await chat_prompt(exchange, engine, request, items)
    sampling = sampling_of(
        request, engine.processor.default_sampling, room_tokens=engine.max_model_len - len(prompt.token_ids)
    )
    pixels: dict[str, Pixels] = await media.preprocess_pictures(exchange, engine.processor, pictures)
    # The pictures as they came are large, and an answer may take long.
    request.messages = []
    exchange.release_body()
    return GenerateRequest(
        request_id=exchange.engine_id,
        prompt=prompt,
        sampling=sampling,
        deadline=exchange.deadline,
        num_choices=choices,
        pixels=pixels,
        cache_salt=salt,
    )


def _choice(index: int, choice: Choice, tokenizer: Tokenizer, wants_logprobs: bool) -> ChatChoice:
    assert choice.finish_reason is not None
    return ChatChoice(
        index=index,
        message=AssistantMessage("".join(choice.text)),
        finish_reason=choice.finish_reason,
        logprobs=chat_logprobs(tokenizer, choice.logprobs) if wants_logprobs else None,
        stop_reason=choice.stop_reason,
    )


def _logprobs(tokenizer: Tokenizer, logprobs: tuple[TokenLogprobs, ...] | None) -> ChatLogprobs | None:
    return None if logprobs is None else chat_logprobs(tokenizer, logprobs)
