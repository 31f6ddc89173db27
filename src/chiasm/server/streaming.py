"""Streams of outputs: headers only once there is something to send, then events, then the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

import msgspec

from chiasm.server import sse
from chiasm.server.chunks import Chunks
from chiasm.server.exchange import Exchange
from chiasm.server.generation import Generation, Step
from chiasm.server.protocol import ChatLogprobs, CompletionLogprobs, StreamOptions
from chiasm.server.stages import Stage

Logprobs = Callable[[Step], ChatLogprobs | CompletionLogprobs | None]
"""The log probabilities of a step in the shape of the answer; None where none were asked for."""


async def stream(
    exchange: Exchange,
    generation: Generation,
    stage: Stage,
    chunks: Chunks,
    logprobs: Logprobs,
    options: StreamOptions,
) -> None:
    """Answer with a stream of events.

    An error before the first output that the client doesn't have yet is raised while the status can still be chosen.
    """
    async with aclosing(generation.steps()) as steps:
        async for step in steps:
            events = _events(generation, stage, chunks, logprobs, options, step)
            if exchange.status is None:
                if step.output.already_sent and not events:
                    continue
                await exchange.start_events([("server-timing", generation.server_timing())])
                if stage.opens and stage.shows_text:
                    events = b"".join(chunks.role(index) for index in range(len(generation.choices))) + events
            if events:
                await exchange.write(events)
    handle = stage.handle(generation.handles, chunks.created)
    if handle is not None:
        await exchange.end_events(sse.comment(f"kv_transfer_params {msgspec.json.encode(handle).decode()}"))
        return
    usage = chunks.usage(generation.usage()) if options.include_usage else b""
    timing = sse.comment(f"server-timing {generation.server_timing(ended=True)}")
    await exchange.end_events(usage + timing + sse.DONE)


def _events(
    generation: Generation, stage: Stage, chunks: Chunks, logprobs: Logprobs, options: StreamOptions, step: Step
) -> bytes:
    """What one step makes known: text or log probabilities, and the end of the choice. May be nothing."""
    index, output = step
    if not stage.shows_text:
        return b""
    usage = generation.usage() if options.continuous_usage_stats else None
    events = b""
    if (output.text or output.logprobs) and not output.already_sent:
        events = chunks.text(index, output.text, logprobs(step), usage)
    if output.finish_reason is not None and output.kv_transfer_params is None:
        events += chunks.finish(index, output.finish_reason, output.stop_reason, usage)
    if stage.announces_tokens and output.token_ids and not output.already_sent:
        ids = f"tokens {' '.join(map(str, output.token_ids))}"
        return sse.comment_line(ids) + events if events else sse.comment(ids)
    return events
