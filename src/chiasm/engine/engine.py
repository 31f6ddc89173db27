"""The engine of an instance with a language model: a thread that plans a step, runs it, and hands out what came of it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from chiasm.ec_transfer import ECConnector, ECConnectorFactory, ECConnectorRole
from chiasm.engine.attention import KVCache, register_paged_attention
from chiasm.engine.block_manager import BlockManager
from chiasm.engine.config import EngineConfig, Role
from chiasm.engine.detokenizer import Detokenizer
from chiasm.engine.device import (
    MIXED_PREFILL_TOKENS,
    check_memory,
    choose_device,
    choose_dtype,
    kv_cache_blocks,
    use_threads,
)
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.handover import Handover, given_logprobs, wire_logprobs
from chiasm.engine.model_runner import ModelRunner
from chiasm.engine.request import (
    MAX_CHOICES,
    FinishReason,
    GenerateRequest,
    ItemOutcome,
    ItemTiming,
    Output,
    RequestTiming,
)
from chiasm.engine.sampler import Sampled
from chiasm.engine.scheduler import Scheduler, SchedulerConfig, Step
from chiasm.engine.sequence import Sequence
from chiasm.engine.stats import EngineStats
from chiasm.errors import (
    ChiasmError,
    DeadlineExceededError,
    EmbeddingUnavailableError,
    InvalidRequestError,
    KVUnavailableError,
)
from chiasm.kv_transfer import KVLayout, KVTransferRole
from chiasm.kv_transfer.params import TokenLogprob
from chiasm.models import fingerprint, load_language, load_processor, load_vision
from chiasm.models.base import PromptItem

if TYPE_CHECKING:
    from chiasm.kv_transfer import KVTransferParams
    from chiasm.models.base import VisionModel

logger = logging.getLogger(__name__)

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.0005, 0.01
POLL_SHARE = 0.01
"""How often missing embeddings are looked for while nothing else is to be done: after a hundredth of the shortest wait."""
DEADLINE_CHECK_SECONDS = 0.02


@dataclass
class _Choice:
    """One continuation of a request, with its text so far."""

    sequence: Sequence
    detokenizer: Detokenizer
    done: bool = False


@dataclass
class _RequestState:
    """A request as the engine thread knows it."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Output | BaseException]
    arrived: float
    choices: list[_Choice] = field(default_factory=list)
    timing: RequestTiming = field(default_factory=RequestTiming)
    missing: dict[str, ItemTiming] = field(default_factory=dict)
    """Items counted neither as hit nor as waited for yet."""
    first_scheduled: float | None = None
    load_started: float | None = None
    handed_over: bool = False
    """Its blocks were left for a decode instance."""
    stalled_since: float | None = None
    waited_before_start: float = 0.0

    @property
    def sequences(self) -> list[Sequence]:
        return [choice.sequence for choice in self.choices]

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)


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


class LanguageEngine:
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
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, config.model, self.device)
        self.config = config
        self.processor = load_processor(config.model)
        self.model_fingerprint = fingerprint(config.model, str(self.dtype).removeprefix("torch."))
        self.max_model_len = min(config.max_model_len or self.processor.max_model_len, self.processor.max_model_len)
        self.ec_store = ""
        self._inbox: queue.SimpleQueue[_RequestState | _Abort | _Stop | _Wake] = queue.SimpleQueue()
        self._states: dict[str, _RequestState] = {}
        self._encoder_cache: dict[str, Tensor] = {}
        self._arrivals = itertools.count()
        self._thread: threading.Thread | None = None
        self._vision: VisionModel | None = None
        self._ec_scheduler: ECConnector | None = None
        self._ec_worker: ECConnector | None = None
        self._handover: Handover | None = None
        self._finished_requests: set[str] = set()
        self._next_deadline_check = 0.0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._items: Counter[ItemOutcome] = Counter()
        self._item_wait_seconds = 0.0
        self._images_encoded = 0
        self._encode_seconds = 0.0

    # ---- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the role's weights and begin to serve. Slow; raises ConfigurationError when the model can't be served."""
        config = self.config
        use_threads(config.threads)
        check_memory(config.model, self.device)
        register_paged_attention()
        self._language = load_language(config.model, dtype=self.dtype, device=self.device)
        if config.role is Role.AGGREGATED:
            self._vision = load_vision(config.model, dtype=self.dtype, device=self.device)
        if config.ec is not None:
            ec = replace(config.ec, fingerprint=self.model_fingerprint, device=str(self.device))
            self._ec_scheduler = ECConnectorFactory.create_connector(ec, ECConnectorRole.SCHEDULER)
            self._ec_worker = ECConnectorFactory.create_connector(ec, ECConnectorRole.WORKER)
            self.ec_store = self._ec_scheduler.store_id()
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
            ),
            BlockManager(num_blocks, config.block_size),
            EncoderCacheManager(config.encoder_cache_bytes),
        )
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
        for connector in (self._ec_scheduler, self._ec_worker):
            if connector is not None:
                connector.shutdown()
        if self._handover is not None:
            self._handover.stop()

    def _layout(self, kv_cache: KVCache) -> KVLayout:
        language = self._language
        return KVLayout(
            num_layers=language.num_layers,
            block_size=self.config.block_size,
            num_kv_heads=language.num_kv_heads,
            head_dim=language.head_dim,
            dtype=str(self.dtype).removeprefix("torch."),
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
        state = _RequestState(request, asyncio.get_running_loop(), outputs, time.monotonic())
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
        scheduler, blocks = self._scheduler, self._scheduler.block_manager
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
            items=dict(self._items),
            item_wait_seconds=self._item_wait_seconds,
            encoder_cache_bytes=scheduler.encoder_cache.used_bytes,
            images_encoded=self._images_encoded,
            encode_seconds=self._encode_seconds,
            ec=self._ec_worker.stats if self._ec_worker is not None else None,
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
        self._scheduler.check(len(prompt.token_ids) + len(given), prompt.items)
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
                self._load_items()
                idle = not self._step()
            except Exception as error:
                # What a step's own guards did not foresee costs the requests that are here, not the instance.
                logger.exception(
                    "planning a step failed; the %d requests that are here fail with it", len(self._states)
                )
                self._fail_all(list(self._states), ChiasmError(f"the engine failed: {type(error).__name__}"))
                for identifier in self._scheduler.encoder_cache.identifiers - self._encoder_cache.keys():
                    self._scheduler.item_lost(identifier)
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
            elif isinstance(message, _RequestState):
                self._add(message)

    def _poll_seconds(self) -> float:
        now = time.monotonic()
        stalls = [now - state.stalled_since for state in self._states.values() if state.stalled_since is not None]
        if not stalls:
            return DEADLINE_CHECK_SECONDS
        return min(max(POLL_SHARE * min(stalls), MIN_POLL_SECONDS), MAX_POLL_SECONDS)

    def _add(self, state: _RequestState) -> None:
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
                arrival=next(self._arrivals),
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
            state.choices.append(_Choice(sequence, detokenizer))
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
            self._count_items(state)
        if params is not None and params.output_token_ids:
            self._resume(state, state.choices[0], params)

    def _resume(self, state: _RequestState, choice: _Choice, params: KVTransferParams) -> None:
        """Put the tokens that came with the request into the answer, those that the client has and those it hasn't."""
        texts: list[str] = []
        finish_reason: FinishReason | None = None
        stop_reason: int | str | None = None
        for number, token_id in enumerate(params.output_token_ids, start=1):
            finish_reason, stop_reason, text = self._check_stop(choice, token_id, number)
            texts.append(text)
            if finish_reason is not None:
                break
        given, num_sent = params.output_token_ids[: len(texts)], params.num_sent
        outputs: list[Output] = []
        if num_sent:
            outputs.append(self._given_output(state, given[:num_sent], "".join(texts[:num_sent]), already_sent=True))
        if len(given) > num_sent or finish_reason is not None:
            logprobs = given_logprobs(params)
            output = self._given_output(state, given[num_sent:], "".join(texts[num_sent:]))
            logprobs = logprobs[: len(output.token_ids)] if logprobs is not None else None
            outputs.append(replace(output, logprobs=logprobs, finish_reason=finish_reason, stop_reason=stop_reason))
        self._call(state.loop, [(state.outputs, output) for output in outputs])
        if finish_reason is not None:
            choice.done = True
            self._forget(state)

    def _given_output(
        self, state: _RequestState, token_ids: list[int], text: str, *, already_sent: bool = False
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

    def _count_items(self, state: _RequestState) -> None:
        """See which items are there on admission; the others count when they come, or when the request fails."""
        sequence = state.sequences[0]
        num_cached = self._scheduler.num_cached_tokens(sequence)
        all_stored = self._ec_scheduler is not None and self._ec_scheduler.ensure_cache_available(sequence, num_cached)
        for item in sequence.items:
            if any(timing.identifier == item.identifier for timing in state.timing.items):
                continue
            timing = ItemTiming(item.identifier, ItemOutcome.MISSED)
            state.timing.items.append(timing)
            if (
                all_stored
                or item.offset + item.length <= num_cached
                or item.identifier in self._encoder_cache
                or (self._ec_scheduler is not None and self._ec_scheduler.has_cache_item(item.identifier))
            ):
                timing.outcome = ItemOutcome.HIT
                self._items[ItemOutcome.HIT] += 1
            else:
                state.missing[item.identifier] = timing

    def _note_item(self, state: _RequestState, identifier: str, outcome: ItemOutcome) -> None:
        timing = state.missing.pop(identifier, None)
        if timing is not None:
            timing.outcome = outcome
            timing.wait_seconds = time.monotonic() - state.arrived
            self._items[outcome] += 1
            self._item_wait_seconds += timing.wait_seconds

    def _collect_transfers(self) -> None:
        """See which transfers have ended, and go on or give up with their requests; begin what was noted since."""
        if self._handover is None:
            return
        finished = self._handover.collect(self._scheduler)
        now = time.monotonic()
        for request_id, index in finished.loaded:
            state = self._states.get(request_id)
            if state is not None and index == 0 and state.load_started is not None:
                state.timing.kv_seconds = now - state.load_started
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
            if state.load_started is None:
                state.load_started = now
                state.timing.queue_seconds = now - state.arrived
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

    def _load_items(self) -> None:
        """Load, through the connector, the embeddings that the next chunks want and that exist by now."""
        if self._ec_scheduler is None or self._ec_worker is None:
            return
        arrivals: list[tuple[Sequence, PromptItem]] = []
        for sequence, items in self._scheduler.wanted_items():
            for item in items:
                if item.identifier not in self._scheduler.encoder_cache:
                    if not self._ec_scheduler.has_cache_item(item.identifier):
                        break
                    if not self._scheduler.make_room(sequence, item):
                        break
                    self._ec_scheduler.update_state_after_alloc(sequence, sequence.items.index(item))
                self._scheduler.item_arrived(sequence, item)
                arrivals.append((sequence, item))
        metadata = self._ec_scheduler.build_connector_meta()
        if metadata.loads:
            started = time.monotonic()
            self._ec_worker.bind_connector_metadata(metadata)
            self._ec_worker.start_load_caches(self._encoder_cache)
            self._ec_worker.clear_connector_metadata()
            seconds = time.monotonic() - started
            for identifier in metadata.loads:
                if identifier not in self._encoder_cache:
                    self._scheduler.item_lost(identifier)
            for request_id in {sequence.request_id for sequence, _ in arrivals}:
                self._states[request_id].timing.transfer_seconds += seconds
        for sequence, item in arrivals:
            if item.identifier in self._encoder_cache:
                self._note_item(self._states[sequence.request_id], item.identifier, ItemOutcome.WAITED)
        self._measure_stalls()

    def _measure_stalls(self) -> None:
        now = time.monotonic()
        for state in self._states.values():
            if state.timing.first_token_seconds is not None or not state.timing.items:
                continue
            stalled = self._scheduler.is_stalled(state.sequences[0])
            if stalled and state.stalled_since is None:
                state.stalled_since = now
            elif not stalled and state.stalled_since is not None:
                state.timing.wait_seconds += now - state.stalled_since
                if state.first_scheduled is None:
                    state.waited_before_start += now - state.stalled_since
                state.stalled_since = None

    def _drop_evicted(self) -> None:
        for identifier in self._scheduler.encoder_cache.take_evicted():
            self._encoder_cache.pop(identifier, None)

    def _step(self) -> bool:
        """Plan and run one step. Returns False if there was nothing to run."""
        step = self._scheduler.schedule()
        self._drop_evicted()
        self._begin_loads(step)
        if not step.scheduled and not step.encode:
            return False
        self._encode(step)
        self._refuse_misfits(step)
        self._note_scheduled(step)
        if not step.scheduled:
            return True
        try:
            sampled = self._runner.execute(step, self._encoder_cache)
        except Exception as error:
            logger.exception("a step failed; its %d requests fail with it", len(step.scheduled))
            failure = ChiasmError(f"the model failed on this request: {type(error).__name__}")
            self._fail_all({part.sequence.request_id for part in step.scheduled}, failure)
            return True
        self._scheduler.complete(step, {name: token.token_id for name, token in sampled.items()})
        self._hand_out(step, sampled)
        if self._ec_worker is not None and self._finished_requests:
            self._ec_worker.get_finished(self._finished_requests)
        self._finished_requests.clear()
        return True

    def _encode(self, step: Step) -> None:
        """Make the embeddings that the step needs (aggregated role)."""
        for sequence, item in step.encode:
            state = self._states.get(sequence.request_id)
            if state is None:
                self._scheduler.item_lost(item.identifier)
                continue
            assert self._vision is not None
            started = time.monotonic()
            try:
                entry = self._vision.encode(state.request.pixels[item.identifier])
            except Exception as error:
                logger.exception("encoding failed")
                self._scheduler.item_lost(item.identifier)
                self._fail(state, ChiasmError(f"the encoder failed on an image: {type(error).__name__}"))
                continue
            self._encoder_cache[item.identifier] = entry
            seconds = time.monotonic() - started
            self._images_encoded += 1
            self._encode_seconds += seconds
            state.timing.encode_seconds += seconds
            timing = state.missing.get(item.identifier)
            if timing is not None:
                timing.encode_seconds = seconds
                self._note_item(state, item.identifier, ItemOutcome.ENCODED)
        step.prefills = [part for part in step.prefills if not part.sequence.finished]

    def _refuse_misfits(self, step: Step) -> None:
        """Fail the requests whose item is not what they said, or was lost between planning and now; the step goes on."""
        for part in list(step.prefills):
            for item in part.sequence.items_between(part.start, part.end):
                entry = self._encoder_cache.get(item.identifier)
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
                    self._note_item(state, item.identifier, ItemOutcome.WAITED)
            if state.first_scheduled is None:
                state.first_scheduled = now
                state.timing.queue_seconds = (
                    now - state.arrived - state.waited_before_start - state.timing.encode_seconds
                )

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

    def _hand_over(self, state: _RequestState, choice: _Choice, output: Output) -> Output:
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

    def _output(self, state: _RequestState, choice: _Choice, sampled: Sampled) -> Output:
        self._generation_tokens += 1
        sequence, params = choice.sequence, state.request.kv_transfer_params
        now = time.monotonic()
        timing = state.timing
        if timing.first_token_seconds is None:
            timing.first_token_seconds = now - state.arrived
            started = state.first_scheduled if state.first_scheduled is not None else now
            waited_since_start = timing.wait_seconds - state.waited_before_start
            timing.prefill_seconds = now - started - waited_since_start - timing.transfer_seconds
        finish_reason, stop_reason, text = self._check_stop(choice, sampled.token_id, sequence.num_output)
        return Output(
            index=sequence.index,
            token_ids=(sampled.token_id,),
            text=text,
            logprobs=None if sampled.logprobs is None else (sampled.logprobs,),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            timing=timing,
            num_cached_tokens=sequence.num_cached if params is None else params.cached_tokens or sequence.num_cached,
        )

    def _check_stop(
        self, choice: _Choice, token_id: int, num_output: int
    ) -> tuple[FinishReason | None, int | str | None, str]:
        """Whether output token number ``num_output``, from 1, ends the choice, and the text that it makes certain."""
        sequence, params = choice.sequence, choice.sequence.sampling
        enough = num_output >= params.min_tokens
        if enough and not params.ignore_eos and token_id in self.processor.eos_token_ids:
            return "stop", None, choice.detokenizer.finish()
        if enough and token_id in params.stop_token_ids:
            return "stop", token_id, choice.detokenizer.finish()
        text, stop = choice.detokenizer.add(token_id)
        if stop is not None:
            return "stop", stop, text
        if num_output >= params.max_tokens or sequence.num_prompt + num_output >= self.max_model_len:
            return "length", None, text + choice.detokenizer.finish()
        return None, None, text

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

    def _fail(self, state: _RequestState, error: ChiasmError) -> None:
        for identifier in list(state.missing):
            self._note_item(state, identifier, ItemOutcome.MISSED)
        self._forget(state)
        self._send(state, error)

    def _forget(self, state: _RequestState) -> None:
        request_id = state.request.request_id
        for sequence in state.sequences:
            self._scheduler.finish(sequence)
        del self._states[request_id]
        if self._handover is not None and not state.handed_over:
            self._handover.drop(state.request)
        self._runner.forget(request_id)
        self._finished_requests.add(request_id)

    def _send(self, state: _RequestState, error: BaseException) -> None:
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
