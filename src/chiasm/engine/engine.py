"""The engine of an instance with a language model: a thread that plans a step, runs it, and sends what it sampled."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace

from msgspec import structs

from chiasm.cores import lower_priority, lower_session_priority
from chiasm.engine.attention import KVCache
from chiasm.engine.base import Engine
from chiasm.engine.block_manager import BlockManager
from chiasm.engine.calibration import image_costs, language_costs
from chiasm.engine.config import EngineConfig
from chiasm.engine.device import (
    MAX_PREFILL_TOKENS,
    MIN_TEXT_BEFORE_ITEM,
    check_memory,
    kv_cache_blocks,
    mixed_prefill_tokens,
    use_threads,
)
from chiasm.engine.embeddings import Embeddings
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.inbox import Abort, GiveBack, Inbox, Question, Signal
from chiasm.engine.kv_transfers import KVTransfers
from chiasm.engine.local_encoder import HIGH_PRIORITY, LocalEncoder, on_stream
from chiasm.engine.model_runner import ModelRunner
from chiasm.engine.pace import PrefillPace
from chiasm.engine.request import MAX_CHOICES, EngineStats, GenerateRequest, ItemOutcome, Output
from chiasm.engine.request_state import RequestState, deliver, hash_tokens
from chiasm.engine.sampler import Sampled
from chiasm.engine.scheduler import Scheduler, SchedulerConfig, Step
from chiasm.engine.step_faults import run_step
from chiasm.errors import ChiasmError, Code, InvalidRequestError, KVUnavailableError
from chiasm.kv_transfer import KVConnector, KVConnectorFactory, KVConnectorRole, KVTransferConfig, KVTransferRole
from chiasm.models import load_language, load_vision
from chiasm.wire import ECPlace, Role

logger = logging.getLogger(__name__)

DEADLINE_CHECK_SECONDS = 0.02
_INLINE_TOKENS = 512
"""Up to so many tokens, hashing a prompt takes two tenths of a millisecond at most."""
_KV_ROLES = {Role.PREFILL: KVTransferRole.PRODUCER, Role.DECODE: KVTransferRole.CONSUMER}


class LanguageEngine(Engine):
    """The engine of all roles but the encoder's: prefill and decode in one thread, with continuous batching.

    A prefill engine ends each request after one token and leaves the prompt's KV for a decode engine, which continues from
    it.

    ``generate`` runs on the event loop, everything else of a request on the engine's thread. Between them are an inbox and
    one queue of outputs per request.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.role in (Role.PD, Role.PREFILL) and config.ec is None:
            raise ValueError(
                f"A {config.role} engine takes embeddings from an EC connector, but EngineConfig.ec is missing."
            )
        if (config.role in _KV_ROLES) != (config.kv is not None):
            raise ValueError(
                "EngineConfig.kv is for prefill and decode engines; they need it, and others must not have it."
            )
        super().__init__(config)
        self._inbox = Inbox()
        self._states: dict[str, RequestState] = {}
        self._questions: list[Question] = []
        self._arrivals = itertools.count()
        self._thread: threading.Thread | None = None
        self._kv_transfers: KVTransfers | None = None
        self._next_deadline_check = 0.0
        self._stalls_measured_at = -1
        self._prompt_tokens = 0
        self._generation_tokens = 0

    # ---- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        config = self.config
        lower_session_priority(config.nice)
        use_threads(config.threads)
        check_memory(config.model, self.device)
        self._language = load_language(config.model, dtype=self.dtype, device=self.device, progress=self.progress)
        encoder: LocalEncoder | None = None
        if config.role is Role.AGGREGATED:
            vision = load_vision(config.model, dtype=self.dtype, device=self.device, progress=self.progress)
            encoder = LocalEncoder(vision, self._core_share.worker(), self._item_news)
        ec_connectors = None if config.ec is None else self._connect(config.ec, self._language.entry_width)
        kv_connectors = None if config.kv is None else self._connect_kv(config.kv)
        num_blocks, self.max_model_len = kv_cache_blocks(config, self._language, self.max_model_len)
        kv_cache = KVCache(
            self._language,
            num_blocks=num_blocks,
            block_size=config.block_size,
            allocate=None if kv_connectors is None else kv_connectors[1].allocate_kv_cache,
        )
        self._runner = ModelRunner(self._language, kv_cache, self.processor.eos_token_ids)
        self._worker = self._core_share.worker()
        self._worker.follow(self._language.module)
        costs = language_costs(self.processor, self._runner, self.max_model_len)
        self._pace = PrefillPace(costs.prefill_seconds_per_token)
        if encoder is not None:
            costs = structs.replace(costs, images=image_costs(self.processor, self.device, encoder.encode))
            encoder.start(costs)
        self.costs = costs
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_prefill_tokens=MAX_PREFILL_TOKENS[self.device.type],
                max_mixed_prefill_tokens=mixed_prefill_tokens(self.device.type, costs),
                min_text_before_item=MIN_TEXT_BEFORE_ITEM,
                max_num_seqs=config.max_num_seqs,
                max_queued_requests=config.max_queued_requests,
                entry_bytes_per_row=self._language.entry_width * self.dtype.itemsize,
                recomputes_items=config.role is not Role.DECODE,
            ),
            BlockManager(num_blocks, config.block_size),
            EncoderCacheManager(config.encoder_cache_bytes),
        )
        self._embeddings = Embeddings(
            self._scheduler, self._language.entry_width, connectors=ec_connectors, encoder=encoder
        )
        if ec_connectors is not None:
            ec_connectors[0].set_wake(self._item_news)
        if kv_connectors is not None:
            self._kv_transfers = KVTransfers(self._scheduler, kv_connectors)
            self._kv_transfers.start(kv_cache, self._language, lambda: self._inbox.put(Signal.WAKE))
        logger.info(
            "The %s engine is ready: %s on %s, %d KV blocks of %d tokens, a context of %d tokens.",
            config.role,
            self.dtype,
            self.device,
            num_blocks,
            config.block_size,
            self.max_model_len,
        )
        self._thread = threading.Thread(target=self._run, name="chiasm-engine", daemon=True)
        self._thread.start()

    def _connect_kv(self, config: KVTransferConfig) -> tuple[KVConnector, KVConnector]:
        """Make both halves of the KV connector, scheduler role first."""
        config = replace(
            config,
            role=_KV_ROLES[self.config.role],
            engine_id=uuid.uuid4().hex,
            fingerprint=self.model_fingerprint,
            device=str(self.device),
        )
        scheduler_role = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER)
        return scheduler_role, KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER)

    def stop(self) -> None:
        """End the engine's thread after its current step; running requests end with an error. Idempotent."""
        if self._thread is not None:
            self._inbox.put(Signal.STOP)
            self._thread.join()
            self._thread = None
            self._embeddings.stop()
            if self._kv_transfers is not None:
                self._kv_transfers.stop()

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def _item_news(self) -> None:
        """Have the engine look for embeddings. Called from any thread."""
        self._inbox.put(Signal.ITEM)

    # ---- the event loop's side ----------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """Yield the outputs of all choices as they come, each choice's last one with its ``finish_reason``.

        Raises InvalidRequestError, OverloadedError, EmbeddingUnavailableError, KVUnavailableError or DeadlineExceededError,
        before the first output if possible. Closing the iterator aborts the request within one step.
        """
        self._check(request)
        outputs: asyncio.Queue[Output | BaseException] = asyncio.Queue()
        arrived = time.monotonic()
        if len(request.prompt.token_ids) <= _INLINE_TOKENS:
            hasher = hash_tokens(request, self.config.block_size)
        else:
            hasher = await asyncio.to_thread(hash_tokens, request, self.config.block_size)
        self._inbox.put(RequestState(request, asyncio.get_running_loop(), outputs, arrived, hasher))
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
                self._inbox.put(Abort(request.request_id))

    async def awaited_embeddings(self) -> list[str]:
        """Return the identifiers that prompts need next and that are neither in memory nor on their way, each once.

        It is as of some moment after the call, and waits for the end of the step that runs.
        """
        missing = await self._missing_embeddings()
        awaited = await asyncio.to_thread(self._embeddings.not_coming, missing) if missing else []
        if not awaited:
            return []
        still_missing = set(await self._missing_embeddings())  # what came meanwhile isn't on its way any more either
        return [identifier for identifier in awaited if identifier in still_missing]

    async def _missing_embeddings(self) -> list[str]:
        if not self.healthy:
            return []
        loop = asyncio.get_running_loop()
        question = Question(loop, loop.create_future())
        self._inbox.put(question)
        return await question.answer

    def expect_embeddings(self, places: Mapping[str, ECPlace], stored: Collection[str]) -> None:
        """Note where embeddings are or will be, for requests that have come or will come."""
        self._embeddings.expect(places, stored)

    def give_back_kv(self, leases: Collection[str]) -> None:
        """Prefill: no decode instance will come for the KV of the requests whose ``kv_transfer_params`` had these leases."""
        self._inbox.put(GiveBack(frozenset(leases)))

    def _check(self, request: GenerateRequest) -> None:
        """Refuse what only the engine can know to be impossible, and assert what the server has checked."""
        if not self.healthy:
            raise ChiasmError("The engine of this instance has stopped; restart the instance.")
        prompt, params = request.prompt, request.kv_transfer_params
        given = [] if params is None else params.output_token_ids
        assert request.request_id not in self._states
        assert 1 <= request.num_choices <= MAX_CHOICES
        assert len(prompt.items) <= self.config.max_items
        assert 0 < len(prompt.token_ids) < self.max_model_len
        assert (params is not None) == (self.config.role in _KV_ROLES)
        assert not given or request.num_choices == 1
        assert len(prompt.token_ids) + len(given) <= self.max_model_len
        assert all(0 <= token_id < self.processor.vocab_size for token_id in given)
        request.sampling.check_vocabulary(self.processor.vocab_size)
        self._scheduler.items.check(prompt.items)

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap, from any thread."""
        if self._thread is None:
            return EngineStats()
        scheduler, blocks, embeddings = self._scheduler, self._scheduler.block_manager, self._embeddings
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_stalled=sum(1 for state in list(self._states.values()) if state.stalled_since is not None),
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
            ec_store=embeddings.store_stats,
            kv=self._kv_transfers.stats if self._kv_transfers is not None else None,
        )

    def outstanding_seconds(self) -> float:
        if self._thread is None:
            return 0.0
        sequences = [one for state in list(self._states.values()) for one in state.sequences]
        tokens = sum(max(0, one.num_prompt - one.num_computed) for one in sequences if not one.finished)
        return tokens * self._pace.seconds_per_token

    # ---- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        lower_priority(self.config.nice)
        use_threads(self.config.threads)
        # Only where this process encodes too: the threads that move KV rely on the default stream.
        encodes = self.config.role is Role.AGGREGATED
        with on_stream(self.device, HIGH_PRIORITY) if encodes else nullcontext():
            self._serve()
        self._fail_all(list(self._states.values()), "The engine of this instance stopped while the request ran.")
        self._answer_questions()

    def _serve(self) -> None:
        """Run steps until the engine has to stop."""
        idle = True
        while self._take_inbox(wait=idle):
            try:
                self._check_deadlines()
                self._collect_transfers()
                for state, failure in self._embeddings.update(self._states):
                    self._fail(state, failure)
                self._embeddings.encode(self._states)
                self._answer_questions()
                self._measure_stalls()
                idle = not self._step()
            except Exception as error:
                # An error that a step does not handle itself costs the requests that are here, not the instance.
                logger.exception("Planning a step failed; its %d requests fail with it.", len(self._states))
                self._fail_all(list(self._states.values()), f"The engine failed: {type(error).__name__}.")
                self._embeddings.forget_unfilled()
                idle = True

    def _take_inbox(self, *, wait: bool) -> bool:
        """Handle some of the inbox; with ``wait``, sleep until a message comes, a request is overdue, or a lost item is wanted.

        Return False if the engine has to stop.
        """
        for message in self._inbox.take(self._idle_seconds() if wait else 0.0):
            match message:
                case Signal.STOP:
                    return False
                case Abort(request_id) if request_id in self._states:
                    self._forget(self._states[request_id])
                case Signal.ITEM:
                    self._embeddings.look_again()
                case Question():
                    self._questions.append(message)
                case GiveBack(leases) if self._kv_transfers is not None:
                    self._kv_transfers.give_back(leases)
                case RequestState():
                    self._add(message)
        return True

    def _idle_seconds(self) -> float | None:
        """Return how long there is nothing to do if no message comes; None if there is no end to it."""
        deadlines = [state.request.deadline for state in self._states.values()]
        to_check = max(min(deadlines), self._next_deadline_check) - time.monotonic() if deadlines else None
        if to_check is not None and self._kv_transfers is not None:
            to_check = min(to_check, DEADLINE_CHECK_SECONDS)  # KV connectors may wake the engine, but need not
        ends = [seconds for seconds in (to_check, self._embeddings.seconds_to_update) if seconds is not None]
        return max(0.0, min(ends)) if ends else None

    def _add(self, state: RequestState) -> None:
        request, params = state.request, state.request.kv_transfer_params
        state.make_choices(
            self._arrivals,
            processor=self.processor,
            block_size=self.config.block_size,
            max_model_len=self.max_model_len,
            seconds_per_token=self._pace.seconds_per_token,
        )
        try:
            if self.config.role is Role.DECODE:
                assert self._kv_transfers is not None
                self._kv_transfers.admit(state)
            self._scheduler.add(state.sequences)
        except ChiasmError as error:
            if self._kv_transfers is not None:
                self._kv_transfers.drop(request)
            deliver([(state, error)])
            return
        self._states[request.request_id] = state
        if self.config.role is not Role.DECODE:
            self._prompt_tokens += len(request.prompt.token_ids)
            try:
                self._embeddings.admit(state)
            except Exception as error:
                logger.exception("The EC connector failed on a request, which fails with it.")
                self._fail(state, ChiasmError(f"The EC connector failed: {type(error).__name__}."))
                return
        if params is not None and params.output_token_ids:
            outputs = state.choices[0].resume()
            deliver((state, output) for output in outputs)
            if outputs[-1].finish_reason is not None:
                self._forget(state)

    def _answer_questions(self) -> None:
        if not self._questions:
            return
        questions, self._questions = self._questions, []
        missing = self._embeddings.missing()
        for loop, answer in questions:
            with suppress(RuntimeError):  # the event loop was closed
                loop.call_soon_threadsafe(_settle, answer, missing)

    def _collect_transfers(self) -> None:
        """See which KV transfers have ended, and begin those that were noted since."""
        if self._kv_transfers is not None:
            for state, error in self._kv_transfers.collect(self._states):
                self._fail(state, error)
            self._kv_transfers.flush()

    def _measure_stalls(self) -> None:
        if self._stalls_measured_at == self._scheduler.items.changes:
            return
        self._stalls_measured_at = self._scheduler.items.changes
        now = time.monotonic()
        for state in self._states.values():
            if state.timing.items and state.timing.first_token_seconds is None:
                state.note_stalled(self._scheduler.items.is_stalled(state.sequences[0]), now)

    # ---- a step -------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Plan a step, run it, and send what it sampled. Return False if there was nothing to run."""
        step = self._scheduler.schedule()
        self._embeddings.drop_evicted()
        self._start_loads(step)
        if not step.scheduled:
            return bool(step.preempted)
        self._fail_in(step, self._embeddings.unusable(step, self._states))
        self._note_scheduled(step)
        if not step.scheduled:
            return True
        started = time.monotonic()
        result = run_step(self._execute, step)
        if step.prefills:
            self._pace.note(step.num_rows, time.monotonic() - started)
        self._fail_in(step, [(self._states[part.sequence.request_id], error) for part, error in result.failed])
        self._scheduler.complete(step, {name: token.token_id for name, token in result.sampled.items()})
        self._send(step, result.sampled)
        return True

    def _execute(self, step: Step) -> dict[str, Sampled]:
        with self._worker.computing(self._seconds_of(step)):
            return self._runner.execute(step, self._embeddings.entries)

    def _seconds_of(self, step: Step) -> float:
        """Return about what the step takes on one core."""
        assert self.costs is not None
        rows = step.num_rows * self.costs.prefill_seconds_per_token
        return max(rows, self.costs.decode_step_seconds) if rows else math.inf

    def _start_loads(self, step: Step) -> None:
        """Have the blocks filled that the step gave to sequences whose KV is on another instance (decode role)."""
        if self._kv_transfers is None:
            return
        self._kv_transfers.load(step, self._states)
        lost = [sequence for sequence in step.preempted if sequence.items and self.config.role is Role.DECODE]
        self._fail_in(step, [(self._states[sequence.request_id], self._preempted_error()) for sequence in lost])
        self._kv_transfers.flush()

    @staticmethod
    def _preempted_error() -> ChiasmError:
        return KVUnavailableError(
            "Preempted: this instance ran out of KV blocks, and a decode instance cannot recompute image tokens. "
            "Have the prompt prefilled again.",
            code=Code.PREEMPTED,
        )

    def _note_scheduled(self, step: Step) -> None:
        now = time.monotonic()
        for part in step.prefills:
            state = self._states[part.sequence.request_id]
            if state.missing:
                for item in part.sequence.items_between(part.start, part.end):
                    self._embeddings.note(state, item.identifier, ItemOutcome.WAITED)
            state.note_scheduled(now)

    def _send(self, step: Step, sampled: dict[str, Sampled]) -> None:
        """Make outputs of the new tokens, end the choices that end with them, and deliver all outputs at once."""
        outputs: list[tuple[RequestState, Output]] = []
        now = time.monotonic()
        for part in step.scheduled:
            if not part.samples:
                continue
            state = self._states.get(part.sequence.request_id)
            if state is None:
                continue  # another of its choices has just failed
            token = sampled[part.sequence.sequence_id]
            if token.failure is not None:
                self._fail(state, InvalidRequestError(token.failure, code=Code.INVALID_GRAMMAR))
                continue
            choice = state.choices[part.sequence.index]
            self._generation_tokens += 1
            state.note_token(now)
            output = choice.output(token)
            if self.config.role is Role.PREFILL:
                assert self._kv_transfers is not None
                output = self._kv_transfers.hand_over(state, choice.sequence, output)
            outputs.append((state, output))
            if output.finish_reason is not None:
                choice.done = True
                self._scheduler.finish(part.sequence)
                if state.done:
                    self._forget(state)
        if self._kv_transfers is not None:
            self._kv_transfers.flush()  # before a decode instance comes for the blocks
        deliver(outputs)

    # ---- ends ---------------------------------------------------------------------------------------------------------

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if now >= self._next_deadline_check:
            self._next_deadline_check = now + DEADLINE_CHECK_SECONDS
            for state in [state for state in self._states.values() if state.request.deadline <= now]:
                self._fail(state, state.overdue_error(now))

    def _fail_all(self, states: Iterable[RequestState], message: str) -> None:
        for state in states:
            self._fail(state, ChiasmError(message))

    def _fail_in(self, step: Step, failures: Iterable[tuple[RequestState, ChiasmError]]) -> None:
        """Fail these requests and take them out of the step, which continues without them."""
        for state, error in failures:
            self._fail(state, error)
        step.drop_finished()

    def _fail(self, state: RequestState, error: ChiasmError) -> None:
        """End a request with an error, unless it has ended already."""
        if self._states.get(state.request.request_id) is state:
            for identifier in list(state.missing):
                self._embeddings.note(state, identifier, ItemOutcome.MISSED)
            self._forget(state)
            deliver([(state, error)])

    def _forget(self, state: RequestState) -> None:
        """Free all that a request holds, however it ended."""
        request_id = state.request.request_id
        for sequence in state.sequences:
            self._scheduler.finish(sequence)
        del self._states[request_id]
        self._embeddings.forget(state)
        if self._kv_transfers is not None and not state.handed_over:
            self._kv_transfers.drop(state.request)
        self._runner.forget(request_id)


def _settle(answer: asyncio.Future[list[str]], missing: list[str]) -> None:
    if not answer.done():
        answer.set_result(missing)
