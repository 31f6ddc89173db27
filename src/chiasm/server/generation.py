"""Running a request's prompts through the engine, and putting their outputs together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from chiasm.engine.request import GenerateRequest
from chiasm.server.exchange import Exchange
from chiasm.server.protocol import PromptTokensDetails, Usage

if TYPE_CHECKING:
    from chiasm.engine.engine import LanguageEngine
    from chiasm.engine.request import FinishReason, Output, RequestTiming
    from chiasm.wire import KVTransferParams, TokenLogprob


class Step(NamedTuple):
    """What one step added to one choice of an HTTP request."""

    choice: int
    """Which, counted over all prompts: those of the first prompt come first."""
    output: Output


@dataclass
class Choice:
    """One choice as far as it has come."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_characters: int = 0
    last_output: float = 0.0


class Generation:
    """The outputs of one HTTP request: iterated once, and counted on the way."""

    def __init__(self, exchange: Exchange, engine: LanguageEngine, requests: Sequence[GenerateRequest]) -> None:
        self._exchange = exchange
        self._engine = engine
        self._requests = requests
        self._cached_tokens = [0] * len(requests)
        self._completion_tokens = 0
        self.choices = [Choice() for request in requests for _ in range(request.num_choices)]
        self.wants_logprobs = requests[0].sampling.logprobs is not None
        self.handles: list[KVTransferParams | None] = [None] * len(requests)
        """With what each prompt's answer goes on elsewhere, if it does (prefill role)."""
        self.timing: RequestTiming | None = None
        """Of the first prompt, as far as known."""

    async def steps(self) -> AsyncGenerator[Step, None]:
        """All outputs as they come. Closing it aborts what still runs."""
        metrics = self._exchange.instance.metrics
        async with aclosing(self._outputs()) as outputs:
            async for which, output in outputs:
                now = time.monotonic()
                step = Step(which * self._requests[0].num_choices + output.index, output)
                choice = self.choices[step.choice]
                if not output.already_sent:
                    if self._exchange.timing.first_output is None:
                        self._exchange.timing.first_output = now
                        metrics.first_token.observe(now - self._exchange.timing.arrival)
                    if choice.last_output and output.token_ids:
                        metrics.inter_token.observe((now - choice.last_output) / len(output.token_ids))
                    choice.last_output = now
                choice.finish_reason = output.finish_reason
                choice.stop_reason = output.stop_reason
                self._completion_tokens += len(output.token_ids)
                if output.index == 0:  # the others find the first one's blocks
                    self._cached_tokens[which] = output.num_cached_tokens
                if which == 0:
                    self.timing = output.timing
                if output.kv_transfer_params is not None:
                    self.handles[which] = output.kv_transfer_params
                yield step
                choice.num_characters += len(output.text)

    async def collect(self) -> list[Choice]:
        """Run to the end; the choices, complete."""
        async with aclosing(self.steps()) as steps:
            async for index, output in steps:
                self.choices[index].text.append(output.text)
                self.choices[index].logprobs += output.logprobs or ()
        return self.choices

    def usage(self) -> Usage:
        """Tokens so far."""
        prompt_tokens = sum(len(request.prompt.token_ids) for request in self._requests)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached_tokens)),
        )

    def server_timing(self, *, ended: bool = False) -> str:
        """The Server-Timing of the answer."""
        return self._exchange.timing.header(self.timing, ended=ended)

    async def _outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """Outputs with the index of their prompt."""
        if len(self._requests) > 1:
            async with aclosing(_merged([self._engine.generate(request) for request in self._requests])) as merged:
                async for pair in merged:
                    yield pair
            return
        async with aclosing(_generator(self._engine.generate(self._requests[0]))) as outputs:
            async for output in outputs:
                yield 0, output


async def _merged(sources: Sequence[AsyncIterator[Output]]) -> AsyncGenerator[tuple[int, Output], None]:
    """What several iterators yield, as it comes; the first error ends all of them."""
    queue: asyncio.Queue[tuple[int, Output] | BaseException | None] = asyncio.Queue()

    async def drain(which: int, source: AsyncIterator[Output]) -> None:
        try:
            async with aclosing(_generator(source)) as outputs:
                async for output in outputs:
                    queue.put_nowait((which, output))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(drain(which, source)) for which, source in enumerate(sources)]
    try:
        running = len(tasks)
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case BaseException() as error:
                    raise error
                case pair:
                    yield pair
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _generator(outputs: AsyncIterator[Output]) -> AsyncGenerator[Output, None]:
    """The engine's iterator is a generator: closing it aborts the request."""
    assert isinstance(outputs, AsyncGenerator)
    return outputs
