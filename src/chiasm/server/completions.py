"""POST /v1/completions."""

from __future__ import annotations

import msgspec

from chiasm.server.answer import Form, answer, engine_requests
from chiasm.server.chunks import CompletionChunks
from chiasm.server.exchange import Exchange
from chiasm.server.generation import Choice
from chiasm.server.logprobs import completion_logprobs
from chiasm.server.prompts import completion_prompts
from chiasm.server.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    decode,
    stream_options,
)
from chiasm.server.stages import stage_of

_decoder = msgspec.json.Decoder(CompletionRequest)


async def completions(exchange: Exchange) -> None:
    """Continue one or several prompts."""
    engine = exchange.instance.language_engine
    request = await exchange.instance.parse(lambda: decode(_decoder, exchange.body), len(exchange.body))
    exchange.instance.check_model(request.model)
    stage = stage_of(engine.config.role, request)
    async with exchange.until_deadline():
        prompts = await completion_prompts(exchange, engine, request)
    requests = engine_requests(exchange, engine, request, stage, prompts)
    await answer(exchange, engine, _FORM, stage, requests, stream_options(request))


def _choice(index: int, choice: Choice, logprobs: CompletionLogprobs | None) -> CompletionChoice:
    assert choice.finish_reason is not None
    return CompletionChoice(
        index=index,
        text="".join(choice.text),
        finish_reason=choice.finish_reason,
        logprobs=logprobs,
        stop_reason=choice.stop_reason,
    )


_FORM = Form(
    id_prefix="cmpl",
    chunks=CompletionChunks,
    response=CompletionResponse,
    choice=_choice,
    logprobs=completion_logprobs,
)
