"""POST /v1/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from chiasm.engine.request import GenerateRequest
from chiasm.server.chunks import CompletionChunks
from chiasm.server.exchange import Exchange
from chiasm.server.generation import Choice, Generation, Step
from chiasm.server.logprobs import completion_logprobs
from chiasm.server.prompts import completion_prompts
from chiasm.server.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    StreamOptions,
    decode,
)
from chiasm.server.sampling import cache_salt, num_choices, sampling_of
from chiasm.server.streaming import stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chiasm.engine.engine import LanguageEngine

_decoder = msgspec.json.Decoder(CompletionRequest)


async def completions(exchange: Exchange) -> None:
    """Continue one or several prompts."""
    engine = exchange.instance.language_engine
    request = await exchange.instance.parse(lambda: decode(_decoder, exchange.body), len(exchange.body))
    exchange.instance.check_model(request.model)
    generation = Generation(exchange, engine, await _engine_requests(exchange, engine, request))
    answer_id = f"cmpl-{exchange.request_id}"
    tokenizer = engine.processor.tokenizer
    if request.stream:
        options = request.stream_options or StreamOptions()
        chunks = CompletionChunks(
            answer_id,
            exchange.created,
            exchange.instance.model,
            len(generation.choices),
            announces_usage=bool(options.include_usage),
        )

        def logprobs(step: Step) -> CompletionLogprobs | None:
            if step.output.logprobs is None:
                return None
            return completion_logprobs(tokenizer, step.output.logprobs, generation.choices[step.choice].num_characters)

        await stream(exchange, generation, chunks, logprobs, options)
        return
    choices = await generation.collect()
    response = CompletionResponse(
        id=answer_id,
        created=exchange.created,
        model=exchange.instance.model,
        choices=[
            _choice(index, choice, tokenizer, request.logprobs is not None) for index, choice in enumerate(choices)
        ],
        usage=generation.usage(),
    )
    await exchange.reply(
        msgspec.json.encode(response), headers=[("server-timing", generation.server_timing(ended=True))]
    )


async def _engine_requests(
    exchange: Exchange, engine: LanguageEngine, request: CompletionRequest
) -> list[GenerateRequest]:
    choices = num_choices(request)
    salt = cache_salt(request)
    async with exchange.until_deadline():
        prompts = await completion_prompts(exchange, engine, request)
    return [
        GenerateRequest(
            request_id=f"{exchange.engine_id}-{index}",
            prompt=prompt,
            sampling=sampling_of(
                request, engine.processor.default_sampling, room_tokens=engine.max_model_len - len(prompt.token_ids)
            ),
            deadline=exchange.deadline,
            num_choices=choices,
            cache_salt=salt,
        )
        for index, prompt in enumerate(prompts)
    ]


def _choice(index: int, choice: Choice, tokenizer: Tokenizer, wants_logprobs: bool) -> CompletionChoice:
    assert choice.finish_reason is not None
    return CompletionChoice(
        index=index,
        text="".join(choice.text),
        finish_reason=choice.finish_reason,
        logprobs=completion_logprobs(tokenizer, choice.logprobs, 0) if wants_logprobs else None,
        stop_reason=choice.stop_reason,
    )
