"""What the fleet's shared cache has of a request's images: they need no encoder, and their pixels go nowhere.

What a healthy encoder has in its memory isn't asked for: the encoder looks it up, and the language instance reads it from
there, which is faster than reading it from a store.

The store is asked for all images of a request at once, on a thread of its own, and only for a moment: a request goes on without
an answer that doesn't come. Where nobody can encode, only the store can help, so the request waits longer for its answer.
Whether an embedding can be read shows when the language instance reads it; if it can't, it is lost
(:mod:`chiasm.proxy.lost_embeddings`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from chiasm.ec_transfer.stores import Guard, Store, StoreError
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.job import Job
from chiasm.proxy.media import Item
from chiasm.proxy.metrics import Metrics
from chiasm.wire import Role

_log = logging.getLogger(__name__)
_PATIENT_SECONDS = 2.0
"""How long a request waits for an answer if nobody can encode its images. A store that takes longer has failed."""


class _Question:
    def __init__(self, identifiers: Sequence[str], fingerprint: str) -> None:
        self.identifiers = identifiers
        self.fingerprint = fingerprint
        self.found: asyncio.Future[frozenset[str]] = asyncio.get_running_loop().create_future()


class StoredEmbeddings:
    """Asks the store. Made and used on one event loop; without a store, nothing is asked."""

    def __init__(
        self,
        store: Store | None,
        fleet: Fleet,
        metrics: Metrics,
        *,
        is_at_encoder: Callable[[str, float], bool],
        timeout_seconds: float,
    ) -> None:
        """``is_at_encoder`` tells whether an encoder has an embedding in its memory now."""
        self._store = store
        self._fleet = fleet
        self._metrics = metrics
        self._is_at_encoder = is_at_encoder
        self._timeout_seconds = timeout_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._guard = Guard(f"Asking {self._store.address}" if self._store else "")
        self._questions: list[_Question] = []
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        """When the question that the store is being asked began."""
        metrics.store_used.set_function(lambda: float(self.is_used))
        if self._store is not None:
            self._thread.submit(self._connect, self._store)

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        if self._store is not None:
            self._store.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def is_set(self) -> bool:
        """Whether there is a store."""
        return self._store is not None

    @property
    def is_used(self) -> bool:
        """Whether there is a store, and the language instances read from one and can size images without an encoder."""
        if self._store is None:
            return False
        readers = self._fleet.healthy(Role.PD, Role.PREFILL)
        return bool(readers) and all(
            one.health is not None and one.health.reads_stored and one.health.takes_image_size for one in readers
        )

    async def find(self, items: Sequence[Item], job: Job) -> bool:
        """Note which embeddings of a request are stored, in ``job``; return whether all are."""
        names = list(dict.fromkeys(item.identifier for item in items))
        now = time.monotonic()
        unknown = [name for name in names if name not in job.published_at and not self._is_at_encoder(name, now)]
        found = await self._find_of(unknown, job)
        self._metrics.items.labels("stored").inc(len(found))
        return all(name in job.published_at for name in names)

    async def find_again(self, lost: frozenset[str], job: Job) -> frozenset[str]:
        """Note which embeddings are stored that a request's language instance has lost, in ``job``; return them."""
        return await self._find_of(sorted(lost), job)

    async def _find_of(self, names: Sequence[str], job: Job) -> frozenset[str]:
        if not names or not self.is_used:
            return frozenset()
        can_encode = self._fleet.lacking(has_images=True) is None
        found = await self._ask(names, self._timeout_seconds if can_encode else _PATIENT_SECONDS)
        now = time.monotonic()
        job.places.update(dict.fromkeys(found))
        job.published_at = {**job.published_at, **dict.fromkeys(found, now)}
        return found

    async def _ask(self, names: Sequence[str], seconds: float) -> frozenset[str]:
        """Return which of these embeddings are stored, as far as the store says so in time."""
        is_late = self._asking is not None and time.monotonic() - self._asked_at > seconds
        if is_late or not self._guard.is_open:
            self._count("late" if is_late else "paused")
            return frozenset()
        question = _Question(names, self._fleet.fingerprint)
        self._questions.append(question)
        if self._asking is None:
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(self._ask_all())
        try:
            async with asyncio.timeout(seconds):
                return await question.found
        except TimeoutError:
            self._count("late")
            return frozenset()
        finally:
            if question in self._questions:
                self._questions.remove(question)

    async def _ask_all(self) -> None:
        """Ask for all that came up meanwhile, one round trip after the other."""
        try:
            while questions := self._questions:
                self._questions = []
                self._asked_at = time.monotonic()
                found = await asyncio.get_running_loop().run_in_executor(self._thread, self._find, questions)
                for question in questions:
                    if not question.found.done():
                        question.found.set_result(found.intersection(question.identifiers))
        finally:
            self._asking = None

    def _find(self, questions: Sequence[_Question]) -> frozenset[str]:
        """Return what is stored. Runs on the thread."""
        assert self._store is not None
        names = list(dict.fromkeys(name for question in questions for name in question.identifiers))
        try:
            with self._guard.use():
                headers = self._store.exists_many(names, questions[0].fingerprint)
        except StoreError:
            self._count("failed")  # the guard has logged it
            return frozenset()
        except Exception:
            _log.exception("The store of embeddings could not be asked.")
            self._count("failed")
            return frozenset()
        self._count("answered")
        return frozenset(name for name, header in zip(names, headers, strict=True) if header is not None)

    def _connect(self, store: Store) -> None:
        """Open a connection ahead of the first question. Runs on the thread; a fault shows at the first question as well."""
        try:
            with self._guard.use():
                store.health()
        except StoreError:
            return

    def _count(self, outcome: str) -> None:
        self._metrics.store_questions.labels(outcome).inc()
