"""The engine of an instance with a language model: what it consists of, and what the event loop calls."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from chiasm.cores import lower_session_priority
from chiasm.engine.attention import KVCache
from chiasm.engine.base import Engine
from chiasm.engine.block_manager import BlockManager
from chiasm.engine.calibration import image_costs, language_costs
from chiasm.engine.config import EngineConfig
from chiasm.engine.device import (
    MAX_PREFILL_TOKENS,
    MAX_REST_TOKENS,
    MIN_TEXT_BEFORE_ITEM,
    check_memory,
    kv_cache_blocks,
    use_threads,
)
from chiasm.engine.embeddings import Embeddings
from chiasm.engine.encoder_cache_manager import EncoderCacheManager
from chiasm.engine.inbox import Abort, Arrival, GiveBack, Inbox, Question, Signal
from chiasm.engine.kv_transfers import KVTransfers
from chiasm.engine.local_encoder import LocalEncoder
from chiasm.engine.model_runner import ModelRunner
from chiasm.engine.request import MAX_CHOICES, EngineStats, GenerateRequest, Output, SamplingParams
from chiasm.engine.request_state import RequestState, hash_tokens
from chiasm.engine.scheduler import Scheduler, SchedulerConfig
from chiasm.engine.step_loop import StepLoop
from chiasm.errors import ChiasmError, ConfigurationError, InvalidRequestError
from chiasm.kv_transfer import KVConnector, KVConnectorFactory, KVConnectorRole, KVTransferConfig, KVTransferRole
from chiasm.models import load_language, load_vision
from chiasm.models.base import LanguageModel, Processor
from chiasm.models.products import MakeProduct, product
from chiasm.models.zendnn import product_of_zendnn
from chiasm.wire import ECPlace, Role

logger = logging.getLogger(__name__)

_INLINE_TOKENS = 512
"""Up to so many tokens, hashing a prompt takes two tenths of a millisecond at most."""
_KV_ROLES = {Role.PREFILL: KVTransferRole.PRODUCER, Role.DECODE: KVTransferRole.CONSUMER}


class LanguageEngine(Engine):
    """The engine of all roles but the encoder's: prefill and decode in one thread, with continuous batching.

    A prefill engine ends each request after one token and leaves the prompt's KV for a decode engine, which continues from
    it.

    ``generate`` runs on the event loop, everything else of a request on the engine's thread (:class:`StepLoop`). Between them
    are an inbox and one queue of outputs per request.
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
        _check_default_sampling(config.model, self.processor)
        self._inbox = Inbox()
        self._thread: threading.Thread | None = None
        self._kv_transfers: KVTransfers | None = None

    # ---- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        config = self.config
        lower_session_priority(config.nice)
        use_threads(config.threads)
        check_memory(config.model, self.device, None if config.role is Role.AGGREGATED else "language")
        self._language = self._load_language()
        encoder: LocalEncoder | None = None
        if config.role is Role.AGGREGATED:
            vision = load_vision(config.model, dtype=self.dtype, device=self.device, progress=self.progress)
            encoder = LocalEncoder(vision, self._core_share.worker(encodes=True), self._item_news)
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
        worker = self._core_share.worker()
        worker.follow(self._language.module)
        costs = language_costs(self.processor, self._runner, self.max_model_len)
        if encoder is not None:
            costs = structs.replace(costs, images=image_costs(self.processor, self.device, encoder.encode))
            encoder.start(costs)
        self.costs = costs
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_prefill_tokens=MAX_PREFILL_TOKENS[self.device.type],
                max_rest_tokens=MAX_REST_TOKENS,
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
            self._kv_transfers.start(
                kv_cache,
                self._language,
                lambda: self._inbox.put(Signal.WAKE),
                max_aside_bytes=config.encoder_cache_bytes,
            )
        self._loop = StepLoop(
            config,
            self._inbox,
            processor=self.processor,
            max_model_len=self.max_model_len,
            device=self.device,
            costs=costs,
            scheduler=self._scheduler,
            embeddings=self._embeddings,
            kv_transfers=self._kv_transfers,
            runner=self._runner,
            worker=worker,
        )
        logger.info(
            "The %s engine is ready: %s on %s, %d KV blocks of %d tokens, a context of %d tokens.",
            config.role,
            self.dtype,
            self.device,
            num_blocks,
            config.block_size,
            self.max_model_len,
        )
        self._thread = threading.Thread(target=self._loop.run, name="chiasm-engine", daemon=True)
        self._thread.start()

    def _load_language(self) -> LanguageModel:
        make: MakeProduct = product
        if self.config.zendnn:
            if self.device.type != "cpu":
                raise ConfigurationError(
                    f"--zendnn is for CPUs, and this instance computes on {self.device}; leave it out."
                )
            make = product_of_zendnn("--zendnn")
        return load_language(
            self.config.model, dtype=self.dtype, device=self.device, progress=self.progress, make_product=make
        )

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

    def _item_news(self, arrived: str = "", /) -> None:
        """Have the engine look for embeddings, or only for the one that has arrived. Called from any thread."""
        self._inbox.put(Arrival(arrived) if arrived else Signal.ITEM)

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

    async def lost_embeddings(self, asker: str, published: Collection[str]) -> list[str]:
        """Return which of these embeddings prompts need next that are neither in memory nor on their way, once there are any.

        Returns nothing when the same asker asks again, or the engine stops. What it returns may have come meanwhile; only
        ``awaited_embeddings`` is sure. Cancelling it ends the question.
        """
        if not self.healthy:
            return []
        told = asyncio.wrap_future(self._embeddings.losses.ask(asker, published))
        try:
            await self._missing_embeddings()  # the engine's thread notes them
            return await told
        finally:
            told.cancel()

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
        assert request.request_id not in self._loop.states
        assert 1 <= request.num_choices <= MAX_CHOICES
        assert len(prompt.items) <= self.config.max_items
        assert 0 < len(prompt.token_ids) < self.max_model_len
        assert (params is not None) == (self.config.role in _KV_ROLES)
        assert not given or request.num_choices == 1
        assert len(prompt.token_ids) + len(given) <= self.max_model_len
        assert all(0 <= token_id < self.processor.vocab_size for token_id in given)
        request.sampling.check_vocabulary(self.processor.vocab_size)
        self._embeddings.check(prompt.items)

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap, from any thread."""
        if self._thread is None:
            return EngineStats()
        scheduler, blocks, embeddings = self._scheduler, self._scheduler.block_manager, self._embeddings
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_stalled=sum(1 for state in list(self._loop.states.values()) if state.stalled_since is not None),
            kv_blocks_total=blocks.num_blocks,
            kv_blocks_used=blocks.num_blocks - blocks.num_free,
            prefix_cache_query_tokens=scheduler.prefix_query_tokens,
            prefix_cache_hit_tokens=scheduler.prefix_hit_tokens,
            prompt_tokens=self._loop.prompt_tokens,
            generation_tokens=self._loop.generation_tokens,
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
        return 0.0 if self._thread is None else self._loop.unfinished_seconds()


def _check_default_sampling(model: Path, processor: Processor) -> None:
    """Raise ConfigurationError if requests that leave sampling to the checkpoint would be refused."""
    values: dict[str, Any] = dict(processor.default_sampling)
    try:
        SamplingParams(**values)
    except InvalidRequestError as error:
        raise ConfigurationError(f"{model / 'generation_config.json'}: {error.message} Correct it.") from error
