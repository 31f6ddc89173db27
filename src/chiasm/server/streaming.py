"""Streams of outputs: headers only once the first output is there, then events, then the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

from chiasm.server import sse
from chiasm.server.chunks import Chunks
from chiasm.server.exchange import Exchange
from chiasm.server.generation import Generation, Step
from chiasm.server.protocol import ChatLogprobs, CompletionLogprobs, StreamOptions

Logprobs = Callable[[Step], ChatLogprobs | CompletionLogprobs | None]
"""The log probabilities of a step in the shape of the answer; None where none were asked for."""


async def stream(
    exchange: Exchange,
    generation: Generation,
    chunks: Chunks,
    logprobs: Logprobs,
    options: StreamOptions,
    preamble: bytes = b"",
) -> None:
    """Answer with a stream of events; ``preamble`` comes before the first of them.

    An error before the first output is raised while the status can still be chosen.
    """
    async with aclosing(generation.steps()) as steps:
        first = await anext(steps)
        await exchange.start_events([("server-timing", generation.server_timing())])
        await exchange.write(preamble + _events(generation, chunks, logprobs, options, first))
        async for step in steps:
            if events := _events(generation, chunks, logprobs, options, step):
                await exchange.write(events)
    usage = chunks.usage(generation.usage()) if options.include_usage else b""
    timing = sse.comment(f"server-timing {generation.server_timing(ended=True)}")
    await exchange.end_events(usage + timing + sse.DONE)


def _events(generation: Generation, chunks: Chunks, logprobs: Logprobs, options: StreamOptions, step: Step) -> bytes:
    """What one step makes known: text or log probabilities, and the end of the choice. May be nothing."""
    index, output = step
    usage = generation.usage() if options.continuous_usage_stats else None
    events = b""
    if output.text or output.logprobs:
        events = chunks.text(index, output.text, logprobs(step), usage)
    if output.finish_reason is not None:
        events += chunks.finish(index, output.finish_reason, output.stop_reason, usage)
    return events
