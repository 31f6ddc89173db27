"""What happens to a request: which kinds of instances get it, in which form, and what comes back."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from http import HTTPStatus

from aiohttp.abc import AbstractResolver

from chiasm.ec_transfer.stores import Store
from chiasm.errors import (
    Code,
    EmbeddingUnavailableError,
    InvalidRequestError,
    NotServedError,
    OverloadedError,
)
from chiasm.proxy.agreement import WHOLE_ROLES
from chiasm.proxy.balancing import Assignment, Balancer
from chiasm.proxy.config import ProxyConfig
from chiasm.proxy.encoder_demand import EncoderDemand
from chiasm.proxy.encoders import Encoders
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.handover import Handover
from chiasm.proxy.handover_engines import ChiasmEngine, VllmEngine, vllm_can_hand_over
from chiasm.proxy.instance import Instance
from chiasm.proxy.job import Job, Original
from chiasm.proxy.key_check import KeyCheck
from chiasm.proxy.kv_releases import KVReleases
from chiasm.proxy.media import Item
from chiasm.proxy.metrics import DemandCollector, Metrics
from chiasm.proxy.other_paths import check_salted, check_unnamed, media_refused
from chiasm.proxy.placement import Placement
from chiasm.proxy.places import Places
from chiasm.proxy.probe import Prober
from chiasm.proxy.prompts import ItemWork, Prefix, Work
from chiasm.proxy.relay import begin, begin_answer
from chiasm.proxy.request_images import RequestImages
from chiasm.proxy.upstream import Call, InstanceError, InstanceLostError, ResponseCutOffError, Upstream
from chiasm.proxy.waiting import Comeback
from chiasm.wire import CHAT_PATH, COMPLETIONS_PATH, COUNT_TOKENS_PATH, RESPONSES_PATH, Role

SendBack = Callable[[Job, Call, Assignment], Awaitable[None]]
_MAX_ATTEMPTS = 3
"""Instances that a request is sent to if they are lost: it may be the cause."""


class Router:
    """Answers parsed requests. Made and used on one event loop."""

    def __init__(
        self,
        config: ProxyConfig,
        fleet: Fleet,
        upstream: Upstream,
        prober: Prober,
        metrics: Metrics,
        *,
        store: Store | None,
        resolver: AbstractResolver | None,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._placement = Placement(fleet, config.hedged_share)
        fleet.on_load = lambda instance: self._placement.note_load(instance, time.monotonic())
        demand = EncoderDemand(config.encode_wait_seconds, config.encoder_start_seconds, config.scale_down_seconds)
        metrics.registry.register(DemandCollector(self._placement.images, demand))
        comeback = Comeback(
            fleet,
            metrics,
            seconds=config.wait_for_instance_seconds,
            max_requests=config.max_waiting_requests,
            instances_join=not config.named,
        )
        self._places = Places(upstream, metrics, timeout_seconds=config.probe_timeout_seconds)
        self._balancer = Balancer(
            fleet,
            self._placement,
            upstream,
            prober,
            metrics,
            self._places,
            comeback,
            max_refusal_bytes=config.max_answer_bytes,
        )
        self._key_check = KeyCheck(fleet, upstream)
        self.encoders = Encoders(
            fleet,
            upstream,
            prober,
            metrics,
            self._placement.images,
            demand,
            self._places,
            comeback,
            timeout_seconds=config.encode_timeout_seconds,
            max_attempts=config.max_encode_attempts,
            comeback_seconds=config.wait_for_instance_seconds,
        )
        self._images = RequestImages(
            config,
            fleet,
            upstream,
            metrics,
            self._placement.images,
            self._places,
            self._balancer,
            self.encoders,
            store=store,
            resolver=resolver,
        )
        self._kv_releases = KVReleases(upstream, metrics, timeout_seconds=config.probe_timeout_seconds)

    async def close(self) -> None:
        await self._kv_releases.close()
        await self._images.close()
        await self.encoders.close()
        await self._places.close()

    async def answer(self, job: Job, started: float) -> None:
        """Answer a request, whose body was there at ``started`` (``time.perf_counter``). Raises ChiasmError for the client."""
        has_media = bool(job.request.media)
        await self._balancer.until_healthy(has_images=has_media and not self._images.may_be_stored)
        await self._check(job)
        self._check_text(job)
        await self._answer(job, started)

    async def _check(self, job: Job) -> None:
        """Raise a ChiasmError unless the request has a valid key and asks for a model that is served."""
        await self._key_check.check(job.exchange.headers)
        self._balancer.check_model(job.request.model)
        job.note_model(job.request.model or next(iter(self._fleet.models), ""))

    async def _answer(
        self, job: Job, started: float, send_back: SendBack | None = None, unfit: Collection[Instance] = ()
    ) -> None:
        """Have images encoded, if there are any, and the request answered, but by none of ``unfit``."""
        has_media = bool(job.request.media)
        job.trail.passed("ready")
        items = await self._images.read(job) if has_media else []
        needs_encoder = has_media and job.path != COUNT_TOKENS_PATH
        if has_media:
            if needs_encoder and self._images.may_be_stored:
                needs_encoder = await self._images.need_encoder(items, job)
                job.trail.passed("store")
            job.work = _work(job, items)
        try:
            if self._is_handed_over(job):
                job.due = self._placement.due(job.work, time.monotonic())
                await self._images.send_to_encoders(job, items)
                self._note_overhead(job, started, has_media)
                await self._hand_over(job)
            elif role := await self._send_to_one(job, items, self._roles(needs_encoder), started, send_back, unfit):
                self._metrics.language_retries.inc()
                with await self._balancer.assign(job, (role,), unfit=unfit) as assignment:
                    await job.end_encoding()
                    await (job.return_to_original() if role is Role.AGGREGATED else self._encode_apart(job, assignment))
                    await self._call(job, assignment, send_back)
        finally:
            job.original = None
            await job.end_encoding()

    async def pass_on(self, job: Job, started: float) -> None:
        """Pass on a request that isn't understood, and its answer, both as they are. Raises ChiasmError for the client."""
        check_salted(job.path, job.request)
        roles = self._roles(needs_encoder=False)
        await self._balancer.until_healthy(has_images=False)
        await self._check(job)
        if job.request.media and self._takes_names(job, roles):
            if job.path != RESPONSES_PATH:  # what isn't in the body as a URL has been written as one, beside it
                job.exchange.hold(sum(len(part.url) for part in job.request.media))
            counts = job.path == COUNT_TOKENS_PATH
            await self._balancer.until_healthy(has_images=not counts and not self._images.may_be_stored)
            others = [one for one in self._fleet.healthy(*roles) if not one.takes_names_at(job.path)]
            await self._answer(job, started, self._send_back_as_it_is, others)
            return
        job.trail.passed("ready")
        if job.request.media:
            check_unnamed(job.path, job.request)
            roles = (Role.AGGREGATED,)
            if not any(one.serves_other_paths for one in self._fleet.healthy(*roles)):
                raise media_refused(job.path)
            await self._images.read(job)  # a bad one is refused here, as vLLM decodes without limits
        healthy = self._fleet.healthy(*roles)
        understands_none = [one for one in healthy if not one.serves_other_paths]
        if healthy and len(understands_none) == len(healthy):
            raise NotServedError(job.path)
        job.request.body = await job.request.whole_body()
        with await self._balancer.assign(job, roles, unfit=understands_none) as assignment:
            self._note_overhead(job, started, has_media=bool(job.request.media))
            await self._call(job, assignment, self._send_back_as_it_is)

    def _takes_names(self, job: Job, roles: tuple[Role, ...]) -> bool:
        """Whether the request's images can be named as those of a chat: at each instance that may get it."""
        instances = [one for one in self._fleet.healthy(*roles) if one.serves_other_paths]
        return bool(job.request.path and instances) and all(one.takes_names_at(job.path) for one in instances)

    def _check_text(self, job: Job) -> None:
        """Raise InvalidRequestError for a text that no instance can take, before anything else is done for it."""
        limit, characters = self._fleet.text_limit, job.request.text_characters
        if limit is not None and limit.tokens_of(characters) >= limit.tokens:
            raise InvalidRequestError(
                f"This model's maximum context length is {limit.tokens} tokens, answer included, and the prompt has at "
                f"least {limit.tokens_of(characters)} tokens. Shorten the prompt.",
                param="messages" if job.path == CHAT_PATH else "prompt",
                code=Code.CONTEXT_LENGTH_EXCEEDED,
            )

    # ---- text ----------------------------------------------------------------------------------------------------------

    @property
    def _encodes_apart(self) -> bool:
        """Whether encoders and PDs can answer a request with images."""
        return bool(self._fleet.healthy(Role.ENCODER) and self._fleet.healthy(Role.PD))

    def _other_role(self, job: Job, instance: Instance) -> Role | None:
        """Return the role that can answer a request with images although this instance's can't any more, by another body."""
        if job.original is None or job.exchange.has_begun:
            return None
        encodes_itself = bool(self._fleet.healthy(Role.AGGREGATED))
        if encodes_itself == self._encodes_apart:
            return None
        role = Role.AGGREGATED if encodes_itself else Role.PD
        return None if instance.role is role else role

    async def _encode_apart(self, job: Job, assignment: Assignment) -> None:
        """Make a request for an instance that encodes itself one for a PD, and have its images encoded."""
        original, job.original = job.original, None
        assert original is not None
        job.request = original.request
        await self._images.send_to_encoders(job, list(original.items), assignment.embedded)

    async def _hand_over(self, job: Job) -> None:
        """Send the request to prefill, and then to decode."""
        kind = VllmEngine if self._fleet.hands_over_by_vllm else ChiasmEngine
        engine = kind(job, self._metrics, self._config.max_answer_bytes)
        handover = Handover(
            self._balancer,
            engine,
            max_prefills=self._config.max_prefill_attempts,
            watch_embeddings=lambda: self._images.watch_again(job),
            give_back=self._kv_releases.give_back,
        )
        await handover.run()

    async def _send_to_one(
        self,
        job: Job,
        items: list[Item],
        roles: tuple[Role, ...],
        started: float,
        send_back: SendBack | None,
        unfit: Collection[Instance],
    ) -> Role | None:
        """Have one instance answer the request; return None then, or the role that can, if it is another one."""
        has_media = bool(items)
        with await self._balancer.assign(job, roles, unfit=unfit) as assignment:
            encodes_itself = assignment.instance.role is Role.AGGREGATED
            if items:
                assignment.keep_role()
                if encodes_itself or self._fleet.healthy(Role.AGGREGATED):
                    job.original = _original(job, items)
            if encodes_itself:
                await job.return_to_original(keep=self._encodes_apart)
                items.clear()
            else:
                await self._images.send_to_encoders(job, items, assignment.embedded)
            self._note_overhead(job, started, has_media)
            try:
                await self._call(job, assignment, send_back)
            except (
                OverloadedError,
                EmbeddingUnavailableError,
                InstanceLostError,
                ResponseCutOffError,
                InstanceError,
            ) as error:
                if isinstance(error, InstanceError) and not error.is_leaving:
                    raise
                role = self._other_role(job, assignment.instance)
                if role is None:
                    raise
                return role
        return None

    async def _call(self, job: Job, assignment: Assignment, send_back: SendBack | None = None) -> None:
        """Send the request to the assigned instance and its answer to the client.

        If the instance is lost or leaves before the client has any of the answer, another one gets the request, or the same
        one if it is the last and healthy.
        """
        for attempts_left in reversed(range(_MAX_ATTEMPTS)):
            try:
                with await job.open_unless_encoding_fails(self._balancer.open(assignment, job)) as call:
                    await (send_back or self._send_back)(job, call, assignment)
                return
            except (InstanceLostError, ResponseCutOffError, InstanceError) as error:
                lost = error
            if job.exchange.has_begun or job.is_error_of_encoders(lost) or not attempts_left:
                raise lost
            if isinstance(lost, InstanceError) and not lost.is_leaving:
                # It is what vLLM says when its engine has died.
                may_have_died = lost.status == HTTPStatus.INTERNAL_SERVER_ERROR
                if not may_have_died or await self._balancer.lost(assignment.instance, lost):
                    raise lost
                lost = InstanceLostError(lost.message)
            if not isinstance(lost, InstanceLostError):  # for that, it has been probed already
                await self._balancer.lost(assignment.instance, lost)
            if self._other_role(job, assignment.instance):
                raise lost
            await job.unless_encoding_fails(self._balancer.move(assignment))
            self._metrics.language_retries.inc()

    async def _send_back(self, job: Job, call: Call, assignment: Assignment) -> None:
        """Send an instance's response to the client, unless encoding fails before it has begun."""
        if not call.is_stream:
            response = await job.unless_encoding_fails(call.read(self._config.max_answer_bytes))
            assignment.note_answer(call.timing, is_whole=True)
            await job.send_response(response)
            return
        next_chunk = job.chunks_unless_encoding_fails(call)
        # The head is held back until the first event has arrived, so that failures before it still have a status.
        first = await begin(next_chunk)
        assignment.note_answer(call.timing)
        job.request.forget()
        job.note_embeddings_read()
        await job.send_stream(call, first, next_chunk)

    async def _send_back_as_it_is(self, job: Job, call: Call, assignment: Assignment) -> None:
        """Send a response that isn't understood, so that only the instance can say whether it cost what a prompt costs."""
        if not call.is_stream:
            response = await job.unless_encoding_fails(call.read(self._config.max_answer_bytes))
            assignment.note_answer(call.timing, is_whole=True, is_understood=False)
            await job.send_response(response)
            return
        next_chunk = job.chunks_unless_encoding_fails(call)
        first = await (call.chunk() if job.encoding is None else begin_answer(next_chunk))
        assignment.note_answer(call.timing, is_understood=False)
        job.request.forget()
        job.note_embeddings_read()
        await job.send_stream_as_it_is(call, first, next_chunk)

    def _is_handed_over(self, job: Job) -> bool:
        """Whether the answer comes from a decode instance, at least from its second token on."""
        if not self._fleet.hands_over or job.path not in (CHAT_PATH, COMPLETIONS_PATH):
            return False
        return not self._fleet.hands_over_by_vllm or vllm_can_hand_over(job.request.body)

    def _roles(self, needs_encoder: bool) -> tuple[Role, ...]:
        """Return the roles that can be called first, for a request with or without images that have to be encoded."""
        roles = (Role.PREFILL,) if self._fleet.hands_over else WHOLE_ROLES
        if not needs_encoder:
            return roles
        if not self._fleet.healthy(Role.ENCODER) and self._fleet.healthy(Role.AGGREGATED) and Role.AGGREGATED in roles:
            return (Role.AGGREGATED,)
        return roles

    def _note_overhead(self, job: Job, started: float, has_media: bool) -> None:
        job.timing.proxy = time.perf_counter() - started - (job.timing.fetch or 0.0)
        self._metrics.overhead_of("media" if has_media else "text").observe(job.timing.proxy)


def _original(job: Job, items: Sequence[Item]) -> Original:
    """Return a request as it came. An instance that encodes itself gets it with those images that its body lacks.

    Of a request with a salt, all have their identifiers: vLLM names an image without one by its content alone, so that its
    embedding would be everybody's.
    """
    is_salted = bool(job.request.salt)
    missing = [
        item if is_salted or item.is_rewritten or part.has_uuid else None
        for part, item in zip(job.request.media, items, strict=True)
    ]
    return Original(replace(job.request), tuple(items), missing)


def _work(job: Job, items: Sequence[Item]) -> Work:
    """Return what a request with images asks for."""
    request = job.request
    prefixes: list[Prefix] = []
    key = hash(request.salt)
    before = 0
    for text, item in zip(request.text_before_media(), items, strict=False):
        key = hash((key, text, item.identifier))
        before += len(text)
        prefixes.append(Prefix(key, before))
    return Work(
        job.exchange.arrival,
        request.text_bytes,
        [ItemWork(item.identifier, item.pixels, item.identifier in job.published_at) for item in items],
        prefixes if len(prefixes) == len(items) else (),
        request.stream,
    )
