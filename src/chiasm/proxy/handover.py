"""From P to D: P computes the prompt and its first token, which goes to the client at once; D takes the KV and goes on.

What happens to an answer, in order: ``Handover._prefill``, ``Handover._decode``. When either is lost on the way, both come
again, elsewhere: of an answer that hasn't begun for the client, from its start; of one that has, with the tokens that the
client has the text of, which P computes like a longer prompt. An answer can go on as long as these tokens are known.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable

import msgspec
from msgspec import Raw

from chiasm.proxy.admission import Ticket
from chiasm.proxy.context import RequestContext
from chiasm.proxy.encode import Encoded
from chiasm.proxy.exchange import Exchange
from chiasm.proxy.fleet import Instance
from chiasm.proxy.language import Place
from chiasm.proxy.racing import end, unless_fails
from chiasm.proxy.relay import PartRelay, read_handle
from chiasm.proxy.request import Request, json_object, with_member
from chiasm.proxy.services import Services
from chiasm.proxy.upstream import (
    Answer,
    AnsweredError,
    BrokenOffError,
    Call,
    InstanceLostError,
    ToldError,
    UpstreamError,
)
from chiasm.wire import Role

_PARAMS = b"kv_transfer_params"
_TRUE = b"true"
_KEPT = ("seed", "created", "cached_tokens")
"""What the first P says of the answer, and every later one is told."""
_DECODE_CALLS = 2
"""With one handle, where connections are lost."""
_NOT_FULL = frozenset({"embedding_unavailable_error", "storage_error"})
"""Types of errors that come with a 503 as a full instance's do."""
_FIRST_WAIT_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 0.5

_token_ids = msgspec.json.Decoder(list[int] | None)
_several = msgspec.json.Decoder(list[Raw] | None)


class Reason(enum.StrEnum):
    """Why a prompt is prefilled again."""

    PREFILL_LOST = "prefill_lost"
    DECODE_LOST = "decode_lost"
    KV_UNAVAILABLE = "kv_unavailable"
    PREEMPTED = "preempted"


class _InterruptedError(Exception):
    """P or D is lost to the answer, which may go on elsewhere; ``error`` is what the client is told if it can't."""

    def __init__(self, reason: Reason, error: ToldError | UpstreamError) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error


class Handle:
    """What P answers for D: where the prompt's KV lies, and what was sampled."""

    def __init__(self, members: dict[str, Raw], *, of_stream: bool) -> None:
        self._of_stream = of_stream
        self.members = members
        self.token_ids: list[int] = []
        """What was sampled of a single answer; empty where D samples the first tokens itself."""
        try:
            if not _several.decode(members.get("prompts", b"null")):
                self.token_ids = _token_ids.decode(members.get("output_token_ids", b"null")) or []
        except msgspec.MsgspecError as error:
            raise UpstreamError(f"the prefill instance's kv_transfer_params aren't understood: {error}") from None

    def for_decode(self) -> bytes:
        """As D gets it: values as P gave them, and what the client has already."""
        if not self.token_ids:
            return json_object(self.members)
        sent = {"num_sent": b"%d" % len(self.token_ids)} if self._of_stream else {}
        return json_object({**self.members, "continues": _TRUE, **sent})


class _Progress:
    """What is known of the answer."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        """Whose text the client has."""
        self.kept: dict[str, Raw] = {}
        self.can_go_on = True
        """Whether these tokens are all that the client has."""
        self._num_of_prefill = 0

    @property
    def has_got_further(self) -> bool:
        """Whether D has said anything since the last prefill."""
        return len(self.token_ids) > self._num_of_prefill

    def for_prefill(self) -> bytes:
        members: dict[str, Raw | bytes] = {"do_remote_decode": _TRUE, "continues": _TRUE}
        if self.token_ids:
            sent = {"output_token_ids": msgspec.json.encode(self.token_ids), "num_sent": b"%d" % len(self.token_ids)}
            members |= sent | self.kept
        return json_object(members)

    def hand_over(self, handle: Handle) -> None:
        """The first token of prefill and what came before are known."""
        self.token_ids = list(handle.token_ids)
        self._num_of_prefill = len(self.token_ids)
        self.can_go_on = bool(handle.token_ids)
        self.kept = self.kept or {name: handle.members[name] for name in _KEPT if name in handle.members}


class Handover:
    """One request's way through P and D; ``go`` ends when its answer is sent."""

    def __init__(
        self,
        services: Services,
        path: str,
        request: Request,
        cost: Callable[[Instance], float],
        *,
        exchange: Exchange,
        ticket: Ticket,
        context: RequestContext,
        encoding: asyncio.Future[dict[str, Encoded]] | None,
    ) -> None:
        """``request`` without pixels; ``encoding`` ends when all embeddings are where P finds them."""
        self._config = services.config
        self._language = services.language
        self._metrics = services.metrics
        self._path = path
        self._request = request
        self._cost = cost
        self._exchange = exchange
        self._ticket = ticket
        self._context = context
        self._encoding = encoding
        self._progress = _Progress()
        self._prefills = 0
        self._prefill_at: Instance | None = None
        self._avoided: set[Instance] = set()
        """The P that was lost."""
        self._began = time.perf_counter()
        self._first_token_at: float | None = None
        """When P's first token went to the client."""
        self._goes_on = False
        """Whether a token of D went to the client."""

    async def go(self) -> None:
        """Raises ChiasmError for the client to be told."""
        while True:
            try:
                handle = await self._prefill()
                if handle is not None:
                    await self._decode(handle)
                return
            except _InterruptedError as interruption:
                self._prepare_again(interruption)

    def _prepare_again(self, interruption: _InterruptedError) -> None:
        """Raises ChiasmError if the answer can't go on."""
        if interruption.reason is Reason.PREEMPTED and self._progress.has_got_further:
            self._prefills = 0  # nothing has failed; what bounds this is the deadline
        if not self._exchange.has_begun:
            self._progress = _Progress()
        if not self._progress.can_go_on or self._prefills >= self._config.max_prefill_attempts:
            raise interruption.error from None
        self._language.check_healthy()
        lost_prefill = interruption.reason in {Reason.PREFILL_LOST, Reason.KV_UNAVAILABLE}
        self._avoided = {self._prefill_at} if lost_prefill and self._prefill_at else set()
        self._metrics.prefill_retries.inc()
        if self._exchange.has_begun:
            self._metrics.resumed_streams.labels(interruption.reason.value).inc()

    # P

    async def _prefill(self) -> Handle | None:
        """What D gets; None if P's answer was all of it, and is sent."""
        self._prefills += 1
        timing = self._context.timing
        with self._language.place(self._request.model, self._cost, (Role.PREFILL,), avoid=self._avoided) as place:
            self._prefill_at = place.instance
            try:
                # Who has nothing yet is told that P is full; for an answer that has begun, room is waited for.
                with await self._open(
                    place, self._progress.for_prefill(), self._exchange.has_begun, self._encoding
                ) as call:
                    timing.prefill_call = timing.prefill_call or time.perf_counter() - self._began
                    handle = await self._relay_prefill(call)
            except InstanceLostError as error:
                raise _InterruptedError(Reason.PREFILL_LOST, error) from None
            except (BrokenOffError, ToldError) as error:
                if not _has_given_up(error) or self._is_of_encoders(error):
                    raise
                await self._language.broke_off(place.instance, error)
                raise _interruption(error, Reason.PREFILL_LOST) from None
        # The embeddings were there. Encoders may still put one where the next P would look for it, but none is needed now.
        if self._encoding is None or self._encoding.done():
            self._ticket.give_back_bytes(but=len(self._request.body))
        return handle

    async def _relay_prefill(self, call: Call) -> Handle | None:
        if not call.is_stream:
            answer = await unless_fails(self._encoding, call.read(self._config.max_answer_bytes))
            members = _handle_in(answer.body)
            if members is not None:
                return Handle(members, of_stream=False)
            await self._exchange.answer(answer)
            return None
        relay = PartRelay()
        try:
            while chunk := await unless_fails(self._encoding, call.chunk()):
                if events := relay.pass_on(chunk):
                    await self._send(events, call, are_known=False)
                    self._first_token_at = self._first_token_at or time.perf_counter()
        except BrokenOffError:
            if relay.handle is None:
                raise
        if relay.failure is not None:
            raise relay.failure
        if relay.handle is None:
            await self._end_stream(relay, call)
            return None
        handle = Handle(relay.handle, of_stream=True)
        self._progress.hand_over(handle)
        return handle

    def _is_of_encoders(self, error: Exception) -> bool:
        return self._encoding is not None and self._encoding.done() and self._encoding.exception() is error

    # D

    async def _decode(self, handle: Handle) -> None:
        started = time.perf_counter()
        timing = self._context.timing
        with (
            self._language.place(self._request.model, lambda instance: 1.0, (Role.DECODE,)) as place,
            await self._open_decode(place, handle) as call,
        ):
            timing.handover = timing.handover or time.perf_counter() - started
            self._metrics.handovers.inc()
            try:
                await self._relay_decode(call, handle)
            except (BrokenOffError, ToldError) as error:
                await self._language.broke_off(place.instance, error)
                raise _interruption(error, Reason.DECODE_LOST) from None

    async def _open_decode(self, place: Place, handle: Handle) -> Call:
        """The handle serves another D too, as long as none has fetched what it stands for."""
        for calls in range(1, _DECODE_CALLS + 1):
            try:
                return await self._open(place, handle.for_decode(), waits_for_room=True)
            except AnsweredError as error:
                if _has_given_up(error):
                    raise _interruption(error, Reason.DECODE_LOST) from None
                raise
            except (InstanceLostError, BrokenOffError) as error:
                if calls == _DECODE_CALLS:
                    raise _InterruptedError(Reason.DECODE_LOST, error) from None
                place.move()
        raise AssertionError

    async def _relay_decode(self, call: Call, handle: Handle) -> None:
        if not call.is_stream:
            answer = await call.read(self._config.max_answer_bytes)
            if self._exchange.has_begun:
                raise UpstreamError("the decode instance did not go on with the stream")
            await self._exchange.answer(answer)
            return
        relay = PartRelay()
        while chunk := await call.chunk():
            events = relay.pass_on(chunk)
            self._progress.token_ids += relay.take_token_ids()
            if events:
                self._note_gap()
                await self._send(events, call, are_known=bool(handle.token_ids) and not relay.has_finished)
            if relay.failure is not None:
                raise relay.failure
        await self._end_stream(relay, call)

    # Both

    async def _open(
        self,
        place: Place,
        params: bytes,
        waits_for_room: bool,
        condition: asyncio.Future[dict[str, Encoded]] | None = None,
    ) -> Call:
        """Call the place's instance; if it has no room another, and when none has, all again after a while.

        Raises AnsweredError for any other refusal, InstanceLostError, and BrokenOffError in the middle of a refusal.
        """
        body = with_member(self._request.body, _PARAMS, params)
        full: set[Instance] = set()
        seconds = _FIRST_WAIT_SECONDS
        while True:
            call = await self._call(place.instance, body, condition)
            if call.status == 200:
                return call
            error = AnsweredError(await self._read_refusal(call))
            if not (waits_for_room and _is_full(error)):
                raise error
            if place.instance.role is Role.DECODE:
                self._metrics.decode_refusals.inc()
            full.add(place.instance)
            if not place.take_other(full):
                await asyncio.sleep(seconds)
                seconds = min(2 * seconds, _LONGEST_WAIT_SECONDS)
                full.clear()
                place.take()

    async def _call(
        self, instance: Instance, body: bytes, condition: asyncio.Future[dict[str, Encoded]] | None
    ) -> Call:
        opening = asyncio.ensure_future(self._language.ask(instance, self._path, body, self._context))
        try:
            return await unless_fails(condition, opening)
        except BaseException:
            if begun := await end(opening):
                begun.close()
            raise

    async def _read_refusal(self, call: Call) -> Answer:
        with call:
            if not 400 <= call.status <= 599:
                raise UpstreamError(f"the instance answered with status {call.status}")
            return await call.read(self._config.max_answer_bytes)

    async def _send(self, events: bytes, call: Call, *, are_known: bool) -> None:
        """Pass events on. ``are_known``: the tokens that they come from."""
        self._progress.can_go_on = are_known
        if not self._exchange.has_begun:
            await self._exchange.start_stream(call.headers)
        await self._exchange.send_events(events)

    async def _end_stream(self, relay: PartRelay, call: Call) -> None:
        if not self._exchange.has_begun:
            await self._exchange.start_stream(call.headers)
        if rest := relay.finish():
            await self._exchange.send_events(rest)
        await self._exchange.end_stream()

    def _note_gap(self) -> None:
        if self._first_token_at is not None and not self._goes_on:
            self._metrics.gap.observe(time.perf_counter() - self._first_token_at)
        self._goes_on = True


def _is_full(error: AnsweredError) -> bool:
    """Whether an instance has no room now, so that another is tried, or the same after a while."""
    return (
        error.status == 503 and not error.is_kv_unavailable and not error.is_preempted and error.kind not in _NOT_FULL
    )


def _has_given_up(error: BrokenOffError | ToldError) -> bool:
    """Whether the instance leaves the answer to others; else its error is what the client is told."""
    return not isinstance(error, ToldError) or error.is_kv_unavailable or error.is_preempted or error.is_leaving


def _interruption(error: BrokenOffError | ToldError, lost: Reason) -> _InterruptedError:
    if isinstance(error, ToldError) and error.is_preempted:
        return _InterruptedError(Reason.PREEMPTED, error)
    if isinstance(error, ToldError) and error.is_kv_unavailable:
        return _InterruptedError(Reason.KV_UNAVAILABLE, error)
    return _InterruptedError(lost, error)


class _Reply(msgspec.Struct):
    kv_transfer_params: Raw = Raw(b"null")


_reply = msgspec.json.Decoder(_Reply)


def _handle_in(body: bytes) -> dict[str, Raw] | None:
    """What P says for D in an answer of one piece; None if it is the whole answer."""
    try:
        value = bytes(_reply.decode(body).kv_transfer_params)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return read_handle(value) if value[:1] == b"{" else None
