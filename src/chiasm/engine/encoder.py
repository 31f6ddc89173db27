"""The engine of an encoder instance: images in, published embeddings out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from chiasm.engine.base import Engine
from chiasm.engine.config import EngineConfig
from chiasm.engine.device import check_memory, use_threads
from chiasm.engine.request import EncodedItem, EncodeItem, ItemOutcome
from chiasm.engine.stats import EngineStats
from chiasm.errors import ChiasmError, DeadlineExceededError, InvalidRequestError, OverloadedError
from chiasm.media import MediaConfig
from chiasm.media.image import decode
from chiasm.models import load_vision
from chiasm.models.base import Pixels

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Encoding:
    """An item that is being encoded, and how many requests wait for it."""

    task: asyncio.Task[EncodedItem]
    waiters: int = 0


@dataclass
class _Progress:
    """Seconds of the stages of one item; what is neither is queueing."""

    started: float = field(default_factory=time.monotonic)
    preprocess: float = 0.0
    encode: float = 0.0
    publish: float = 0.0

    def result(self, identifier: str, metadata: dict[str, list[int]], outcome: ItemOutcome) -> EncodedItem:
        total = time.monotonic() - self.started
        return EncodedItem(
            identifier,
            metadata,
            outcome,
            self.preprocess,
            self.encode,
            self.publish,
            max(0.0, total - self.preprocess - self.encode - self.publish),
        )


class EncoderEngine(Engine):
    """Role ``encoder``. Each stage has threads of its own, so that an item is published while the next is encoded.

    An item is encoded by itself, in order of arrival; the same item asked for twice at once is encoded once.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.ec is None:
            raise ValueError("an encoder publishes through a connector: EngineConfig.ec is missing")
        super().__init__(config)
        self._started = False
        self._in_flight: dict[str, _Encoding] = {}
        self._items: Counter[ItemOutcome] = Counter()
        self._encode_seconds = 0.0

    def start(self) -> None:
        config = self.config
        assert config.ec is not None
        use_threads(config.threads)
        check_memory(config.model, self.device)
        self._vision = load_vision(config.model, dtype=self.dtype, device=self.device)
        self._ec_scheduler, self._ec_worker = self._connect(config.ec)
        self._preprocess_pool = ThreadPoolExecutor(1, "chiasm-preprocess")
        self._encode_pool = ThreadPoolExecutor(1, "chiasm-encode", initializer=use_threads, initargs=(config.threads,))
        self._publish_pool = ThreadPoolExecutor(2, "chiasm-publish")
        self._started = True
        logger.info("encoder ready: %s on %s", self.dtype, self.device)

    def stop(self) -> None:
        """Drop what has not begun and wait for what has. Idempotent."""
        if self._started:
            self._started = False
            for pool in (self._preprocess_pool, self._encode_pool, self._publish_pool):
                pool.shutdown(cancel_futures=True)
            self._ec_scheduler.shutdown()
            self._ec_worker.shutdown()

    @property
    def healthy(self) -> bool:
        return self._started

    def stats(self) -> EngineStats:
        """A snapshot; cheap, from any thread."""
        return EngineStats(
            num_running=min(1, len(self._in_flight)),
            num_waiting=max(0, len(self._in_flight) - 1),
            items=dict(self._items),
            images_encoded=self._items[ItemOutcome.ENCODED],
            encode_seconds=self._encode_seconds,
            ec=self._ec_worker.stats if self._started else None,
        )

    async def encode(self, request_id: str, items: Sequence[EncodeItem], deadline: float) -> list[EncodedItem]:
        """Publish the embeddings of ``items`` and answer, in their order, when all can be found.

        ``deadline`` is in ``time.monotonic()``. Raises MediaError for what is no image, OverloadedError when too much
        is queued, StorageError when an embedding could not be published, DeadlineExceededError. Cancelling drops what
        has not begun and nobody else waits for.
        """
        if len(items) > self.config.max_items:
            raise InvalidRequestError(f"the request has {len(items)} images and {self.config.max_items} is the limit")
        timeout = deadline - time.monotonic()
        tasks = [asyncio.ensure_future(self._share(item)) for item in items]
        try:
            async with asyncio.timeout(timeout):
                return list(await asyncio.gather(*tasks))
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the images of {request_id} were not encoded within {timeout:.1f} s"
            ) from error
        finally:
            for task in tasks:
                task.cancel()

    async def _share(self, item: EncodeItem) -> EncodedItem:
        """Encode an item, together with whoever else asks for it at this time."""
        encoding = self._in_flight.get(item.identifier)
        if encoding is None:
            if len(self._in_flight) >= self.config.max_queued_requests:
                raise OverloadedError(f"{len(self._in_flight)} images are queued on this encoder; try again later")
            encoding = _Encoding(asyncio.create_task(self._encode(item)))
            self._in_flight[item.identifier] = encoding
        encoding.waiters += 1
        try:
            return await asyncio.shield(encoding.task)
        finally:
            encoding.waiters -= 1
            if encoding.waiters == 0:
                encoding.task.cancel()
                if self._in_flight.get(item.identifier) is encoding:
                    del self._in_flight[item.identifier]

    async def _encode(self, item: EncodeItem) -> EncodedItem:
        progress = _Progress()
        geometry = self.processor.geometry_of_size(item.height, item.width)
        if self._ec_scheduler.has_cache_item(item.identifier):
            self._items[ItemOutcome.HIT] += 1
            return progress.result(item.identifier, geometry.metadata, ItemOutcome.HIT)
        pixels, progress.preprocess = await self._in(self._preprocess_pool, lambda: self._preprocess(item))
        entry, progress.encode = await self._in(self._encode_pool, lambda: self._run(pixels))
        _, progress.publish = await self._in(
            self._publish_pool, lambda: self._ec_worker.save_caches({item.identifier: entry}, item.identifier)
        )
        self._items[ItemOutcome.ENCODED] += 1
        self._encode_seconds += progress.encode
        return progress.result(item.identifier, geometry.metadata, ItemOutcome.ENCODED)

    def _preprocess(self, item: EncodeItem) -> Pixels:
        # Whoever inspected the file found this size within its limits; a larger one now would be a lie.
        return self.processor.preprocess(decode(item.data, MediaConfig(max_image_pixels=item.height * item.width)))

    def _run(self, pixels: Pixels) -> Tensor:
        try:
            with torch.inference_mode():
                entry = self._vision.encode(pixels)
                if entry.is_cuda:
                    torch.cuda.synchronize(entry.device)
                return entry
        except ChiasmError:
            raise
        except Exception as error:
            logger.exception("encoding failed")
            raise ChiasmError(f"the encoder failed on an image: {type(error).__name__}") from error

    @staticmethod
    async def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> tuple[T, float]:
        """Run ``work`` in a thread of the pool; returns its result and the seconds that it took there."""

        def timed() -> tuple[T, float]:
            started = time.monotonic()
            result = work()
            return result, time.monotonic() - started

        return await asyncio.get_running_loop().run_in_executor(pool, timed)
