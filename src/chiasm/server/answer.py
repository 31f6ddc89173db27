"""From the engine's outputs to the response: one body, or a stream of events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from chiasm.http import Exchange, events
from chiasm.server.answer_format import AnswerFormat
from chiasm.server.generation import ChoiceOutput, Generation
from chiasm.server.prefill_decode import AnswerPart, handle_for_decode
from chiasm.server.protocol import StreamOptions
from chiasm.wire import KV_COMMENT, TIMING_COMMENT, TOKENS_COMMENT

if TYPE_CHECKING:
    from chiasm.server.protocol import Usage


_INLINE_LOGPROBS = 1024
"""Up to so many tokens and candidates with log probabilities, writing an answer takes a few milliseconds."""


async def answer_whole(
    exchange: Exchange,
    generation: Generation,
    part: AnswerPart,
    answer_format: AnswerFormat,
    in_thread: Callable[[Callable[[], bytes]], Awaitable[bytes]],
) -> None:
    """Answer with one body when everything has been generated; a large one is written beside the event loop."""
    choices = await generation.collect()
    handle = handle_for_decode(part, generation.handles, answer_format.created, is_sent=False)
    write = partial(answer_format.body, choices, generation.usage(), handle)
    entries = sum(len(choice.logprobs) * (1 + len(choice.logprobs[0].top)) for choice in choices if choice.logprobs)
    is_small = entries <= _INLINE_LOGPROBS
    await exchange.reply(
        write() if is_small else await in_thread(write),
        headers=[("server-timing", generation.server_timing(has_ended=True))],
    )


async def answer_as_stream(
    exchange: Exchange,
    generation: Generation,
    part: AnswerPart,
    answer_format: AnswerFormat,
    options: StreamOptions,
) -> None:
    """Answer with events as they are generated.

    The response begins with the first output that the client doesn't have yet: an error before it has a status of its own.
    """
    async with aclosing(generation.outputs()) as outputs:
        async for step in outputs:
            usage = generation.usage() if options.continuous_usage_stats else None
            data = _events(part, answer_format, step, usage)
            if not exchange.has_begun:
                if step.output.already_sent and not data:
                    continue
                await exchange.start_events([("server-timing", generation.server_timing())])
                if part.begins_here and part.has_text:
                    data = b"".join(answer_format.role(index) for index in range(len(generation.choices))) + data
            await exchange.write(data)
    handle = handle_for_decode(part, generation.handles, answer_format.created, is_sent=True)
    if handle is not None:
        await exchange.end_events(events.comment(KV_COMMENT, msgspec.json.encode(handle).decode()))
        return
    usage_event = answer_format.usage(generation.usage()) if options.include_usage else b""
    timing = b""
    if exchange.timing_comments:
        timing = events.comment(TIMING_COMMENT, generation.server_timing(has_ended=True))
    await exchange.end_events(usage_event + timing + events.DONE)


def _events(part: AnswerPart, answer_format: AnswerFormat, step: ChoiceOutput, usage: Usage | None) -> bytes:
    """Return what one output makes known: text or log probabilities, and the end of the choice. May be empty."""
    if not part.has_text:
        return b""
    index, output, text_offsets = step
    data = b""
    if output.already_sent:
        answer_format.skip(index, output.text)
    elif output.text or output.logprobs:
        data = answer_format.text(index, output.text, output.logprobs, text_offsets, usage)
    if output.finish_reason is not None and output.kv_transfer_params is None:
        data += answer_format.finish(index, output.finish_reason, output.stop_reason, usage)
    if part.announces_tokens and output.token_ids and not output.already_sent:
        token_ids = " ".join(map(str, output.token_ids))
        return (events.comment_line if data else events.comment)(TOKENS_COMMENT, token_ids) + data
    return data
