"""The outputs of the engine for one HTTP request, over all its prompts and choices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from chiasm.engine.request import GenerateRequest
from chiasm.http import Exchange
from chiasm.http.timing import TimingEntry, duration_of, write_timing
from chiasm.models.token_bytes import TextOffsets, token_bytes_of
from chiasm.server.context import GeneratingEngine
from chiasm.server.metrics import Metrics
from chiasm.server.protocol import PromptTokensDetails, Usage
from chiasm.tasks import end_tasks

if TYPE_CHECKING:
    from chiasm.engine.request import FinishReason, Output, RequestTiming
    from chiasm.wire import KVTransferParams, TokenLogprob


@dataclass
class ChoiceState:
    """One choice as far as it has been generated."""

    text: list[str] = field(default_factory=list)
    """Pieces; filled by ``collect`` alone, as are the log probabilities."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    """One for each of ``logprobs``."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    last_output_at: float = 0.0


class ChoiceOutput(NamedTuple):
    """What one step of the engine adds to one choice."""

    choice: int
    """Counted over all prompts; the choices of the first prompt come first."""
    output: Output
    text_offsets: Sequence[int]
    """How many characters of the choice come before each token; empty unless log probabilities are wanted."""


class Generation:
    """The outputs of one HTTP request, iterated once, and what they add up to."""

    def __init__(
        self, exchange: Exchange, engine: GeneratingEngine, metrics: Metrics, requests: Sequence[GenerateRequest]
    ) -> None:
        """``requests`` has one for each prompt, all with the same number of choices."""
        self._exchange = exchange
        self._engine = engine
        self._metrics = metrics
        self._requests = requests
        self._has_output = False
        self._cached_tokens = [0] * len(requests)
        self._completion_tokens = 0
        self._timing: RequestTiming | None = None
        """Timing of the first prompt."""
        self.choices = [ChoiceState() for request in requests for _ in range(request.num_choices)]
        self._handles: dict[int, KVTransferParams] = {}
        sampling = requests[0].sampling
        token_bytes = None if sampling.logprobs is None else token_bytes_of(engine.processor.tokenizer)
        self._offsets = [
            token_bytes and TextOffsets(token_bytes, skip_special_tokens=sampling.skip_special_tokens)
            for _ in self.choices
        ]

    async def outputs(self) -> AsyncGenerator[ChoiceOutput, None]:
        """Yield all outputs as they come. Closing it aborts what still runs. Raises what the engine raises."""
        streams = [self._engine.generate(request) for request in self._requests]
        if len(streams) == 1:
            async with aclosing(streams[0]) as outputs:
                async for output in outputs:
                    yield self._add(0, output)
            return
        async with aclosing(_merged(streams)) as of_all:
            async for prompt, output in of_all:
                yield self._add(prompt, output)

    async def collect(self) -> list[ChoiceState]:
        """Return the complete choices. Raises what the engine raises."""
        async with aclosing(self.outputs()) as outputs:
            async for index, output, text_offsets in outputs:
                self.choices[index].text.append(output.text)
                if output.logprobs:
                    self.choices[index].logprobs += output.logprobs
                    self.choices[index].text_offsets += text_offsets
        return self.choices

    def _add(self, prompt: int, output: Output) -> ChoiceOutput:
        """Count an output of a prompt, and return it as that of a choice."""
        index = prompt * self._requests[0].num_choices + output.index
        choice, offsets = self.choices[index], self._offsets[index]
        if not output.already_sent:
            now = time.monotonic()
            if not self._has_output:
                self._has_output = True
                self._exchange.timing.append(TimingEntry("ttft", now - self._exchange.arrival))
                self._metrics.first_token.observe(now - self._exchange.arrival)
            if choice.last_output_at and output.token_ids:
                self._metrics.inter_token.observe((now - choice.last_output_at) / len(output.token_ids))
            choice.last_output_at = now
        choice.finish_reason = output.finish_reason
        choice.stop_reason = output.stop_reason
        self._completion_tokens += len(output.token_ids)
        if output.index == 0:  # the other choices find the blocks of the first
            self._cached_tokens[prompt] = output.num_cached_tokens
        if prompt == 0:
            self._timing = output.timing
        if output.kv_transfer_params is not None:
            self._handles[prompt] = output.kv_transfer_params
        text_offsets = [offsets.add(token_id) for token_id in output.token_ids] if offsets else ()
        return ChoiceOutput(index, output, text_offsets)

    @property
    def handles(self) -> list[KVTransferParams]:
        """The engine's handles, one for each prompt; none unless the answer continues elsewhere (prefill role)."""
        return [self._handles[prompt] for prompt in sorted(self._handles)]

    def usage(self) -> Usage:
        """Return the tokens so far."""
        prompt_tokens = sum(len(request.prompt.token_ids) for request in self._requests)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached_tokens)),
        )

    def server_timing(self, *, has_ended: bool = False) -> str:
        """Return the ``Server-Timing`` of the answer so far; with ``total`` if it has ended."""
        entries = list(self._exchange.timing)
        timing = self._timing
        if timing is not None:
            usage = self.usage()
            seconds = {
                "queue": timing.queue_seconds,
                "wait": timing.wait_seconds,
                "transfer": timing.transfer_seconds,
                "kv": timing.kv_seconds,
                "encode": timing.encode_seconds or None,
                "prefill": timing.prefill_seconds,
                "prefill_work": timing.prefill_work_seconds or None,
                "step": timing.step_seconds,
            }
            starts = {"queue": self._engine_at(timing), "prefill": self._engine_at(timing, timing.prefill_at)}
            entries += [
                TimingEntry(name, value, at=starts.get(name)) for name, value in seconds.items() if value is not None
            ]
            entries += [
                TimingEntry("stall", stall.seconds, at=self._engine_at(timing, stall.at)) for stall in timing.stalls
            ]
            entries.append(TimingEntry("prompt_tokens", description=str(usage.prompt_tokens)))
            entries.append(TimingEntry("cached_tokens", description=str(usage.prompt_tokens_details.cached_tokens)))
        if has_ended:
            if timing is not None:
                entries.append(TimingEntry("completion_tokens", description=str(self._completion_tokens)))
            entries.append(TimingEntry("total", time.monotonic() - self._exchange.arrival))
        if timing is not None:
            entries += [
                TimingEntry(f"item{index}", item.wait_seconds, item.outcome, self._engine_at(timing))
                for index, item in enumerate(timing.items)
            ]
        return write_timing(entries)

    def _engine_at(self, timing: RequestTiming, seconds: float | None = 0.0) -> float | None:
        """Return when something was that was ``seconds`` after the request's arrival in the engine, from its arrival here.

        The first token is the instant that both know.
        """
        ttft = duration_of(self._exchange.timing, "ttft")
        if ttft is None or timing.first_token_seconds is None or seconds is None:
            return None
        return max(0.0, ttft - timing.first_token_seconds) + seconds


async def _merged(streams: Sequence[AsyncGenerator[Output, None]]) -> AsyncGenerator[tuple[int, Output], None]:
    """Yield the outputs of several prompts as they come, with the prompt's index; the first error ends all of them."""
    queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()

    async def drain(prompt: int, outputs: AsyncGenerator[Output, None]) -> None:
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    queue.put_nowait((prompt, output))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(drain(prompt, outputs)) for prompt, outputs in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            match await queue.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case pair:
                    yield pair
    finally:
        await end_tasks(*tasks)
