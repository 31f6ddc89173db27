"""The images of a request: read and checked, looked for in the shared cache, and sent to encoders."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from aiohttp.abc import AbstractResolver

from chiasm.ec_transfer.stores import Store
from chiasm.errors import Code, InvalidRequestError, MediaError
from chiasm.media import Fetcher
from chiasm.proxy.balancing import Balancer
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.encode_queue import EncodeQueue
from chiasm.proxy.encoders import Encoders
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.job import Job
from chiasm.proxy.lost_embeddings import LostEmbeddings
from chiasm.proxy.media import Item, read_items
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.places import Places
from chiasm.proxy.stored_embeddings import StoredEmbeddings
from chiasm.proxy.upstream import Upstream
from chiasm.tasks import end_tasks
from chiasm.wire import COUNT_TOKENS_PATH

_MEDIA_THREADS = 2
_ASK_AGAIN_SECONDS = 0.5
"""How often the shared cache is asked for images while nobody can encode them."""


class RequestImages:
    """One for all requests. Made and used on one event loop."""

    def __init__(
        self,
        config: ProxyConfig,
        fleet: Fleet,
        upstream: Upstream,
        metrics: Metrics,
        queue: EncodeQueue,
        places: Places,
        balancer: Balancer,
        encoders: Encoders,
        *,
        store: Store | None,
        resolver: AbstractResolver | None,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._balancer = balancer
        self._encoders = encoders
        self._fetcher = Fetcher(config.media, resolver=resolver)
        self._executor = ThreadPoolExecutor(_MEDIA_THREADS, thread_name_prefix="media")
        self._stored_embeddings = StoredEmbeddings(
            store,
            fleet,
            metrics,
            is_at_encoder=queue.is_at_encoder,
            timeout_seconds=config.store_timeout_seconds,
        )
        self._lost_embeddings = LostEmbeddings(
            encoders,
            self._stored_embeddings,
            fleet,
            places,
            upstream,
            metrics,
            timeout_seconds=config.probe_timeout_seconds,
        )

    async def close(self) -> None:
        await self._lost_embeddings.close()
        await self._stored_embeddings.close()
        await self._fetcher.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def may_be_stored(self) -> bool:
        """Whether there is a shared cache, which may have images that no encoder is there for."""
        return self._stored_embeddings.is_set

    # ---- before an instance is chosen ----------------------------------------------------------------------------------

    async def read(self, job: Job) -> list[Item]:
        """Return the request's images. Raises InvalidRequestError, OverloadedError, MediaError."""
        count = len(job.request.media)
        limit = min(self._config.max_items, self._fleet.max_items or self._config.max_items)
        if count > limit:
            raise InvalidRequestError(
                f"The request has {count} images; the limit is {limit}.", param="messages", code=Code.TOO_MANY_IMAGES
            )
        try:
            items, fetch_seconds, job.trail.fetches = await read_items(
                job.request.media,
                fetcher=self._fetcher,
                executor=self._executor,
                fingerprint=self._fleet.fingerprint,
                salt=job.request.salt,
                holder=job.exchange,
            )
        except MediaError:
            self._metrics.items.labels("refused").inc()
            raise
        job.trail.passed("images")
        if fetch_seconds is not None:
            job.timing.fetch = fetch_seconds
            self._metrics.fetch.observe(fetch_seconds)
        return items

    async def need_encoder(self, items: Sequence[Item], job: Job) -> bool:
        """Return whether some images aren't in the shared cache, when there is an instance that can encode them.

        While none is there, the cache is asked again. Raises OverloadedError if none is expected or it takes too long.
        """
        if await self._stored_embeddings.find(items, job):
            return False
        if self._fleet.lacking(has_images=True) is None:
            return True
        encoder = asyncio.ensure_future(self._balancer.until_healthy(has_images=True))
        if await _is_so_before(encoder, lambda: self._stored_embeddings.find(items, job)):
            return False
        encoder.result()
        return True

    # ---- encoding ------------------------------------------------------------------------------------------------------

    async def send_to_encoders(
        self, job: Job, items: list[Item], on_embedded: Callable[[], None] = lambda: None
    ) -> None:
        """Have the images encoded, and put placeholders for their embeddings into the body."""
        if not items:
            return
        body = await job.request.with_parts_replaced([item.image_embeds_part() for item in items])
        job.request.forget()
        job.request.body = body
        job.identifiers = job.trail.identifiers = [item.identifier for item in items]
        if job.path == COUNT_TOKENS_PATH:  # which needs their sizes alone
            items.clear()
            return
        job.encoding = asyncio.ensure_future(self._encode(tuple(items), job, on_embedded))
        items.clear()  # kept by the task alone

    async def watch_again(self, job: Job) -> None:
        """Watch over the embeddings of a prompt that is or may be computed again, if its images were freed before."""
        if job.encoding is None or not job.embeddings_are_read:
            return
        job.embeddings_are_read = False
        if job.is_encoded or job.encoding.done():  # otherwise encoders still have the images
            await job.end_encoding()
            job.encoding = asyncio.ensure_future(self._lost_embeddings.recover((), job))

    async def _encode(self, items: tuple[Item, ...], job: Job, on_embedded: Callable[[], None]) -> None:
        """Have images encoded, and keep them until the answer has begun, in case embeddings are lost before."""
        job.metadata.set_result(await self._metadata_of(items, job))
        on_embedded()
        await self._lost_embeddings.recover(items, job)

    async def _metadata_of(self, items: Sequence[Item], job: Job) -> dict[str, bytes]:
        """Have those images encoded that aren't in the shared cache; return the encoders' metadata (JSON) by identifier.

        The cache is asked again while no encoder is left: one that has ended may have written what it had made.
        """
        while missing := [item for item in items if item.identifier not in job.published_at]:
            if not self._stored_embeddings.is_set:
                return await self._encoders.encode(missing, job)
            encoding = asyncio.ensure_future(self._encoders.encode(missing, job))
            names = frozenset(item.identifier for item in missing)
            if not await _is_so_before(encoding, partial(self._can_only_be_stored, names, job)):
                return encoding.result()
        return {}

    async def _can_only_be_stored(self, names: frozenset[str], job: Job) -> bool:
        """Return whether nobody can encode these images, and the instance was told that some are in the shared cache."""
        return self._fleet.lacking(has_images=True) is not None and bool(
            await self._lost_embeddings.find_stored(names, job)
        )


async def _is_so_before(task: asyncio.Future[Any], condition: Callable[[], Awaitable[bool]]) -> bool:
    """Ask for ``condition`` again and again while the task runs; return whether it was true. The task has ended then."""
    try:
        while not (await asyncio.wait((task,), timeout=_ASK_AGAIN_SECONDS))[0]:
            if await condition():
                return True
        return False
    finally:
        await end_tasks(task)
