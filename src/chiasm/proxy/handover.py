"""From prefill to decode: prefill computes the prompt, decode takes over its KV and generates the answer.

Both are called in :meth:`Handover.run`. When either is lost, both are called again, elsewhere if possible: an answer
that the client has no part of starts from the beginning; otherwise it is resumed, if the engine can do that. Whatever ends a
request before decode has answered, prefill is told to free its KV.

A decode instance of vLLM computes a prompt again if it has lost the KV or is short of blocks, and needs the embeddings then. So
they are watched until its answer's end, and the images are kept until its answer has begun.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from chiasm.proxy.balancing import Assignment, Balancer
from chiasm.proxy.handover_engines import PARAMS, Handle, HandoverEngine, Reason
from chiasm.proxy.instance import Instance
from chiasm.proxy.job import Job
from chiasm.proxy.places import reads_embeddings
from chiasm.proxy.request import with_member
from chiasm.proxy.upstream import (
    Call,
    InstanceError,
    InstanceLostError,
    ResponseCutOffError,
    UpstreamError,
)
from chiasm.wire import Role


class _InterruptedError(Exception):
    """An instance is lost, but the prompt may be prefilled again; ``error`` is for the client if it may not."""

    def __init__(self, reason: Reason, error: InstanceError | UpstreamError) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error


class Handover:
    """One request on its way through prefill and decode."""

    def __init__(
        self,
        balancer: Balancer,
        engine: HandoverEngine,
        *,
        max_prefills: int,
        watch_embeddings: Callable[[], Awaitable[None]],
        give_back: Callable[[Instance, str, Job], None],
    ) -> None:
        """``watch_embeddings`` is called when embeddings may be needed that have been read before; ``give_back`` with a prefill
        instance and a lease of it that nobody will claim."""
        self._balancer = balancer
        self._engine = engine
        self._job = engine.job
        self._metrics = engine.metrics
        self._max_prefills = max_prefills
        self._watch_embeddings = watch_embeddings
        self._give_back = give_back
        self._prefills = 0
        self._prefill_at: Instance | None = None
        self._avoided: set[Instance] = set()
        """The prefill instance that was lost."""
        self._without_kv: set[Instance] = set()
        """Decode instances that couldn't fetch the KV. They may not reach the prefill instances, and then they are idle."""
        self._began = time.perf_counter()

    async def run(self) -> None:
        """Answer the request. Raises ChiasmError for the client."""
        while True:
            try:
                with self._giving_back():
                    handle = await self._prefill()
                    if handle is not None:
                        await self._decode(handle)
                return
            except _InterruptedError as interruption:
                await self._prepare_retry(interruption)
                await self._watch_embeddings()

    @contextmanager
    def _giving_back(self) -> Iterator[None]:
        """A block that ends with decode's answer, or else gives back what prefill may hold: whatever ends the request."""
        self._engine.lease = ""
        try:
            yield
        finally:
            if self._engine.lease and self._prefill_at is not None:
                self._give_back(self._prefill_at, self._engine.lease, self._job)

    async def _prepare_retry(self, interruption: _InterruptedError) -> None:
        """Raise ChiasmError if the prompt can't be prefilled again."""
        if interruption.reason is Reason.PREEMPTED and self._engine.has_progressed:
            self._prefills = 0  # nothing has failed; the deadline bounds it
        if not self._engine.can_retry or self._prefills >= self._max_prefills:
            raise interruption.error from None
        await self._balancer.until_healthy(has_images=False)
        prefill_failed = interruption.reason in {Reason.PREFILL_LOST, Reason.KV_UNAVAILABLE}
        self._avoided = {self._prefill_at} if prefill_failed and self._prefill_at else set()
        self._metrics.prefill_retries.inc()
        if self._job.exchange.has_begun:
            self._metrics.resumed_streams.labels(interruption.reason.value).inc()

    async def _prefill(self) -> Handle | None:
        """Return the handle for decode; None if prefill's answer was complete, and has been sent."""
        job, timing = self._job, self._job.timing
        self._prefills += 1
        job.fails_with_encoding = True
        with await self._balancer.assign(job, (Role.PREFILL,), avoid=self._avoided) as assignment:
            try:
                opening = self._balancer.open(assignment, job, self._engine.prefill_body)
                with await job.open_unless_encoding_fails(opening) as call:
                    timing.prefill_call = timing.prefill_call or time.perf_counter() - self._began
                    assignment.note_answer(call.timing, is_whole=not call.is_stream)
                    handle = await self._engine.relay_prefill(call)
            except (InstanceLostError, ResponseCutOffError, InstanceError) as error:
                if isinstance(error, InstanceError) and not job.is_error_of_encoders(error):
                    self._engine.lease = ""  # a prompt that failed leaves nothing
                raise await self._examine(assignment.instance, error, Reason.PREFILL_LOST) from None
            finally:
                self._prefill_at = assignment.instance  # a full one gives its place to another
        if handle is None:
            self._engine.lease = ""
        return handle

    async def _decode(self, handle: Handle) -> None:
        started = time.perf_counter()
        job = self._job
        job.trail.resume()

        with await self._balancer.assign(job, (Role.DECODE,), avoid=self._without_kv) as assignment:
            is_watched = reads_embeddings(assignment.instance)
            # If prefill has answered before the encoders, it needed no embedding, so an encoder that fails ends nothing.
            job.fails_with_encoding = job.is_encoded
            if is_watched:
                job.instance = assignment.instance
            else:
                job.note_embeddings_read(keep_bytes=len(job.request.body))

            async def note_answer() -> None:
                self._engine.lease = ""
                job.timing.handover = job.timing.handover or time.perf_counter() - started
                self._metrics.handovers.inc()
                if is_watched:
                    job.note_embeddings_read(keep_bytes=len(job.request.body))
                    await self._watch_embeddings()

            try:
                opening = self._open_decode(assignment, handle)
                with await (job.open_unless_encoding_fails(opening) if is_watched else opening) as call:
                    assignment.note_answer(call.timing)
                    await self._engine.relay_decode(call, handle, note_answer)
            except (InstanceLostError, ResponseCutOffError, InstanceError) as error:
                raise await self._examine(assignment.instance, error, Reason.DECODE_LOST) from None

    async def _open_decode(self, assignment: Assignment, handle: Handle) -> Call:
        """Call decode; a handle can serve another instance as long as none has fetched the KV."""

        def with_handle(body: bytes) -> bytes:
            return with_member(body, PARAMS, handle.for_decode())

        waits = self._engine.waits_for_decode
        for _ in range(self._engine.decodes_per_handle - 1):
            try:
                return await self._balancer.open(assignment, self._job, with_handle, waits_for_room=waits)
            except (InstanceLostError, ResponseCutOffError):
                await self._balancer.move(assignment)
        return await self._balancer.open(assignment, self._job, with_handle, waits_for_room=waits)

    async def _examine(
        self, instance: Instance, error: InstanceLostError | ResponseCutOffError | InstanceError, lost: Reason
    ) -> Exception:
        """Return the exception to raise for an error of this instance, which is probed if it is to blame."""
        reason = None if self._job.is_error_of_encoders(error) else self._engine.reason_to_retry(error, lost)
        if reason is None:
            return error
        if reason is Reason.KV_UNAVAILABLE:
            self._without_kv.add(instance)
        if not isinstance(error, InstanceLostError):  # for that, it has been probed already
            await self._balancer.lost(instance, error)
        return _InterruptedError(reason, error)
