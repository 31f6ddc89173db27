"""Has language instances say at once when they lack an embedding that was published, so that nobody has to ask at intervals.

One question waits at each instance, names what its requests have published, and ends when one of those embeddings is lost, or
after some seconds. It only brings news: whether the embedding is lost is found out by asking the instance what it awaits
(:mod:`chiasm.proxy.lost_embeddings`). An instance that can't be asked like this is asked for that at intervals.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from weakref import WeakKeyDictionary

import msgspec

from chiasm.proxy.instance import Instance
from chiasm.proxy.job import Job
from chiasm.proxy.upstream import Line, Upstream, UpstreamError
from chiasm.tasks import Tasks
from chiasm.wire import LOST_PATH, MAX_PUBLISHED, UNREADABLE, AwaitedEmbeddings, LossQuestion

_WAIT_SECONDS = 8.0
"""How long a question waits. Load balancers and the like end a connection on which nothing comes for half a minute or more."""
_PAUSE_SECONDS = 0.1
"""From one question to the next; what is published meanwhile is in the next."""
_MAX_RESPONSE_BYTES = 1 << 20
_lost = msgspec.json.Decoder(AwaitedEmbeddings)


class _Desk:
    """The questions to one instance."""

    def __init__(self) -> None:
        self.jobs: dict[Job, frozenset[str]] = {}
        """The requests that wait for news, and what they have published."""
        self.has_more = asyncio.Event()
        """Set when there is more to ask about."""
        self.is_asking = False
        """Whether questions are asked one after the other."""
        self.newest: asyncio.Task[None] | None = None
        self.asked: frozenset[str] = frozenset()
        """What the newest question names."""
        self.told_at = self.failed_at = -math.inf
        """When the instance has last told something, and when it last couldn't be asked; on the clock of ``time.monotonic``."""


class LossNews:
    """Keeps one question at each instance while requests wait for news. Made and used on one event loop."""

    def __init__(self, upstream: Upstream, *, timeout_seconds: float) -> None:
        """``timeout_seconds`` is for one question, without the time for which the instance lets it wait."""
        self._upstream = upstream
        self._timeout_seconds = timeout_seconds
        self._asker = secrets.token_hex(16)
        self._desks: WeakKeyDictionary[Instance, _Desk] = WeakKeyDictionary()
        self._tasks = Tasks()

    async def close(self) -> None:
        await self._tasks.close()

    def listen(self, job: Job) -> bool:
        """Set ``job.news_of_embeddings`` once as soon as its instance says that it lacks one that was published.

        Return whether a question about them waits there. If not, or if that question fails, only asking tells.
        """
        instance, names = job.instance, frozenset(job.published_at)
        self.forget(job, but=instance)
        if instance is None or instance.health is None or not instance.health.tells_lost:
            return False
        desk = self._desks.setdefault(instance, _Desk())
        if time.monotonic() - desk.failed_at < _WAIT_SECONDS:
            return False
        if job not in desk.jobs and sum(map(len, desk.jobs.values())) + len(names) > MAX_PUBLISHED:
            return False
        desk.jobs[job] = names
        if not desk.is_asking:
            desk.is_asking = True
            self._tasks.start(self._ask_again_and_again(instance, desk))
        is_asked = desk.newest is not None and not desk.newest.done() and names <= desk.asked
        if not is_asked:
            desk.has_more.set()
        return is_asked

    def forget(self, job: Job, but: Instance | None = None) -> None:
        """Bring no news to a request any more, but from this instance."""
        for instance, desk in self._desks.items():
            if instance is not but:
                desk.jobs.pop(job, None)

    def told_at(self, instance: Instance) -> float:
        """Return when an instance has last told something, on the clock of ``time.monotonic``."""
        desk = self._desks.get(instance)
        return -math.inf if desk is None else desk.told_at

    async def _ask_again_and_again(self, instance: Instance, desk: _Desk) -> None:
        """Keep a question at the instance while requests wait for news. The instance ends one when it gets the next."""
        before: asyncio.Task[None] | None = None
        try:
            while desk.jobs or before is not None:
                desk.has_more.clear()
                desk.asked = frozenset[str]().union(*desk.jobs.values())
                desk.newest = self._tasks.start(self._ask(instance, desk, desk.asked))
                if before is not None:
                    await asyncio.wait((before,))
                await asyncio.sleep(_PAUSE_SECONDS)
                more = asyncio.ensure_future(desk.has_more.wait())
                try:
                    await asyncio.wait((desk.newest, more), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    more.cancel()
                before = None if desk.newest.done() else desk.newest
        finally:
            desk.is_asking = False

    async def _ask(self, instance: Instance, desk: _Desk, asked: frozenset[str]) -> None:
        """Ask once, and tell the requests. If nothing could be asked, tell all, so that they ask for themselves."""
        began = time.monotonic()
        lost = await self._lost(instance, asked)
        now = time.monotonic()
        if lost:
            desk.told_at = now
        elif asked and desk.newest is asyncio.current_task() and now - began < _WAIT_SECONDS / 2:
            desk.failed_at, lost = now, asked  # or the instance lets nothing wait, because it ends
        for job in [job for job, names in desk.jobs.items() if names & lost]:
            del desk.jobs[job]
            job.news_of_embeddings.set()

    async def _lost(self, instance: Instance, names: frozenset[str]) -> frozenset[str]:
        """Return which of these the instance lacks, once it lacks some; nothing at the end of the time, or if that fails."""
        question = LossQuestion(asker=self._asker, published=sorted(names), seconds=_WAIT_SECONDS)
        body = msgspec.json.encode(question)
        try:
            async with asyncio.timeout(_WAIT_SECONDS + self._timeout_seconds):
                # What waits there isn't work of the instance, which would seem to be silent meanwhile.
                with await self._upstream.post(instance.url, LOST_PATH, body, {}, line=Line()) as call:
                    response = await call.read(_MAX_RESPONSE_BYTES)
            return frozenset(_lost.decode(response.body).identifiers) if response.status == 200 else frozenset()
        except (UpstreamError, TimeoutError, *UNREADABLE):
            return frozenset()
