"""The two endpoints that generate text: from the body of a request to its answer, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from chiasm.engine.request import GenerateRequest
from chiasm.http import Exchange
from chiasm.models.base import Prompt
from chiasm.server.answer import answer_as_stream, answer_whole
from chiasm.server.answer_format import AnswerFormat, ChatFormat, CompletionFormat
from chiasm.server.context import EncodingEngine, GeneratingEngine, ServerContext
from chiasm.server.encode import encode_images
from chiasm.server.generation import Generation
from chiasm.server.images import Image, fetch_images, preprocess_images, published_items
from chiasm.server.prefill_decode import AnswerPart, answer_part, engine_requests
from chiasm.server.prompt import chat_prompt, check_messages, completion_prompt, given_prompts
from chiasm.server.protocol import ChatRequest, CompletionRequest, StreamOptions, decode
from chiasm.server.sampling import cache_salt, num_choices, sampling_params
from chiasm.server.structured_output import grammar_of
from chiasm.server.tool_answer import ToolChatFormat
from chiasm.server.tools import tools_of
from chiasm.wire import Role

if TYPE_CHECKING:
    from chiasm.engine.grammar import Grammar

_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)


async def chat_completions(context: ServerContext, exchange: Exchange) -> None:
    """Answer a chat; an encoder encodes its images instead.

    The steps are in this order so that what is cheap to check is checked first: fields, grammar, images, prompt, pixels.
    """
    request = decode(_chat_decoder, exchange.body)
    context.check_model(request.model)
    check_messages(request, max_messages=context.config.max_messages)
    if isinstance(context.engine, EncodingEngine):
        await encode_images(context, exchange, context.engine, request)
        return

    engine = context.generating_engine
    part = answer_part(engine.config.role, request)
    tools = tools_of(request, engine.processor.tool_format)
    grammar = await grammar_of(context, exchange, engine, request, tools)
    salt = cache_salt(request)
    images: list[Image] = []
    if engine.config.role is Role.AGGREGATED:
        images = await fetch_images(context, exchange, engine, request, salt=salt)
        items = [
            (image.identifier, engine.processor.geometry_of_size(image.info.height, image.info.width))
            for image in images
        ]
    else:
        items = published_items(request, engine.processor, max_items=engine.config.max_items)
    prompt = await chat_prompt(context, exchange, engine, request, items, tools.shown if tools else ())
    requests = _engine_requests(context, exchange, engine, request, part, [prompt], grammar)
    if images:
        pixels = await preprocess_images(context, exchange, engine.processor, images)
        requests = [replace(generate, pixels=pixels) for generate in requests]
    # The images are large, and generating may take long.
    del images
    request.messages = []
    request.tools = None
    exchange.release()
    answer_format = partial(ToolChatFormat, tools.format) if tools else ChatFormat
    del tools
    await _answer(context, exchange, engine, answer_format, request, part, requests)


async def completions(context: ServerContext, exchange: Exchange) -> None:
    """Continue one or several prompts."""
    engine = context.generating_engine
    request = decode(_completion_decoder, exchange.body)
    context.check_model(request.model)
    given = given_prompts(request, max_prompts=context.config.max_prompts)
    part = answer_part(engine.config.role, request, num_prompts=len(given))
    grammar = await grammar_of(context, exchange, engine, request)
    prompts = [await completion_prompt(context, exchange, engine, prompt) for prompt in given]
    requests = _engine_requests(context, exchange, engine, request, part, prompts, grammar)
    await _answer(context, exchange, engine, CompletionFormat, request, part, requests)


def _engine_requests(
    context: ServerContext,
    exchange: Exchange,
    engine: GeneratingEngine,
    request: ChatRequest | CompletionRequest,
    part: AnswerPart,
    prompts: Sequence[Prompt],
    grammar: Grammar | None,
) -> Sequence[GenerateRequest]:
    """Return what the engine does for the prompts. Raises InvalidRequestError."""
    request_id = context.unique_id(exchange.request_id)
    whole = [
        GenerateRequest(
            request_id=f"{request_id}-{index}",
            prompt=prompt,
            sampling=sampling_params(
                request,
                engine.processor,
                grammar,
                context_tokens=engine.max_model_len,
                prompt_tokens=len(prompt.token_ids),
            ),
            deadline=exchange.deadline,
            num_choices=num_choices(request),
            cache_salt=cache_salt(request),
        )
        for index, prompt in enumerate(prompts)
    ]
    return engine_requests(part, whole, vocab_size=engine.processor.vocab_size)


async def _answer(
    context: ServerContext,
    exchange: Exchange,
    engine: GeneratingEngine,
    answer_format: Callable[..., AnswerFormat],
    request: ChatRequest | CompletionRequest,
    part: AnswerPart,
    requests: Sequence[GenerateRequest],
) -> None:
    """Generate, and answer with one body or a stream."""
    options = request.stream_options or StreamOptions()
    generation = Generation(exchange, engine, context.metrics, requests)
    written = answer_format(
        exchange.request_id,
        int(time.time()) if part.created is None else part.created,
        context.model,
        engine.processor.tokenizer,
        num_choices=len(generation.choices),
        has_logprobs=requests[0].sampling.logprobs is not None,
        skip_special_tokens=requests[0].sampling.skip_special_tokens,
        announces_usage=bool(options.include_usage),
    )
    if request.stream:
        await answer_as_stream(exchange, generation, part, written, options)
    else:
        await answer_whole(exchange, generation, part, written)
