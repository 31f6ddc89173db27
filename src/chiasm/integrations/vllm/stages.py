"""Where the time of a request to vLLM went, told in ``Server-Timing`` as chiasm's own instances tell it.

vLLM keeps for each request when its engine began to compute it and when the first token was there, and hands that out with
the outputs of ``generate``, through which every answer comes; of a model that pools, with those of ``encode``. The outputs are
watched on their way. The head of an answer is held back until the first bytes that the application sends after the first
output, and says then what is known; so is what a stream of responses has before. The engine adds how long the request waited
for embeddings (``waits.py``) and what its prompt has cost (``prompt_work.py``).

The clocks of server and engine aren't compared: the first token is the instant that both know.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.http.timing import TimingEntry, write_timing
from chiasm.integrations.vllm.engines import ask_engines
from chiasm.integrations.vllm.messages import TELL_WORK_METHOD, WAITS_METHOD
from chiasm.integrations.vllm.outputs import PREFILL_WORK, WAITS, take_told
from chiasm.integrations.vllm.pooling_times import keep_times
from chiasm.integrations.vllm.settings import settings_of
from chiasm.integrations.vllm.waits import Wait

_logger = logging.getLogger(__name__)
_MAX_IMAGES = 64
"""Of a call of an encoder, whose stages are told."""
_STREAM = "text/event-stream"
_MAX_HELD_BYTES = 4 << 20
"""Of a stream, that wait for the first token. The API of responses sends the settings of the request twice before."""
_UNKNOWN = "vLLM keeps no times of requests (--disable-log-stats, or a version that chiasm doesn't know)"
_current: ContextVar[RequestStages | None] = ContextVar("chiasm_stages", default=None)
"""The request that the code which runs now answers."""


def has_failed() -> bool:
    """Return whether the first output for the request that the code which runs now answers was a failure."""
    request = _current.get()
    return request is not None and request.has_failed


class Stages:
    """Watches the outputs of one server's engine, and tells stages in the heads of answers. On its event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._encodes = False
        self._computes_prompts = True
        self.are_told = False
        self.are_of_answers = False
        """Whether they are told of answers that the engine generates."""

    def watch(self, state: Any) -> None:
        """Watch the engine of vLLM's application with this ``state``, which is about to start."""
        client: Any = getattr(state, "engine_client", None)
        generate, encode = getattr(client, "generate", None), getattr(client, "encode", None)
        if generate is None or encode is None or not getattr(client, "log_stats", False):
            self._give_up(_UNKNOWN)
            return
        config = state.vllm_config
        pools = getattr(config.model_config, "runner_type", "") == "pooling"
        if pools and not keep_times():
            self._give_up(_UNKNOWN)
            return
        transfer = config.ec_transfer_config
        self._encodes = transfer is None or transfer.is_ec_producer
        self._computes_prompts = transfer is None or transfer.is_ec_consumer

        def generating(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            outputs = generate(prompt, sampling_params, *args, **kwargs)
            return self._watched(outputs, prompt, sampling_params)

        def pooling(prompt: Any, pooling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            return self._watched(encode(prompt, pooling_params, *args, **kwargs), prompt, None)

        client.generate, client.encode = generating, pooling
        self.are_told = True
        self.are_of_answers = self._computes_prompts and not pools

    async def ask_engines(self, state: Any) -> None:
        """Ask the engines to tell what prompts cost, and how long requests wait for embeddings."""
        if not self.are_told:
            return
        if self._computes_prompts:
            await self._ask(state, TELL_WORK_METHOD, "what computing a prompt costs. Is chiasm among VLLM_PLUGINS?")
        if settings_of(state.vllm_config) is not None:
            await self._ask(state, WAITS_METHOD, "how long requests wait for embeddings.")

    async def _ask(self, state: Any, method: str, what: str) -> None:
        try:
            await ask_engines(state, method)
        except Exception as error:  # vLLM's own; the other stages are told all the same
            _logger.warning("This instance doesn't tell proxies %s (%r)", what, error)

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the application answer a request, and tell its stages."""
        if not self.are_told:
            await app(scope, receive, send)
            return
        request = RequestStages(send, self._clock, encodes=self._encodes, computes_prompts=self._computes_prompts)
        token = _current.set(request)
        try:
            await app(scope, receive, request.send)
        finally:
            _current.reset(token)

    def _watched(
        self, outputs: AsyncGenerator[Any, None], prompt: Any, sampling_params: Any
    ) -> AsyncGenerator[Any, None]:
        """Return the outputs of a prompt; without ``sampling_params`` it is pooled."""
        request = _current.get()
        if request is not None:
            request.begin(prompt, sampling_params)
        return self._outputs(outputs, request)

    async def _outputs(
        self, outputs: AsyncGenerator[Any, None], request: RequestStages | None
    ) -> AsyncGenerator[Any, None]:
        """Yield the outputs (vLLM's ``RequestOutput`` or ``PoolingRequestOutput``) as they come."""
        if request is not None:
            request.hand_over()
        async with aclosing(outputs):
            async for output in outputs:
                told = take_told(output)
                if request is not None:
                    try:
                        waits = [Wait(*wait) for wait in told.get(WAITS, ())]
                        request.note(output, waits, told.get(PREFILL_WORK))
                    except Exception as error:  # of what another version of vLLM has in another way
                        self._give_up(repr(error))
                    request = None
                yield output

    def _give_up(self, reason: str) -> None:
        self.are_told = self.are_of_answers = False
        _logger.warning("This instance doesn't tell proxies where the time of its requests goes: %s", reason)


class RequestStages:
    """The stages of one request. All times are seconds from its arrival."""

    def __init__(self, send: Send, clock: Callable[[], float], *, encodes: bool, computes_prompts: bool) -> None:
        """``encodes`` and ``computes_prompts`` say what the instance does."""
        self._send = send
        self._clock = clock
        self._encodes = encodes
        self._computes_prompts = computes_prompts
        self._arrival = clock()
        self._generations = 0
        self._has_items = self._gets_kv = self._is_pooled = False
        self._handed_over = 0.0
        self.has_failed = False
        """Whether the first output was a failure."""
        self._has_output = self._is_stream = False
        self._held: list[Message] | None = []
        """The head, and what follows it before the first output; None once the head is sent."""
        self._held_bytes = 0
        self._entries: list[TimingEntry] = []

    # ---- from the engine ----------------------------------------------------------------------------------------------

    def begin(self, prompt: Any, sampling_params: Any) -> None:
        """Note that something is computed for the request: for each of its prompts, of which the first to answer is told.

        Without ``sampling_params`` nothing is generated.
        """
        self._generations += 1
        self._is_pooled = sampling_params is None
        self._has_items = isinstance(prompt, Mapping) and bool(prompt.get("mm_placeholders"))
        extra = getattr(sampling_params, "extra_args", None)
        transfer = extra.get("kv_transfer_params") if isinstance(extra, Mapping) else None
        self._gets_kv = isinstance(transfer, Mapping) and bool(transfer.get("do_remote_prefill"))

    def hand_over(self) -> None:
        """Note that the engine gets the request."""
        self._handed_over = self._handed_over or self._now()

    def note(self, output: Any, waits: Sequence[Wait], prefill_work: float | None = None) -> None:
        """Note the first output of a prompt, which may be the last as well, and what its engine tells of it."""
        is_first, self._has_output = not self._has_output, True
        if is_first and not self._is_pooled:
            self.has_failed = any(one.finish_reason == "error" for one in output.outputs)
        times = output.metrics
        if self._entries or not 0 < times.scheduled_ts <= times.first_token_ts <= times.last_token_ts:
            return  # another was first, or it has failed before it ran
        token: float = self._now() - (times.last_token_ts - times.first_token_ts)

        def at(engine_time: float) -> float:
            before_token = max(0.0, float(times.first_token_ts) - engine_time)
            return max(self._handed_over, token - before_token)

        prefill = at(times.scheduled_ts)
        if not self._computes_prompts:
            self._entries = self._of_images(output, prefill, token)
            return
        placed = [
            Wait(at(wait.began), at(wait.ended), wait.item) for wait in waits if wait.began < times.first_token_ts
        ]
        self._entries = self._of_prompt(placed, prefill, token)
        # The tokens say what prefill costs, so they are left out where it isn't all that was computed meanwhile.
        if self._generations == 1 and not self._gets_kv and not (self._has_items and self._encodes):
            self._entries.append(TimingEntry("prompt_tokens", description=str(len(output.prompt_token_ids))))
            self._entries.append(TimingEntry("cached_tokens", description=str(output.num_cached_tokens or 0)))
            if prefill_work is not None:
                self._entries.append(TimingEntry("prefill_work", prefill_work))

    def _of_images(self, output: Any, began: float, ended: float) -> list[TimingEntry]:
        """Return the stages of an encoder: vLLM prepares all images of a call before its engine encodes them."""
        items = (output.ec_transfer_params or {}).values()
        count = min(sum(len(item["item_indices"]) for item in items), _MAX_IMAGES)
        return [
            entry
            for index in range(count)
            for entry in (
                TimingEntry(f"preprocess{index}", self._handed_over, at=0.0),
                TimingEntry(f"encode{index}", ended - began, at=began),
            )
        ]

    def _of_prompt(self, waits: Sequence[Wait], prefill: float, token: float) -> list[TimingEntry]:
        """Return the stages of a language instance up to the first token, or until its prompt is pooled."""
        before = sum(wait.ended - wait.began for wait in waits if wait.began < prefill)
        after = sum(wait.ended - wait.began for wait in waits) - before
        queue_seconds = max(0.0, prefill - self._handed_over - before)
        computed = max(0.0, token - prefill - after)
        if self._gets_kv:  # vLLM doesn't say when the KV had come, so there is no telling how long it was queued
            return [
                TimingEntry("kv", queue_seconds),
                TimingEntry("wait", before + after),
                TimingEntry("prefill", computed),
                TimingEntry("ttft", token),
            ]
        return [
            TimingEntry("queue", queue_seconds, at=self._handed_over),
            TimingEntry("wait", before + after),
            TimingEntry("prefill", computed, at=prefill),
            TimingEntry("pooled" if self._is_pooled else "ttft", token),
            *(TimingEntry("stall", wait.ended - wait.began, at=wait.began) for wait in waits),
            *(
                TimingEntry(f"item{item}", ended - self._handed_over, "waited", at=self._handed_over)
                for item, ended in {wait.item: wait.ended for wait in waits}.items()
            ),
        ]

    # ---- to the proxy ---------------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Send what the application answers, the head together with the first bytes after the first output."""
        if self._held is None:
            await self._send(message)
            return
        self._held.append(message)
        if self._can_wait(message):
            return
        held, self._held = self._held, None
        if self._entries:
            total = [] if self._is_stream else [TimingEntry("total", self._now())]
            MutableHeaders(scope=held[0]).append("server-timing", write_timing([*self._entries, *total]))
        for one in held:
            await self._send(one)

    def _can_wait(self, message: Message) -> bool:
        """Whether more will be sent, and this can wait for it."""
        if message["type"] == "http.response.start":
            self._is_stream = Headers(scope=message).get("content-type", "").startswith(_STREAM)
            return True
        self._held_bytes += len(message.get("body", b""))
        is_last = not message.get("more_body", False)
        return self._is_stream and not is_last and not self._has_output and self._held_bytes <= _MAX_HELD_BYTES

    def _now(self) -> float:
        return self._clock() - self._arrival
