"""The two endpoints that generate text: from the body of a request to its answer, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec

from chiasm.engine.pace import prompt_work
from chiasm.engine.request import GenerateRequest
from chiasm.engine.shares import largest_share
from chiasm.http import Exchange
from chiasm.http.fleet_calls import check_fleet
from chiasm.http.json_size import INLINE_BYTES, check_text_size
from chiasm.http.lifted import Lifted, read_lifted
from chiasm.models.base import Prompt
from chiasm.server.answer import answer_as_stream, answer_whole
from chiasm.server.answer_format import AnswerFormat, ChatFormat, CompletionFormat
from chiasm.server.context import EncodingEngine, GeneratingEngine, ServerContext
from chiasm.server.encode import encode_images
from chiasm.server.generation import Generation
from chiasm.server.images import Image, fetch_images, image_urls, preprocess_images, published_items
from chiasm.server.kv_release import held_for_sender
from chiasm.server.prefill_decode import AnswerPart, answer_part, engine_requests
from chiasm.server.prompt import chat_prompt, check_messages, completion_prompt, given_prompts
from chiasm.server.protocol import ChatRequest, CompletionRequest, GenerationFields, StreamOptions, decode
from chiasm.server.sampling import cache_salt, check_answers, num_choices, sampling_params
from chiasm.server.structured_output import grammar_of, is_free
from chiasm.server.tool_answer import ToolChatFormat
from chiasm.server.tools import tools_of
from chiasm.wire import Role

if TYPE_CHECKING:
    from chiasm.engine.grammar import Grammar

_T = TypeVar("_T")
_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)


async def chat_completions(context: ServerContext, exchange: Exchange) -> None:
    """Answer a chat; an encoder encodes its images instead.

    The steps are in this order so that what is cheap to check is checked first: fields, grammar, images, prompt, pixels.
    """
    request, lifted = await _beside(exchange, context, partial(_read_chat, context))
    exchange.body = lifted.body
    context.check_model(request.model)
    check_messages(request, max_messages=context.config.max_messages, max_parts=context.config.max_parts)
    if isinstance(context.engine, EncodingEngine):
        await encode_images(context, exchange, context.engine, request, lifted.urls)
        return

    engine = context.generating_engine
    part = _part(exchange, engine, request)
    tools = tools_of(request, engine.processor.tool_format)
    grammar = await grammar_of(context, exchange, engine, request, tools)
    salt = cache_salt(request)
    images: list[Image] = []
    if engine.config.role is Role.AGGREGATED:
        images = await fetch_images(context, exchange, engine, request, lifted.urls, salt=salt)
        items = [
            (image.identifier, engine.processor.geometry_of_size(image.info.height, image.info.width))
            for image in images
        ]
    else:
        items = published_items(request, engine.processor, max_items=engine.config.max_items, caller=exchange.caller)
    prompt = await chat_prompt(context, exchange, engine, request, items, tools.shown if tools else ())
    requests = _engine_requests(context, exchange, engine, request, part, [prompt], grammar)
    if images:
        pixels = await preprocess_images(context, exchange, engine.processor, images)
        requests = [replace(generate, pixels=pixels) for generate in requests]
    # The images are large, and generating may take long.
    del images, lifted
    request.messages = []
    request.tools = None
    exchange.release()
    answer_format = partial(ToolChatFormat, tools.format, after_text=is_free(request)) if tools else ChatFormat
    del tools
    await _answer(context, exchange, engine, answer_format, request, part, requests)


async def completions(context: ServerContext, exchange: Exchange) -> None:
    """Continue one or several prompts."""
    engine = context.generating_engine
    request, given = await _beside(exchange, context, partial(_read_completion, context))
    context.check_model(request.model)
    part = _part(exchange, engine, request, num_prompts=len(given))
    grammar = await grammar_of(context, exchange, engine, request)
    prompts = [await completion_prompt(context, exchange, engine, request, prompt) for prompt in given]
    requests = _engine_requests(context, exchange, engine, request, part, prompts, grammar)
    await _answer(context, exchange, engine, CompletionFormat, request, part, requests)


def _read_chat(context: ServerContext, body: bytes) -> tuple[ChatRequest, Lifted]:
    """Return the chat in a body, and the long URLs of its images, for which it has stand-ins. Raises InvalidRequestError."""
    return read_lifted(body, context.config.http.max_text_bytes, partial(decode, _chat_decoder), image_urls)


def _read_completion(context: ServerContext, body: bytes) -> tuple[CompletionRequest, list[str | list[int]]]:
    """Return the text completion in a body, and its prompts. Raises InvalidRequestError."""
    check_text_size(body, context.config.http.max_text_bytes)
    request = decode(_completion_decoder, body)
    return request, given_prompts(request, max_prompts=context.config.max_prompts)


async def _beside(exchange: Exchange, context: ServerContext, read: Callable[[bytes], _T]) -> _T:
    """Return what ``read`` makes of the body; of a large one, beside the event loop."""
    body = exchange.body
    if len(body) <= INLINE_BYTES:
        return read(body)
    async with exchange.until_deadline():
        return await context.in_thread(partial(read, body))


def _part(
    exchange: Exchange, engine: GeneratingEngine, request: GenerationFields, *, num_prompts: int = 1
) -> AnswerPart:
    """Return which part of the answer is made here. Raises InvalidRequestError, and ForbiddenError for a stranger's KV."""
    role = engine.config.role
    if request.kv_transfer_params is not None and role in (Role.PREFILL, Role.DECODE):
        check_fleet(exchange.caller, "Handing KV over (kv_transfer_params)")
    return answer_part(role, request, num_prompts=num_prompts)


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
    choices = num_choices(request)
    check_answers(len(prompts) * choices, largest_share(engine.config.max_queued_requests))
    work_tokens = sum(prompt_work(prompt) for prompt in prompts)
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
                answers=len(prompts) * choices,
            ),
            deadline=exchange.deadline,
            part_of=request_id,
            key=context.key_of(exchange),
            work_tokens=work_tokens,
            num_choices=choices,
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
    with held_for_sender(engine, part.given):
        if request.stream:
            await answer_as_stream(exchange, generation, part, written, options)
        else:
            await answer_whole(exchange, generation, part, written, context.in_thread)
