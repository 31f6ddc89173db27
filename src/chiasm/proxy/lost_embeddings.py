"""Embeddings that are lost after an encoder has published them and before the instance that needs them has read them.

They may be evicted, because more is published than the store or the encoder's memory holds, or removed, because the file is
damaged; the encoder that has them may be gone, or the instance couldn't be told which it is. The instance goes on waiting for
them, keeps the request's place, and tells the proxy when it is asked: as soon as it has news, which
:mod:`chiasm.proxy.loss_news` brings, or at intervals. The proxy says that they are in the fleet's shared cache, if they are
there, and otherwise has them encoded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import msgspec

from chiasm.errors import Code, EmbeddingUnavailableError
from chiasm.proxy.encoders import Encoders
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.job import Job
from chiasm.proxy.loss_news import LossNews
from chiasm.proxy.media import Item
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.places import Places
from chiasm.proxy.stored_embeddings import StoredEmbeddings
from chiasm.proxy.upstream import InstanceLostError, Upstream, UpstreamError
from chiasm.tasks import end_tasks
from chiasm.wire import AWAITED_PATH, UNREADABLE, AwaitedEmbeddings, ECPlace

_log = logging.getLogger(__name__)
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 0.5
_GROWTH = 2
"""By how much a wait is longer than the one before."""
_LONGEST_WAIT_FOR_NEWS_SECONDS = 5.0
"""The same while the instance says by itself when something is lost."""
_SHARED_SECONDS = 0.1
"""An answer that is younger is used again by other requests. Those that wait for what was freed, as streams do to their end,
use it for longer."""
_SURELY_LOST_SECONDS = 5.0
"""An embedding that is lost for so long, and whose image was freed, ends its request. Within this time an encoder answers an
instance that asks it for an embedding, or the instance gives up."""
_MOST_IN_VAIN = 16
"""How often in a row images are encoded again although the instance read none of them."""
_CUT_OFF_IN_VAIN = 4
"""The same before another language instance gets the request, if there is one: this one may reach no encoder."""
_CUT_OFF_IN_ALL = 8
"""How often one embedding is lost before that, also if it was on its way in between: its bytes may never arrive."""
_MAX_RESPONSE_BYTES = 8 << 20
_awaited = msgspec.json.Decoder(AwaitedEmbeddings)


class _Answer(NamedTuple):
    asked_at: float
    """On the clock of ``time.monotonic``."""
    identifiers: frozenset[str]


class _Question(NamedTuple):
    asked_at: float
    task: asyncio.Task[_Answer]


class LostEmbeddings:
    """Finds them and has them encoded again. Made and used on one event loop."""

    def __init__(
        self,
        encoders: Encoders,
        stored: StoredEmbeddings,
        fleet: Fleet,
        places: Places,
        upstream: Upstream,
        metrics: Metrics,
        *,
        timeout_seconds: float,
    ) -> None:
        """``timeout_seconds`` is for one question."""
        self._encoders = encoders
        self._stored = stored
        self._fleet = fleet
        self._places = places
        self._upstream = upstream
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds
        self._news = LossNews(upstream, timeout_seconds=timeout_seconds)
        self._watching: dict[str, set[Job]] = {}
        """Jobs by the identifiers of their embeddings."""
        self._questions: WeakKeyDictionary[Instance, _Question] = WeakKeyDictionary()

    async def close(self) -> None:
        await self._news.close()
        await end_tasks(*(question.task for question in self._questions.values()))

    async def recover(self, items: Sequence[Item], job: Job) -> None:
        """Have the request's images encoded again whenever their embeddings are lost, until its answer has begun.

        All have been published before. ``items`` is empty if the images were freed. Raises EmbeddingUnavailableError for an
        embedding that stays lost and whose image was freed, or if the same ones are lost again and again, and what
        ``Encoders.encode`` raises.
        """
        names = set(job.published_at)
        for name in names:
            self._watching.setdefault(name, set()).add(job)
        try:
            await (self._recover(items, job) if items else self._wait_for_freed(job))
        finally:
            self._news.forget(job)
            for name in names:
                self._watching[name].discard(job)
                if not self._watching[name]:
                    del self._watching[name]

    async def _recover(self, items: Sequence[Item], job: Job) -> None:
        before: frozenset[str] = frozenset()
        in_vain = 0
        lost_at: dict[str, list[ECPlace]] = {}
        """Where the encoders are at which embeddings were lost, each time."""
        given_up: set[Instance] = set()
        seconds = _FIRST_WAIT_SECONDS
        while not await _is_read_within(job, seconds):
            lost = await self._lost(job)
            if not lost:
                before, in_vain = lost, 0
                is_told = self._news.listen(job)
                seconds = min(_GROWTH * seconds, _LONGEST_WAIT_FOR_NEWS_SECONDS if is_told else _LONGEST_WAIT_SECONDS)
                continue
            self._news.forget(job)  # there is nothing to hear until they have been published again
            self._metrics.embeddings_lost.inc(len(lost))
            # Fewer than before: the instance gets on, however small the store is.
            in_vain = in_vain + 1 if before <= lost else 1
            _log.info("%s: %d embedding(s) were lost before they were read.", job.exchange.request_id, len(lost))
            if in_vain > _MOST_IN_VAIN:
                raise _lost_for_good(in_vain)
            most_lost = max(map(len, lost_at.values()), default=0)
            is_cut_off = in_vain >= _CUT_OFF_IN_VAIN or most_lost >= _CUT_OFF_IN_ALL
            if is_cut_off and (instance := self._give_up(job, given_up)):
                given_up.add(instance)
                before, in_vain, seconds = frozenset(), 0, _FIRST_WAIT_SECONDS
                lost_at.clear()
                continue
            missing = lost
            # The instance may have had them from the shared cache, and couldn't read them.
            if in_vain == 1 or self._fleet.lacking(has_images=True):
                missing -= await self.find_stored(lost, job)
            for name in lost:
                if place := job.places.get(name):
                    lost_at.setdefault(name, []).append(place)
            if missing:
                again = [item for item in items if item.identifier in missing]
                await self._encoders.encode_again(again, job, _in_vain_at(lost_at))
            if not job.embeddings_are_read:
                job.news_of_embeddings.clear()  # it is older than what has just been published
            before = lost
            seconds = min(in_vain * _FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS)

    def _give_up(self, job: Job, given_up: Collection[Instance]) -> Instance | None:
        """Have another language instance get the request, if one is left; return the one that has it."""
        instance = job.instance
        if instance is None or not any(
            one is not instance and one not in given_up for one in self._fleet.healthy(instance.role)
        ):
            return None
        error = InstanceLostError("An instance got none of the embeddings that it needs from the encoders; try again.")
        if instance in given_up or not job.give_up_instance(error):
            return None
        _log.warning("%s %s gets no embeddings; another one gets its request", instance.role, instance.url)
        return instance

    async def _wait_for_freed(self, job: Job) -> None:
        """Watch over embeddings whose images were freed: they may still be where they were, or in the shared cache."""
        lost_since = math.inf
        while not await _is_read_within(job, _LONGEST_WAIT_SECONDS):
            lost = await self._lost(job, shared_seconds=_LONGEST_WAIT_SECONDS)
            now = time.monotonic()
            lost_since = min(lost_since, now) if lost else math.inf
            if now - lost_since >= _SURELY_LOST_SECONDS:
                raise EmbeddingUnavailableError(
                    "The embedding of an image was lost when the instance needed it again, and the image was freed when the "
                    "answer began. Raise --ec-max-bytes, or --num-gpu-blocks-override and the like of decode instances that "
                    "are short of KV blocks.",
                    code=Code.EMBEDDING_LOST,
                )
            await self.find_stored(lost, job)

    async def find_stored(self, lost: frozenset[str], job: Job) -> frozenset[str]:
        """Tell the instance which of these are in the fleet's shared cache, and return them."""
        found = await self._stored.find_again(lost, job)
        self._places.tell(job.instance, dict.fromkeys(found))
        return found

    async def _lost(self, job: Job, shared_seconds: float = _SHARED_SECONDS) -> frozenset[str]:
        """Return which embeddings of the request were published and are awaited all the same."""
        if job.instance is None or job.instance.is_silent:
            return frozenset()
        after = max((self._news.told_at(job.instance), *job.published_at.values()))
        asked_at, awaited = await self._ask(job.instance, after=after, shared_seconds=shared_seconds)
        return frozenset(name for name, at in job.published_at.items() if name in awaited and at < asked_at)

    async def _ask(self, instance: Instance, *, after: float, shared_seconds: float) -> _Answer:
        """Return what an instance awaits, asked ``after`` this instant; nothing if it doesn't say.

        Callers share questions, and an answer that is younger than ``shared_seconds``.
        """
        now = time.monotonic()
        question = self._questions.get(instance)
        is_old = question is None or (question.task.done() and now - question.asked_at > shared_seconds)
        if question is None or is_old or question.asked_at <= after:
            question = _Question(now, asyncio.create_task(self._awaited(instance, now)))
            self._questions[instance] = question
        return await asyncio.shield(question.task)

    async def _awaited(self, instance: Instance, now: float) -> _Answer:
        """Return what an instance awaits, without what it doesn't know the place of only because it is just being told."""
        untold = self._places.untold(instance)
        try:
            response = await self._upstream.get(
                instance.url + AWAITED_PATH,
                timeout_seconds=self._timeout_seconds,
                max_bytes=_MAX_RESPONSE_BYTES,
                headers=await self._upstream.signed(instance.url, "GET", AWAITED_PATH),
                line=self._upstream.line(instance.url),
            )
            identifiers = _awaited.decode(response.body).identifiers if response.status == 200 else []
        except (UpstreamError, *UNREADABLE):
            identifiers = []
        awaited = frozenset(identifiers) - untold
        for name in awaited:
            for job in self._watching.get(name, ()):
                job.news_of_embeddings.set()
        return _Answer(now, awaited)


def _in_vain_at(lost_at: Mapping[str, Sequence[ECPlace]]) -> dict[str, list[ECPlace]]:
    """Return where embeddings were lost more than once: they weren't just evicted, the instance may not reach the encoder."""
    return {name: [one for one in places if places.count(one) > 1] for name, places in lost_at.items()}


async def _is_read_within(job: Job, seconds: float) -> bool:
    """Return whether the instance has all embeddings; wait so long for news of them."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await job.news_of_embeddings.wait()
    job.news_of_embeddings.clear()
    return job.embeddings_are_read


def _lost_for_good(times: int) -> EmbeddingUnavailableError:
    return EmbeddingUnavailableError(
        f"The embedding of an image was lost {times} times before the instance that needs it had read it. The instance's log "
        "says why, if it has refused it or can't reach the encoder (--ec-host, --ec-port). Otherwise, raise --ec-max-bytes of "
        "the encoders, so that they hold the embeddings of all requests that wait.",
        code=Code.EMBEDDING_LOST,
    )
