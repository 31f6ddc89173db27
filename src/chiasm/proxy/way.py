"""The way of one request, from its body to its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from chiasm.errors import InvalidRequestError, MediaError, OverloadedError
from chiasm.proxy.admission import Ticket
from chiasm.proxy.context import RequestContext
from chiasm.proxy.encode import Encoded
from chiasm.proxy.exchange import Exchange
from chiasm.proxy.fleet import WHOLE_ROLES, Instance
from chiasm.proxy.handover import Handover
from chiasm.proxy.items import Item, embeds_part, read_items
from chiasm.proxy.language import Place
from chiasm.proxy.racing import end, unless_fails
from chiasm.proxy.relay import begin
from chiasm.proxy.request import Request
from chiasm.proxy.services import Services
from chiasm.proxy.upstream import Call
from chiasm.proxy.vllm_handover import VllmHandover, can_be_handed_over
from chiasm.wire import Role

_Encoding = asyncio.Future[dict[str, Encoded]]

_COST_OF_A_REQUEST = 1000.0
_COST_OF_AN_ITEM = 4000.0
"""In bytes of text: an item takes about as many tokens of a prompt."""
_PIXELS_PER_COST = 64
"""What encoding costs an aggregated instance on top."""


class Way:
    """One request that was read and parsed; ``go`` ends when its answer is sent."""

    def __init__(
        self,
        services: Services,
        path: str,
        request: Request,
        *,
        exchange: Exchange,
        ticket: Ticket,
        context: RequestContext,
        started: float,
    ) -> None:
        self._services = services
        self._path = path
        self._request = request
        self._exchange = exchange
        self._ticket = ticket
        self._context = context
        self._started = started
        """When the body was there, on the clock of ``time.perf_counter``."""

    async def go(self) -> None:
        """Raises ChiasmError for the client to be told."""
        self._services.language.check_model(self._request.model)
        if not self._request.media:
            await self._text()
            return
        self._check_media()
        items = await self._read_items()
        cost = _cost(self._request, items)
        if self._is_handed_over():
            await self._handed_over(cost, items)
            return
        with self._services.language.place(self._request.model, cost, self._roles_for_media()) as place:
            if place.instance.role is Role.AGGREGATED:
                await self._aggregated(place, items)
            else:
                await self._disaggregated(place, items)

    async def _text(self) -> None:
        """The body as it came."""
        cost = _cost(self._request, ())
        if self._is_handed_over():
            await self._handed_over(cost, [])
            return
        with self._services.language.place(self._request.model, cost, self._roles) as place:
            await self._whole(place, "text")

    async def _aggregated(self, place: Place, items: list[Item]) -> None:
        """Media goes along as data: URLs, so that instances never fetch; where that changes nothing, the body as it came."""
        parts = [
            item.image_url_part() if item.fetched or part.has_uuid else None
            for part, item in zip(self._request.media, items, strict=True)
        ]
        if any(parts):
            self._request.body = self._request.with_parts(parts)
        items.clear()
        await self._whole(place, "media")

    async def _whole(self, place: Place, kind: str) -> None:
        """One call, whose body is the request's."""
        self._note_overhead(kind)
        with await self._services.language.open(place, self._path, self._as_it_is, self._context) as call:
            await self._send_back(call, None)

    async def _disaggregated(self, place: Place, items: list[Item]) -> None:
        """Pixels to encoders and text to PD, at the same time; each ends the other when it fails."""
        body_for, encoding = self._without_pixels(items)
        opening = asyncio.ensure_future(self._services.language.open(place, self._path, body_for, self._context))
        try:
            call = await unless_fails(encoding, opening)
            await self._send_back(call, encoding)
        finally:
            await end(encoding)
            if begun := await end(opening):
                begun.close()

    async def _handed_over(self, cost: Callable[[Instance], float], items: list[Item]) -> None:
        """Text to P and then to D, and pixels to encoders at the same time as to P."""
        request = self._request
        encoding: _Encoding | None = None
        if items:
            body_for, encoding = self._without_pixels(items)
        else:
            body_for = self._as_it_is
            self._note_overhead("text")
        handover: Handover | VllmHandover
        if self._services.fleet.hands_over_by_vllm:
            handover = VllmHandover(
                self._services,
                self._path,
                request,
                body_for,
                cost,
                exchange=self._exchange,
                ticket=self._ticket,
                context=self._context,
                encoding=encoding,
            )
        else:
            handover = Handover(
                self._services,
                self._path,
                request,
                cost,
                exchange=self._exchange,
                ticket=self._ticket,
                context=self._context,
                encoding=encoding,
            )
        try:
            await handover.go()
        finally:
            if encoding is not None:
                await end(encoding)

    def _without_pixels(self, items: list[Item]) -> tuple[Callable[[Instance], Awaitable[bytes]], _Encoding]:
        """Give the images to encoders, and the request what stands for them: what goes to an instance, and the encoding."""
        request = self._request
        request.body = request.with_parts([item.image_embeds_part() for item in items])
        request.media = []
        identifiers = [item.identifier for item in items]
        self._note_overhead("media")
        encoding = asyncio.ensure_future(self._services.encoders.encode(tuple(items), self._context))
        items.clear()

        async def body_for(instance: Instance) -> bytes:
            if instance.report is not None and instance.report.takes_image_size:
                return request.body
            encoded = await asyncio.shield(encoding)
            return request.with_parts([embeds_part(name, encoded[name].metadata) for name in identifiers])

        return body_for, encoding

    async def _as_it_is(self, instance: Instance) -> bytes:
        return self._request.body

    async def _send_back(self, call: Call, encoding: _Encoding | None) -> None:
        """The instance's answer, unless encoding fails before there is one."""
        self._request.forget()
        call.check_status()
        if call.status != 200 or not call.is_stream:
            answer = await unless_fails(encoding, call.read(self._services.config.max_answer_bytes))
            await self._exchange.answer(answer)
            return

        async def next_chunk() -> bytes:
            return await unless_fails(encoding, call.chunk())

        # No head for the client before there is something to tell: until then all can still fail with a status.
        first = await begin(next_chunk)
        if encoding is None or encoding.done():
            self._ticket.give_back_bytes()
        await self._exchange.send_stream(call.headers, first, next_chunk)

    def _check_media(self) -> None:
        count = len(self._request.media)
        most = self._services.config.max_items
        most = min(most, self._services.fleet.max_items or most)
        if count > most:
            raise InvalidRequestError(
                f"the request has {count} images; at most {most} are taken", param="messages", code="too_many_images"
            )
        if not self._roles_for_media():
            raise OverloadedError("no encoder is healthy; try again", code="no_encoder")

    @property
    def _roles(self) -> tuple[Role, ...]:
        """Who is asked first."""
        return (Role.PREFILL,) if self._services.fleet.hands_over else WHOLE_ROLES

    def _is_handed_over(self) -> bool:
        """Whether the answer is D's, at least from its second token on."""
        fleet = self._services.fleet
        return fleet.hands_over and (not fleet.hands_over_by_vllm or can_be_handed_over(self._request.body))

    def _roles_for_media(self) -> tuple[Role, ...]:
        """Only an aggregated instance can take media where no encoder makes the embeddings."""
        fleet = self._services.fleet
        encoders = fleet.healthy(Role.ENCODER)
        return tuple(role for role in self._roles if fleet.healthy(role) and (role is Role.AGGREGATED or encoders))

    async def _read_items(self) -> list[Item]:
        services = self._services
        try:
            media = await read_items(
                self._request.media,
                fetcher=services.fetcher,
                executor=services.executor,
                fingerprint=services.fleet.fingerprint,
                salt=self._request.salt,
                hold=self._ticket.hold,
            )
        except MediaError:
            services.metrics.items.labels("refused").inc()
            raise
        if media.fetch_seconds is not None:
            self._context.timing.fetch = media.fetch_seconds
            services.metrics.fetch.observe(media.fetch_seconds)
        return media.items

    def _note_overhead(self, kind: str) -> None:
        timing = self._context.timing
        timing.proxy = time.perf_counter() - self._started - (timing.fetch or 0.0)
        self._services.metrics.overhead.labels(kind).observe(timing.proxy)


def _cost(request: Request, items: Sequence[Item]) -> Callable[[Instance], float]:
    """What a request is to an instance, in bytes of text."""
    text_bytes = max(0, len(request.body) - sum(len(part.url) for part in request.media))
    language = _COST_OF_A_REQUEST + text_bytes + _COST_OF_AN_ITEM * len(items)
    vision = sum(item.pixels for item in items) / _PIXELS_PER_COST
    return lambda instance: language + (vision if instance.role is Role.AGGREGATED else 0.0)
