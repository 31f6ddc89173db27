"""The engine of an instance with a language model: a thread that plans a step, runs it, and hands out what came of it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chiasm.engine.attention import KVCache, register_paged_attention
from chiasm.engine.base import Engine
from chiasm.engine.block_manager import BlockManager
from chiasm.engine.config import EngineConfig
from chiasm.engine.detokenizer import Detokenizer
from chiasm.engine.device import (
    MIXED_PREFILL_TOKENS,
    check_memory,
    kv_cache_blocks,
    use_threads,
)
from chiasm.engine.embeddings import Embeddings
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.handover import Handover, given_logprobs, wire_logprobs
from chiasm.engine.model_runner import ModelRunner
from chiasm.engine.request import (
    MAX_CHOICES,
    GenerateRequest,
    ItemOutcome,
    Output,
)
from chiasm.engine.sampler import Sampled
from chiasm.engine.scheduler import Scheduler, SchedulerConfig, Step
from chiasm.engine.sequence import Sequence
from chiasm.engine.state import Addition, Choice, RequestState
from chiasm.engine.stats import EngineStats
from chiasm.errors import (
    ChiasmError,
    DeadlineExceededError,
    EmbeddingUnavailableError,
    InvalidRequestError,
    KVUnavailableError,
)
from chiasm.kv_transfer import KVLayout, KVTransferRole
from chiasm.models import load_language, load_vision
from chiasm.wire import Role, TokenLogprob

if TYPE_CHECKING:
    from chiasm.models.base import VisionModel
    from chiasm.wire import KVTransferParams

logger = logging.getLogger(__name__)

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.0005, 0.01
POLL_SHARE = 0.01
"""How often missing embeddings are looked for while nothing else is to be done: after a hundredth of the shortest wait."""
DEADLINE_CHECK_SECONDS = 0.02
_SENIORITY = 1 << 62
"""An answer that was broken off elsewhere goes before all that have just begun, so that it is not broken off again."""


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Stop:
    pass


@dataclass(frozen=True)
class _Wake:
    """A transfer has ended."""


_KV_ROLES = {Role.PREFILL: KVTransferRole.PRODUCER, Role.DECODE: KVTransferRole.CONSUMER}


class LanguageEngine(Engine):
    """All roles but the encoder's: prefill and decode in one thread, with continuous batching.

    A ``prefill`` engine ends each request after one token and leaves the prompt's KV for a ``decode`` engine, which begins
    with that.

    ``generate`` belongs to the event loop, everything else of a request to the engine's thread; between them go an inbox
    and one queue of outputs a request.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.role in (Role.PD, Role.PREFILL) and config.ec is None:
            raise ValueError(f"a {config.role} engine takes embeddings from a connector: EngineConfig.ec is missing")
        if (config.role in _KV_ROLES) != (config.kv is not None):
            raise ValueError("prefill and decode engines, and no others, have EngineConfig.kv")
        super().__init__(config)
        self._inbox: queue.SimpleQueue[RequestState | _Abort | _Stop | _Wake] = queue.SimpleQueue()
        self._states: dict[str, RequestState] = {}
        self._arrivals = itertools.count()
        self._thread: threading.Thread | None = None
        self._handover: Handover | None = None
        self._next_deadline_check = 0.0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    # ---- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        config = self.config
        use_threads(config.threads)
        check_memory(config.model, self.device)
        register_paged_attention()
        self._language = load_language(config.model, dtype=self.dtype, device=self.device)
        vision: VisionModel | None = None
        if config.role is Role.AGGREGATED:
            vision = load_vision(config.model, dtype=self.dtype, device=self.device)
        connectors = None if config.ec is None else self._connect(config.ec)
        if config.kv is not None:
            self._handover = Handover(
                config.kv, _KV_ROLES[config.role], fingerprint=self.model_fingerprint, device=str(self.device)
            )
        num_blocks, self.max_model_len = kv_cache_blocks(config, self._language, self.max_model_len)
        kv_cache = KVCache(
            num_layers=self._language.num_layers,
            num_blocks=num_blocks,
            block_size=config.block_size,
            num_kv_heads=self._language.num_kv_heads,
            head_dim=self._language.head_dim,
            dtype=self.dtype,
            device=self.device,
            **({} if self._handover is None else {"allocate": self._handover.allocate}),
        )
        if self._handover is not None:
            self._handover.start(kv_cache.blocks, self._layout(kv_cache), lambda: self._inbox.put(_Wake()))
        self._runner = ModelRunner(self._language, kv_cache, self.processor.eos_token_ids)
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_mixed_prefill_tokens=MIXED_PREFILL_TOKENS[self.device.type],
                max_num_seqs=config.max_num_seqs,
                max_queued_requests=config.max_queued_requests,
                max_model_len=self.max_model_len,
                entry_bytes_per_row=self._language.entry_width * self.dtype.itemsize,
                local_encoder=config.role is Role.AGGREGATED,
                recomputes_items=config.role is not Role.DECODE,
            ),
            BlockManager(num_blocks, config.block_size),
            EncoderCacheManager(config.encoder_cache_bytes),
        )
        self._embeddings = Embeddings(self._scheduler, connectors=connectors, vision=vision)
        logger.info(
            "%s ready: %s on %s, %d KV blocks of %d tokens, context %d",
            config.role,
            self.dtype,
            self.device,
            num_blocks,
            config.block_size,
            self.max_model_len,
        )
        self._thread = threading.Thread(target=self._run, name="chiasm-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the engine's thread after its current step; running requests end with an error. Idempotent."""
        if self._thread is not None:
            self._inbox.put(_Stop())
            self._thread.join()
            self._thread = None
            self._embeddings.stop()
            if self._handover is not None:
                self._handover.stop()

    def _layout(self, kv_cache: KVCache) -> KVLayout:
        language = self._language
        return KVLayout(
            num_layers=language.num_layers,
            block_size=self.config.block_size,
            num_kv_heads=language.num_kv_heads,
            head_dim=language.head_dim,
            dtype=self.dtype_name,
            bytes_per_block=kv_cache.blocks.shape[1],
        )

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread lives."""
        return self._thread is not None and self._thread.is_alive()

    # ---- the event loop's side ------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Output]:
        """Outputs of all choices as they come, each choice's last with its ``finish_reason``.

        Raises InvalidRequestError, OverloadedError, EmbeddingUnavailableError or DeadlineExceededError, before the first
        output where it is known by then. Closing the iterator aborts the request within one step.
        """
        self._check(request)
        outputs: asyncio.Queue[Output | BaseException] = asyncio.Queue()
        state = RequestState(request, asyncio.get_running_loop(), outputs, time.monotonic())
        self._inbox.put(state)
        remaining = request.num_choices
        try:
            while remaining:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    remaining = 0
                    raise output
                if output.finish_reason is not None:
                    remaining -= 1
                yield output
        finally:
            if remaining:
                self._inbox.put(_Abort(request.request_id))

    def stats(self) -> EngineStats:
        """A snapshot; cheap, from any thread."""
        if self._thread is None:
            return EngineStats()
        scheduler, blocks, embeddings = self._scheduler, self._scheduler.block_manager, self._embeddings
        stalled = sum(1 for state in list(self._states.values()) if state.stalled_since is not None)
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_stalled=stalled,
            kv_blocks_total=blocks.num_blocks,
            kv_blocks_used=blocks.num_blocks - blocks.num_free,
            prefix_cache_query_tokens=scheduler.prefix_query_tokens,
            prefix_cache_hit_tokens=scheduler.prefix_hit_tokens,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=scheduler.num_preemptions,
            items=dict(embeddings.outcomes),
            item_wait_seconds=embeddings.wait_seconds,
            encoder_cache_bytes=scheduler.encoder_cache.used_bytes,
            images_encoded=embeddings.images_encoded,
            encode_seconds=embeddings.encode_seconds,
            ec=embeddings.stats,
            kv=self._handover.stats if self._handover is not None else None,
        )

    def _check(self, request: GenerateRequest) -> None:
        if not self.healthy:
            raise ChiasmError("the engine of this instance has stopped; restart the instance")
        if not 1 <= request.num_choices <= MAX_CHOICES:
            raise InvalidRequestError(f"n must be between 1 and {MAX_CHOICES}", param="n")
        prompt = request.prompt
        if len(prompt.items) > self.config.max_items:
            raise InvalidRequestError(
                f"the request has {len(prompt.items)} images and {self.config.max_items} is the limit", param="messages"
            )
        params = request.kv_transfer_params
        if (params is not None) != (self.config.role in _KV_ROLES):
            raise InvalidRequestError(
                "kv_transfer_params belong to requests of prefill and decode instances, and to no others",
                param="kv_transfer_params",
            )
        given = params.output_token_ids if params is not None else []
        if given and request.num_choices > 1:
            raise InvalidRequestError("an answer of several choices cannot be resumed", param="kv_transfer_params")
        self._scheduler.check(len(prompt.token_ids), prompt.items)
        if len(prompt.token_ids) + len(given) > self.max_model_len:
            raise InvalidRequestError(
                f"prompt and output_token_ids are {len(prompt.token_ids) + len(given)} tokens, and the context is "
                f"{self.max_model_len}",
                param="kv_transfer_params",
            )
        for token_id in given:
            if not 0 <= token_id < self.processor.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is not in the vocabulary of {self.processor.vocab_size}",
                    param="kv_transfer_params",
                )
        for token_id in (*request.sampling.logit_bias, *request.sampling.stop_token_ids):
            if not 0 <= token_id < self.processor.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is not in the vocabulary of {self.processor.vocab_size}", param="logit_bias"
                )

    # ---- the engine's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        use_threads(self.config.threads)
        idle = True
        while self._take_inbox(wait=idle):
            try:
                self._check_deadlines()
                self._collect_transfers()
                self._embeddings.load(self._states)
                self._measure_stalls()
                idle = not self._step()
            except Exception as error:
                # What a step's own guards did not foresee costs the requests that are here, not the instance.
                logger.exception(
                    "planning a step failed; the %d requests that are here fail with it", len(self._states)
                )
                self._fail_all(list(self._states), ChiasmError(f"the engine failed: {type(error).__name__}"))
                self._embeddings.forget_unfilled()
                idle = True
        self._fail_all(list(self._states), ChiasmError("the engine of this instance stopped while the request ran"))

    def _take_inbox(self, *, wait: bool) -> bool:
        """Take in what came; with ``wait``, sleep until something does or missing embeddings should be looked for.

        Returns False when the engine is to stop.
        """
        timeout = self._poll_seconds() if wait and self._states else None
        while True:
            try:
                message = self._inbox.get(timeout=timeout) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return True
            wait = False
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Abort):
                if message.request_id in self._states:
                    self._forget(self._states[message.request_id])
            elif isinstance(message, RequestState):
                self._add(message)

    def _poll_seconds(self) -> float:
        now = time.monotonic()
        stalls = [now - state.stalled_since for state in self._states.values() if state.stalled_since is not None]
        if not stalls:
            return DEADLINE_CHECK_SECONDS
        return min(max(POLL_SHARE * min(stalls), MIN_POLL_SECONDS), MAX_POLL_SECONDS)

    def _add(self, state: RequestState) -> None:
        request = state.request
        if request.request_id in self._states:
            self._send(state, InvalidRequestError(f"request id {request.request_id} is in use", param="request_id"))
            return
        params = request.kv_transfer_params
        seed = request.sampling.seed if params is None or params.seed is None else params.seed
        if seed is None:
            seed = secrets.randbits(62)
        leader: Sequence | None = None
        for index in range(request.num_choices):
            sequence = Sequence(
                request_id=request.request_id,
                index=index,
                arrival=next(self._arrivals) - (_SENIORITY if params and params.num_sent > 1 else 0),
                prompt=request.prompt,
                sampling=request.sampling,
                seed=seed + index,
                block_size=self.config.block_size,
                cache_salt=request.cache_salt,
                leader=leader,
                output_token_ids=() if params is None else params.output_token_ids,
            )
            leader = leader or sequence
            detokenizer = Detokenizer(self.processor.tokenizer, request.sampling, request.prompt.token_ids)
            choice = Choice(
                sequence,
                detokenizer,
                eos_token_ids=self.processor.eos_token_ids,
                max_model_len=self.max_model_len,
            )
            state.choices.append(choice)
        try:
            if self.config.role is Role.DECODE:
                assert self._handover is not None
                self._handover.take(request, state.sequences, self._scheduler)
            self._scheduler.add(state.sequences)
        except ChiasmError as error:
            if self._handover is not None:
                self._handover.drop(request)
            self._send(state, error)
            return
        self._states[request.request_id] = state
        if self.config.role is not Role.DECODE:
            self._prompt_tokens += len(request.prompt.token_ids)
            self._embeddings.count(state)
        if params is not None and params.output_token_ids:
            self._resume(state, state.choices[0], params)

    def _resume(self, state: RequestState, choice: Choice, params: KVTransferParams) -> None:
        """Put the tokens that came with the request into the answer, those that the client has and those it hasn't."""
        additions: list[Addition] = []
        for number, token_id in enumerate(params.output_token_ids, start=1):
            additions.append(choice.add(token_id, number))
            if additions[-1].finish_reason is not None:
                break
        last = additions[-1]
        given, num_sent = params.output_token_ids[: len(additions)], params.num_sent
        texts = [addition.text for addition in additions]
        outputs: list[Output] = []
        if num_sent:
            outputs.append(self._given_output(state, given[:num_sent], "".join(texts[:num_sent]), already_sent=True))
        if len(given) > num_sent or last.finish_reason is not None:
            logprobs = given_logprobs(params)
            output = self._given_output(state, given[num_sent:], "".join(texts[num_sent:]))
            logprobs = logprobs[: len(output.token_ids)] if logprobs is not None else None
            outputs.append(
                replace(output, logprobs=logprobs, finish_reason=last.finish_reason, stop_reason=last.stop_reason)
            )
        self._call(state.loop, [(state.outputs, output) for output in outputs])
        if last.finish_reason is not None:
            choice.done = True
            self._forget(state)

    def _given_output(
        self, state: RequestState, token_ids: list[int], text: str, *, already_sent: bool = False
    ) -> Output:
        assert state.request.kv_transfer_params is not None
        return Output(
            index=0,
            token_ids=tuple(token_ids),
            text=text,
            logprobs=None,
            finish_reason=None,
            stop_reason=None,
            timing=state.timing,
            num_cached_tokens=state.request.kv_transfer_params.cached_tokens,
            already_sent=already_sent,
        )

    def _collect_transfers(self) -> None:
        """See which transfers have ended, and go on or give up with their requests; begin what was noted since."""
        if self._handover is None:
            return
        finished = self._handover.collect(self._scheduler)
        now = time.monotonic()
        for request_id, index in finished.loaded:
            state = self._states.get(request_id)
            if state is not None and index == 0:
                state.note_loaded(now)
        for request_id, reason in finished.failed.items():
            self._fail_all([request_id], KVUnavailableError(reason, code="kv_unavailable"))
        self._handover.flush()

    def _begin_loads(self, step: Step) -> None:
        """Have the blocks filled that sequences got for KV that is elsewhere (decode role)."""
        if self._handover is None:
            return
        now = time.monotonic()
        for sequence in step.load:
            state = self._states[sequence.request_id]
            state.note_load_started(now)
            self._handover.load(state.request, sequence, self._scheduler)
        for sequence in step.preempted:
            if self.config.role is Role.DECODE and sequence.items and not sequence.finished:
                error = KVUnavailableError(
                    "the answer was broken off for want of KV blocks, and this instance has no embeddings to begin it anew; "
                    "have it prefilled again",
                    code="preempted",
                )
                self._fail_all([sequence.request_id], error)
        step.decodes = [part for part in step.decodes if not part.sequence.finished]
        step.prefills = [part for part in step.prefills if not part.sequence.finished]
        self._handover.flush()

    def _measure_stalls(self) -> None:
        now = time.monotonic()
        for state in self._states.values():
            if state.timing.items and state.timing.first_token_seconds is None:
                state.note_stalled(self._scheduler.is_stalled(state.sequences[0]), now)

    def _step(self) -> bool:
        """Plan and run one step. Returns False if there was nothing to run."""
        step = self._scheduler.schedule()
        self._embeddings.drop_evicted()
        self._begin_loads(step)
        if not step.scheduled and not step.encode:
            return bool(step.preempted)
        for state, error in self._embeddings.encode(step, self._states):
            self._fail(state, error)
        self._refuse_misfits(step)
        self._note_scheduled(step)
        if not step.scheduled:
            return True
        try:
            sampled = self._runner.execute(step, self._embeddings.entries)
        except Exception as error:
            logger.exception("a step failed; its %d requests fail with it", len(step.scheduled))
            failure = ChiasmError(f"the model failed on this request: {type(error).__name__}")
            self._fail_all({part.sequence.request_id for part in step.scheduled}, failure)
            return True
        self._scheduler.complete(step, {name: token.token_id for name, token in sampled.items()})
        self._hand_out(step, sampled)
        return True

    def _refuse_misfits(self, step: Step) -> None:
        """Fail the requests whose item is not what they said, or was lost between planning and now; the step goes on."""
        for part in list(step.prefills):
            for item in part.sequence.items_between(part.start, part.end):
                entry = self._embeddings.entries.get(item.identifier)
                expected = (len(item.geometry.rows), self._language.entry_width)
                if entry is None or tuple(entry.shape) != expected:
                    step.prefills.remove(part)
                    found = "gone" if entry is None else f"{tuple(entry.shape)}"
                    error = EmbeddingUnavailableError(
                        f"the embedding of item {item.identifier[:12]}… is {found}, and the request needs {expected}; "
                        "check that encoder and prefill serve the same model, and that the image size sent is right"
                    )
                    self._fail_all({part.sequence.request_id}, error)
                    break
        step.decodes = [part for part in step.decodes if not part.sequence.finished]
        step.prefills = [part for part in step.prefills if not part.sequence.finished]

    def _note_scheduled(self, step: Step) -> None:
        now = time.monotonic()
        for part in step.prefills:
            state = self._states[part.sequence.request_id]
            if state.missing:
                for item in part.sequence.items_between(part.start, part.end):
                    self._embeddings.note(state, item.identifier, ItemOutcome.WAITED)
            state.note_scheduled(now)

    def _hand_out(self, step: Step, sampled: dict[str, Sampled]) -> None:
        """Turn the new tokens into text, end what has ended, and send the outputs, one wake-up of each loop a step."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Output | BaseException], Output]]] = {}
        for part in step.scheduled:
            if not part.samples:
                continue
            state = self._states[part.sequence.request_id]
            choice = state.choices[part.sequence.index]
            output = self._output(state, choice, sampled[part.sequence.sequence_id])
            if self.config.role is Role.PREFILL:
                output = self._hand_over(state, choice, output)
            batches.setdefault(state.loop, []).append((state.outputs, output))
            if output.finish_reason is not None:
                choice.done = True
                self._scheduler.finish(part.sequence)
                if state.done:
                    self._forget(state)
        if self._handover is not None:
            self._handover.flush()  # before anybody comes for what was left
        for loop, batch in batches.items():
            self._call(loop, batch)

    @staticmethod
    def _goes_on(params: KVTransferParams) -> bool:
        """Whether the answer was begun elsewhere."""
        return params.do_remote_prefill or bool(params.output_token_ids)

    def _hand_over(self, state: RequestState, choice: Choice, output: Output) -> Output:
        """End the choice here after its first token; unless that ended the answer, it goes on at a decode instance.

        A sender that hasn't said that the answer ``continues`` gets the handle in any case, as vLLM's proxies expect.
        """
        params = state.request.kv_transfer_params
        assert params is not None
        assert self._handover is not None
        if params.continues and output.finish_reason is not None:
            return output
        handle = self._handover.leave(state.request, choice.sequence, self._scheduler)
        handle.continues = params.continues
        if output.logprobs is not None:
            given = params.output_logprobs or [TokenLogprob(0.0, [])] * len(params.output_token_ids)
            handle.output_logprobs = [*given, *(wire_logprobs(logprobs) for logprobs in output.logprobs)]
        state.handed_over = True
        return replace(output, finish_reason=output.finish_reason or "length", kv_transfer_params=handle)

    def _output(self, state: RequestState, choice: Choice, sampled: Sampled) -> Output:
        self._generation_tokens += 1
        sequence, params = choice.sequence, state.request.kv_transfer_params
        state.note_token(time.monotonic())
        addition = choice.add(sampled.token_id, sequence.num_output)
        return Output(
            index=sequence.index,
            token_ids=(sampled.token_id,),
            text=addition.text,
            logprobs=None if sampled.logprobs is None else (sampled.logprobs,),
            finish_reason=addition.finish_reason,
            stop_reason=addition.stop_reason,
            timing=state.timing,
            num_cached_tokens=params.cached_tokens if params and self._goes_on(params) else sequence.num_cached,
        )

    # ---- ends -----------------------------------------------------------------------------------------------------------

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if now < self._next_deadline_check:
            return
        self._next_deadline_check = now + DEADLINE_CHECK_SECONDS
        for state in [state for state in self._states.values() if state.request.deadline <= now]:
            seconds = now - state.arrived
            if state.stalled_since is not None:
                missing = ", ".join(f"{identifier[:12]}…" for identifier in state.missing) or "evicted since"
                error: ChiasmError = EmbeddingUnavailableError(
                    f"no embedding came within {seconds:.1f} s for {len(state.missing)} image(s) of the request ({missing}); "
                    "check that an encoder is alive and writes to the same store"
                )
            else:
                error = DeadlineExceededError(f"the request did not end within its deadline of {seconds:.1f} s")
            self._fail(state, error)

    def _fail_all(self, request_ids: Iterable[str], error: ChiasmError) -> None:
        for request_id in request_ids:
            if request_id in self._states:
                self._fail(self._states[request_id], error)

    def _fail(self, state: RequestState, error: ChiasmError) -> None:
        for identifier in list(state.missing):
            self._embeddings.note(state, identifier, ItemOutcome.MISSED)
        self._forget(state)
        self._send(state, error)

    def _forget(self, state: RequestState) -> None:
        request_id = state.request.request_id
        for sequence in state.sequences:
            self._scheduler.finish(sequence)
        del self._states[request_id]
        if self._handover is not None and not state.handed_over:
            self._handover.drop(state.request)
        self._runner.forget(request_id)

    def _send(self, state: RequestState, error: BaseException) -> None:
        self._call(state.loop, [(state.outputs, error)])

    @staticmethod
    def _call(
        loop: asyncio.AbstractEventLoop,
        batch: Iterable[tuple[asyncio.Queue[Output | BaseException], Output | BaseException]],
    ) -> None:
        def deliver() -> None:
            for outputs, output in batch:
                outputs.put_nowait(output)

        try:
            loop.call_soon_threadsafe(deliver)
        except RuntimeError:
            logger.debug("a loop was closed before its outputs came")
