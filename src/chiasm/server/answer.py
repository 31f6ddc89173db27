"""From prompts to an answer: what chat and text completions have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from chiasm.engine.request import GenerateRequest
from chiasm.server.chunks import Chunks
from chiasm.server.exchange import Exchange
from chiasm.server.generation import Choice, Generation, Step
from chiasm.server.protocol import (
    ChatLogprobs,
    ChatRequest,
    CompletionLogprobs,
    CompletionRequest,
    StreamOptions,
)
from chiasm.server.sampling import cache_salt, num_choices, sampling_of
from chiasm.server.stages import Stage
from chiasm.server.streaming import stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from chiasm.engine.engine import LanguageEngine
    from chiasm.models.base import Prompt
    from chiasm.wire import TokenLogprob


@dataclass(frozen=True)
class Form:
    """How the answers of one endpoint look."""

    id_prefix: str
    chunks: type[Chunks]
    response: Callable[..., msgspec.Struct]
    choice: Callable[[int, Choice, Any], msgspec.Struct]
    """From its index, what came of it, and its log probabilities or None."""
    logprobs: Callable[[Tokenizer, Sequence[TokenLogprob], int], ChatLogprobs | CompletionLogprobs]
    """Of some tokens of a choice; the number is that of the characters before the first of them."""


def engine_requests(
    exchange: Exchange,
    engine: LanguageEngine,
    request: ChatRequest | CompletionRequest,
    stage: Stage,
    prompts: Sequence[Prompt],
) -> Sequence[GenerateRequest]:
    """What the engine is to do for the prompts. Raises InvalidRequestError."""
    choices, salt = num_choices(request), cache_salt(request)
    requests = [
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
    return stage.engine_requests(requests, engine.processor.vocab_size)


async def answer(
    exchange: Exchange,
    engine: LanguageEngine,
    form: Form,
    stage: Stage,
    requests: Sequence[GenerateRequest],
    stream_options: StreamOptions | None,
) -> None:
    """Have the engine do ``requests``, and answer with what comes of them: as a stream, if there are options for one."""
    generation = Generation(exchange, engine, requests)
    answer_id = f"{form.id_prefix}-{exchange.request_id}"
    created = exchange.created if stage.created is None else stage.created
    model = exchange.instance.model
    tokenizer = engine.processor.tokenizer
    if stream_options is not None:
        chunks = form.chunks(
            answer_id,
            created,
            model,
            len(generation.choices),
            announces_usage=bool(stream_options.include_usage),
        )

        def logprobs(step: Step) -> ChatLogprobs | CompletionLogprobs | None:
            if step.output.logprobs is None:
                return None
            return form.logprobs(tokenizer, step.output.logprobs, generation.choices[step.choice].num_characters)

        await stream(exchange, generation, stage, chunks, logprobs, stream_options)
        return
    choices = await generation.collect()
    response = form.response(
        id=answer_id,
        created=created,
        model=model,
        choices=[
            form.choice(
                index, choice, form.logprobs(tokenizer, choice.logprobs, 0) if generation.wants_logprobs else None
            )
            for index, choice in enumerate(choices)
        ],
        usage=generation.usage(),
        kv_transfer_params=stage.handle(generation.handles, created) or msgspec.UNSET,
    )
    await exchange.reply(
        msgspec.json.encode(response), headers=[("server-timing", generation.server_timing(ended=True))]
    )
