"""The engine of an encoder instance: images in, published embeddings out."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from chiasm.connectors.faults import logged
from chiasm.cores import lower_priority, lower_session_priority
from chiasm.ec_transfer import check_identifier
from chiasm.engine.base import Engine
from chiasm.engine.calibration import encode_seconds, image_costs
from chiasm.engine.config import EngineConfig
from chiasm.engine.device import check_memory, use_threads
from chiasm.engine.request import EncodedItem, EncodeItem, EngineStats, ItemOutcome, StageStarts
from chiasm.errors import (
    ChiasmError,
    Code,
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
)
from chiasm.media.decoder import Decoder
from chiasm.models import load_vision
from chiasm.models.base import Pixels
from chiasm.wire import Costs

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Encoding:
    """An item that is being encoded, and the number of requests that wait for it."""

    task: asyncio.Task[EncodedItem]
    seconds: float
    """About what it takes."""
    waiters: int = 0


class EncoderEngine(Engine):
    """Role ``encoder``. Each stage has its own threads, so that one item is published while the next is encoded.

    Items are encoded one by one, in order of arrival; requests for the same item at the same time share one encoding.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.ec is None:
            raise ValueError("An encoder publishes through an EC connector, but EngineConfig.ec is missing.")
        super().__init__(config)
        self._started = False
        self._in_flight: dict[str, _Encoding] = {}
        self._items: Counter[ItemOutcome] = Counter()
        self._counting = threading.Lock()
        self._encode_seconds = 0.0

    def start(self) -> None:
        config = self.config
        assert config.ec is not None
        use_threads(config.threads)
        check_memory(config.model, self.device, "vision")
        self._vision = load_vision(config.model, dtype=self.dtype, device=self.device, progress=self.progress)
        self._ec_scheduler, self._ec_worker = self._connect(config.ec, self._vision.entry_width)
        lower_session_priority(config.nice)
        self._decoder = Decoder(config.media)
        self._preprocess_pool = ThreadPoolExecutor(
            1, "chiasm-preprocess", initializer=lower_priority, initargs=(config.nice,)
        )
        self._worker = self._core_share.worker(encodes=True)
        self._worker.follow(self._vision.module)
        self._encode_pool = ThreadPoolExecutor(1, "chiasm-encode", initializer=lower_priority, initargs=(config.nice,))
        self._publish_pool = ThreadPoolExecutor(2, "chiasm-publish")
        self._restore_pool = ThreadPoolExecutor(2, "chiasm-restore")
        measuring = self._encode_pool.submit(image_costs, self.processor, self.device, self._compute)
        self.costs = Costs(images=measuring.result())
        self._check_store(self.costs)
        self._started = True
        logger.info("The encoder is ready: %s on %s.", self.dtype, self.device)

    def _check_store(self, costs: Costs) -> None:
        """Raise ConfigurationError if the store can't hold the smallest image that was measured; warn of larger ones."""
        for image in costs.images:
            side = math.isqrt(image.pixels)
            misfit = self._misfit(side, side)
            if misfit is None:
                continue
            if image is costs.images[0]:
                raise ConfigurationError(f"{misfit} Raise --ec-max-bytes.")
            logger.warning("%s Such images are refused; raise --ec-max-bytes to take them.", misfit)
            return

    def _check_size(self, item: EncodeItem) -> None:
        """Raise InvalidRequestError for an image whose embedding can never be published."""
        if misfit := self._misfit(item.height, item.width):
            logger.warning("An image was refused. %s", misfit)
            raise InvalidRequestError(
                f"{misfit} Send a smaller image, or raise --ec-max-bytes.",
                param="messages",
                code=Code.EMBEDDING_TOO_LARGE,
            )

    def _misfit(self, height: int, width: int) -> str | None:
        """Return why the store can never hold the embedding of an image of this size; None if it can."""
        rows = len(self.processor.geometry_of_size(height, width).rows)
        size, limit = rows * self._vision.entry_width * self.dtype.itemsize, self._ec_worker.max_entry_bytes
        if size <= limit:
            return None
        return (
            f"The embedding of an image of {width} x {height} pixels takes {size} bytes, but the store can hold no entry of "
            f"more than {limit} bytes."
        )

    def stop(self) -> None:
        """Drop items that have not begun, and wait for those that have. Idempotent."""
        if self._started:
            self._started = False
            self._decoder.close()
            for pool in (self._preprocess_pool, self._encode_pool, self._publish_pool, self._restore_pool):
                pool.shutdown(cancel_futures=True)
            for connector in (self._ec_scheduler, self._ec_worker):
                with logged(connector, "shut down"):
                    connector.shutdown()

    @property
    def healthy(self) -> bool:
        return self._started and not self._decoder.is_stuck

    @property
    def trouble(self) -> str:
        if self._started and self._decoder.is_stuck:
            return "Decoding an image has not ended for a minute; restart the instance."
        return ""

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap, from any thread."""
        return EngineStats(
            num_running=min(1, len(self._in_flight)),
            num_waiting=max(0, len(self._in_flight) - 1),
            items=dict(self._items),
            images_encoded=self._items[ItemOutcome.ENCODED],
            encode_seconds=self._encode_seconds,
            ec=self._ec_worker.stats if self._started else None,
            ec_store=self._ec_worker.store_stats if self._started else None,
        )

    def outstanding_seconds(self) -> float:
        return sum(one.seconds for one in list(self._in_flight.values()) if math.isfinite(one.seconds))

    def free_bytes(self) -> int | None:
        return self._ec_worker.free_bytes() if self._started else None

    def unfetched_embeddings(self) -> int:
        return self._ec_worker.num_unfetched() if self._started else 0

    async def encode(self, request_id: str, items: Sequence[EncodeItem], deadline: float) -> list[EncodedItem]:
        """Publish the embeddings of ``items``; return the results in the same order when all are in the store.

        ``deadline`` is in ``time.monotonic()``. Raises MediaError for data that is not an image, InvalidRequestError for an
        image that the store can never hold, OverloadedError if too many images are queued, StorageError if an embedding could
        not be published, and DeadlineExceededError.
        Cancelling drops the items that have not begun, unless another request waits for them.
        """
        assert len(items) <= self.config.max_items
        for item in items:
            self._check_size(item)
        timeout = deadline - time.monotonic()
        tasks = [asyncio.ensure_future(self._share(item)) for item in items]
        try:
            async with asyncio.timeout(timeout):
                return list(await asyncio.gather(*tasks))
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"The images of {request_id} were not encoded within {timeout:.1f} s.", code=Code.DEADLINE_EXCEEDED
            ) from error
        finally:
            for task in tasks:
                task.cancel()

    async def _share(self, item: EncodeItem) -> EncodedItem:
        """Encode an item, or join the encoding of the same item that is under way."""
        encoding = self._in_flight.get(item.identifier)
        if encoding is None:
            if len(self._in_flight) >= self.config.max_queued_requests:
                raise OverloadedError(
                    f"{len(self._in_flight)} images are queued on this encoder; try again later.",
                    code=Code.TOO_MANY_REQUESTS,
                )
            rows = len(self.processor.geometry_of_size(item.height, item.width).rows)
            encoding = _Encoding(asyncio.create_task(self._encode(item)), encode_seconds(self.costs, rows))
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
                if not self._in_flight:  # also if those that waited behind the last one have failed or were cancelled
                    self._worker.rest()

    async def _encode(self, item: EncodeItem) -> EncodedItem:
        started = time.monotonic()
        metadata = self.processor.geometry_of_size(item.height, item.width).metadata

        def result(
            outcome: ItemOutcome,
            preprocess: float = 0.0,
            encode: float = 0.0,
            publish: float = 0.0,
            began: StageStarts | None = None,
        ) -> EncodedItem:
            queue_seconds = max(0.0, time.monotonic() - started - preprocess - encode - publish)
            return EncodedItem(item.identifier, metadata, outcome, preprocess, encode, publish, queue_seconds, began)

        if await self._is_published(item.identifier) or await self._is_restored(item):
            self._items[ItemOutcome.HIT] += 1
            return result(ItemOutcome.HIT)
        # The server found this size in the header and within its limits; decoding to a larger one must fail.
        pixels, preprocess_seconds = await self._decoder.decode(
            item.data, item.height * item.width, self.processor.preprocess, self._preprocess_pool
        )
        preprocess_at = time.monotonic() - preprocess_seconds
        entry, encode_seconds = await self._in(self._encode_pool, lambda: self._run(pixels))
        encode_at = time.monotonic() - encode_seconds
        _, publish_seconds = await self._in(
            self._publish_pool, lambda: self._publish(item.identifier, entry, encode_seconds)
        )
        began = StageStarts(preprocess_at, encode_at, time.monotonic() - publish_seconds)
        return result(ItemOutcome.ENCODED, preprocess_seconds, encode_seconds, publish_seconds, began)

    async def _is_published(self, identifier: str) -> bool:
        def look() -> bool:
            with logged(self._ec_scheduler, f"tell whether item {identifier} is published, so it is encoded"):
                return self._ec_scheduler.has_cache_item(identifier)
            return False

        check_identifier(identifier)
        # Not on the event loop: an entry that another encoder has published is read to check that it isn't damaged.
        found, _ = await self._in(self._publish_pool, look)
        return found

    async def _is_restored(self, item: EncodeItem) -> bool:
        """Read what was lost from the shared cache, if there is one, on threads of its own, since the cache may hang."""
        assert self.config.ec is not None
        if not self.config.ec.store:
            return False
        rows = len(self.processor.geometry_of_size(item.height, item.width).rows)

        def restore() -> bool:
            with logged(self._ec_worker, f"restore item {item.identifier}, so it is encoded"):
                return self._ec_worker.restore(item.identifier, rows)
            return False

        restored, _ = await self._in(self._restore_pool, restore)
        return restored

    def _publish(self, identifier: str, entry: Tensor, encode_seconds: float) -> None:
        """Publish an embedding and count it: also if nobody waits here any more, since a reader may have all that it needs."""
        self._ec_worker.save_caches({identifier: entry}, identifier)
        with self._counting:
            self._items[ItemOutcome.ENCODED] += 1
            self._encode_seconds += encode_seconds

    def _run(self, pixels: Pixels) -> Tensor:
        try:
            with self._worker.computing(encode_seconds(self.costs, len(pixels.geometry.rows))):
                return self._compute(pixels)
        finally:
            if len(self._in_flight) <= 1:
                self._worker.rest()

    def _compute(self, pixels: Pixels) -> Tensor:
        try:
            with torch.inference_mode():
                entry = self._vision.encode(pixels)
                if entry.is_cuda:
                    torch.cuda.synchronize(entry.device)
                return entry
        except ChiasmError:
            raise
        except Exception as error:
            logger.exception("Encoding an image failed.")
            raise ChiasmError(f"The encoder failed on an image: {type(error).__name__}.") from error

    @staticmethod
    async def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> tuple[T, float]:
        """Run ``work`` in a thread of the pool; return its result and the seconds that it took there."""

        def timed() -> tuple[T, float]:
            started = time.monotonic()
            result = work()
            return result, time.monotonic() - started

        return await asyncio.get_running_loop().run_in_executor(pool, timed)
