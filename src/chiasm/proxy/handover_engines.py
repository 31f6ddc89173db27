"""What differs between engines in the handover from prefill to decode: chiasm's own, and vLLM.

chiasm's prefill sends its first token to the client at once, and an answer can be resumed elsewhere as long as the tokens are
known that the client has the text of. vLLM's decode answers alone, from its first token on: it computes the last position of
the prompt again and samples the first token itself, which may be another one than prefill's, even greedily, if two are about
as likely. And vLLM can't continue from tokens that it is given, so an answer that has begun ends with its decode instance.
"""

from __future__ import annotations

import enum
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
from msgspec import Raw

from chiasm.chat_body import json_object
from chiasm.proxy.job import Job
from chiasm.proxy.metrics import Metrics
from chiasm.proxy.relay import PartRelay, begin, read_handle
from chiasm.proxy.request import with_member
from chiasm.proxy.upstream import Call, InstanceError, ResponseCutOffError, UpstreamError, UpstreamResponse
from chiasm.wire import CHAT_PATH, UNREADABLE, KVTransferParams

PARAMS = b"kv_transfer_params"
_TRUE = b"true"
_ABSENT = (b"", b"null")
_LIST_OF_PROMPTS = re.compile(rb'\[\s*["\[]')


class Reason(enum.StrEnum):
    """Why a prompt is prefilled again."""

    PREFILL_LOST = "prefill_lost"
    DECODE_LOST = "decode_lost"
    KV_UNAVAILABLE = "kv_unavailable"
    PREEMPTED = "preempted"


class Handle(NamedTuple):
    """What prefill gives for decode: where the KV of the prompt is, and what was sampled."""

    members: dict[str, Raw]
    """Passed on byte for byte, since vLLM's handles have fields that chiasm doesn't know."""
    token_ids: list[int]
    """Tokens sampled so far, if decode is to continue from them; empty if decode samples the first one."""
    num_sent: int = 0
    """How many of them the client has as text."""

    def for_decode(self) -> bytes:
        """Return the ``kv_transfer_params`` for decode."""
        if not self.token_ids:
            return json_object(self.members)
        sent = {"num_sent": b"%d" % self.num_sent} if self.num_sent else {}
        return json_object({**self.members, "continues": _TRUE, **sent})


class HandoverEngine(ABC):
    """How one engine's prefill and decode instances are called, for one request. Each request has its own."""

    waits_for_decode: bool
    """Whether a request waits for a full decode instance; otherwise the client gets its refusal."""
    decodes_per_handle: int
    """How many decode instances a handle may be tried with, if connections are lost."""

    def __init__(self, job: Job, metrics: Metrics, max_response_bytes: int) -> None:
        self.job = job
        self.metrics = metrics
        self.max_response_bytes = max_response_bytes
        self.lease = ""
        """Names what a prefill instance may hold for this request and no decode instance has fetched; empty if there is nothing
        that it could be told to free."""

    @property
    def can_retry(self) -> bool:
        """Whether the prompt may be prefilled again with what the client has received so far."""
        return not self.job.exchange.has_begun

    @property
    def has_progressed(self) -> bool:
        """Whether decode has added anything to the answer since the last prefill."""
        return False

    @abstractmethod
    def reason_to_retry(self, error: UpstreamError | InstanceError, lost: Reason) -> Reason | None:
        """Return why the prompt must be prefilled again; None if the error is for the client. ``lost`` is the reason if the
        instance is lost."""

    @abstractmethod
    def prefill_body(self, body: bytes) -> bytes:
        """Return the body for prefill, made from the one for any language instance."""

    @abstractmethod
    async def relay_prefill(self, call: Call) -> Handle | None:
        """Return the handle; None if prefill's answer is complete, and has been sent to the client."""

    @abstractmethod
    async def relay_decode(self, call: Call, handle: Handle, on_answer: Callable[[], Awaitable[None]]) -> None:
        """Send decode's answer to the client; ``on_answer`` is called when it has begun."""


class ChiasmEngine(HandoverEngine):
    """Prefill and decode of chiasm's own engine."""

    waits_for_decode = True
    decodes_per_handle = 2

    def __init__(self, job: Job, metrics: Metrics, max_response_bytes: int) -> None:
        super().__init__(job, metrics, max_response_bytes)
        self._token_ids: list[int] = []
        """Tokens that the client has as text."""
        self._num_of_prefill = 0
        """How many of them were known when the last prefill ended."""
        self._first: KVTransferParams | None = None
        """The first handle of the answer, which every later prefill continues."""
        self._knows_all_sent = True
        """Whether ``_token_ids`` are all that the client has."""
        self._first_token_at: float | None = None
        """When prefill's first token went to the client."""
        self._has_decoded = False

    @property
    def can_retry(self) -> bool:
        return self._knows_all_sent or not self.job.exchange.has_begun

    @property
    def has_progressed(self) -> bool:
        return len(self._token_ids) > self._num_of_prefill

    def reason_to_retry(self, error: UpstreamError | InstanceError, lost: Reason) -> Reason | None:
        if not isinstance(error, InstanceError):
            return lost
        if error.is_preempted:
            return Reason.PREEMPTED
        if error.is_kv_unavailable:
            return Reason.KV_UNAVAILABLE
        return lost if error.is_leaving else None

    def prefill_body(self, body: bytes) -> bytes:
        if not self.job.exchange.has_begun:  # nothing was sent: the answer starts again
            self._token_ids, self._first, self._knows_all_sent = [], None, True
        self.lease = secrets.token_hex(16)
        params = KVTransferParams(do_remote_decode=True, continues=True, lease=self.lease)
        if self._token_ids and self._first is not None:
            params.output_token_ids = self._token_ids
            params.num_sent = len(self._token_ids)
            params.seed = self._first.seed
            params.created = self._first.created
            params.cached_tokens = self._first.cached_tokens
        return with_member(body, PARAMS, msgspec.json.encode(params))

    async def relay_prefill(self, call: Call) -> Handle | None:
        job = self.job
        if not call.is_stream:
            response = await job.unless_encoding_fails(call.read(self.max_response_bytes))
            members = _handle_in(response)
            if members is not None:
                return Handle(members, _sampled(_view(members)))
            await job.send_response(response)
            return None
        relay = PartRelay()
        try:
            while chunk := await job.unless_encoding_fails(call.chunk()):
                if events := relay.pass_on(chunk):
                    await self._send(events, call, knows_tokens=False)
                    self._first_token_at = self._first_token_at or time.perf_counter()
        except ResponseCutOffError:
            if relay.handle is None:
                raise
        if relay.failure is not None:
            raise relay.failure
        if relay.handle is None:
            await self._end(relay, call)
            return None
        return self._take_handle(relay.handle)

    async def relay_decode(self, call: Call, handle: Handle, on_answer: Callable[[], Awaitable[None]]) -> None:
        await on_answer()
        if not call.is_stream:
            response = await call.read(self.max_response_bytes)
            if self.job.exchange.has_begun:
                raise UpstreamError("The decode instance did not continue the stream.")
            await self.job.send_response(response)
            return
        relay = PartRelay()
        while chunk := await call.chunk():
            events = relay.pass_on(chunk)
            self._token_ids += relay.take_token_ids()
            if events:
                self._note_gap()
                await self._send(events, call, knows_tokens=bool(handle.token_ids) and not relay.has_finished)
            if relay.failure is not None:
                raise relay.failure
        await self._end(relay, call)

    def _take_handle(self, members: dict[str, Raw]) -> Handle:
        """Return the handle that ends prefill's part of a stream: the tokens in it are all that the client has."""
        params = _view(members)
        self._token_ids = _sampled(params)
        self._num_of_prefill = len(self._token_ids)
        self._knows_all_sent = bool(self._token_ids)
        self._first = self._first or params
        return Handle(members, list(self._token_ids), num_sent=len(self._token_ids))

    async def _send(self, events: bytes, call: Call, *, knows_tokens: bool) -> None:
        """Pass events on; ``knows_tokens`` says whether the tokens of their text are in ``_token_ids``."""
        self._knows_all_sent = knows_tokens
        await self.job.send_events(events, call)

    async def _end(self, relay: PartRelay, call: Call) -> None:
        await self.job.send_events(relay.finish(), call)
        await self.job.end_events()

    def _note_gap(self) -> None:
        if self._first_token_at is not None and not self._has_decoded:
            self.metrics.gap.observe(time.perf_counter() - self._first_token_at)
        self._has_decoded = True


class VllmEngine(HandoverEngine):
    """Prefill and decode of vLLM, with chiasm's middleware."""

    waits_for_decode = False
    # After a decode instance has read the KV, prefill may give its blocks to others.
    decodes_per_handle = 1

    def reason_to_retry(self, error: UpstreamError | InstanceError, lost: Reason) -> Reason | None:
        if isinstance(error, InstanceError) and not error.is_leaving and (error.status < 500 or error.status == 503):
            return None  # the request is wrong, or the instance is full
        return lost

    def prefill_body(self, body: bytes) -> bytes:
        return vllm_prefill_body(body, self.job.path)

    async def relay_prefill(self, call: Call) -> Handle | None:
        members = _handle_in(await self.job.unless_encoding_fails(call.read(self.max_response_bytes)))
        if members is None:
            raise UpstreamError(
                "The answer of the prefill instance has no kv_transfer_params, so the KV can't be found."
            )
        return Handle(members, [])

    async def relay_decode(self, call: Call, handle: Handle, on_answer: Callable[[], Awaitable[None]]) -> None:
        job = self.job
        is_watched = job.encoding is not None and not job.embeddings_are_read
        if not call.is_stream:
            reading = call.read(self.max_response_bytes)
            response = await (job.unless_encoding_fails(reading) if is_watched else reading)
            await on_answer()
            await job.send_response(response)
            return
        next_chunk = job.chunks_unless_encoding_fails(call) if is_watched else call.chunk
        first = await begin(next_chunk)
        await on_answer()
        job.request.forget()
        if job.is_encoded:
            job.exchange.release()
        await job.send_stream(call, first, next_chunk)


_VLLM_PREFILL = {
    b"stream": b"false",
    b"stream_options": b"null",
    b"max_tokens": b"1",
    b"min_tokens": b"0",
    # vLLM's own examples set all of these.
    PARAMS: (
        b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
        b'"remote_host":null,"remote_port":null}'
    ),
}
_VLLM_PREFILL_CHAT = {b"max_completion_tokens": b"1"}


def vllm_prefill_body(body: bytes, path: str) -> bytes:
    """Return the body for vLLM's prefill: the same prompt and sampling, but for one token, and not as a stream."""
    for name, value in (_VLLM_PREFILL | (_VLLM_PREFILL_CHAT if path == CHAT_PATH else {})).items():
        body = with_member(body, name, value)
    return body


class _Shape(msgspec.Struct):
    """The fields of a body that decide whether vLLM's decode can answer it."""

    n: Raw = Raw()
    max_tokens: Raw = Raw()
    max_completion_tokens: Raw = Raw()
    prompt: Raw = Raw()
    prompt_embeds: Raw = Raw()
    prompt_logprobs: Raw = Raw()
    echo: Raw = Raw()
    use_beam_search: Raw = Raw()


_shape = msgspec.json.Decoder(_Shape)
_list = msgspec.json.Decoder(list[Raw])


def vllm_can_hand_over(body: bytes) -> bool:
    """Return whether vLLM's decode has anything to do for a request, and can do it with the KV of one prompt, once.

    Requests for one token, several answers, several prompts, or about the prompt's own tokens are for prefill alone.
    """
    shape = _shape.decode(body)
    limit = shape.max_tokens if bytes(shape.max_completion_tokens) in _ABSENT else shape.max_completion_tokens
    return (
        bytes(limit) not in (b"0", b"1")
        and bytes(shape.n) in (*_ABSENT, b"1")
        and all(bytes(value) in _ABSENT for value in (shape.prompt_embeds, shape.prompt_logprobs))
        and all(bytes(value) in (*_ABSENT, b"false") for value in (shape.echo, shape.use_beam_search))
        and not _has_several(bytes(shape.prompt))
    )


def _has_several(prompt: bytes) -> bool:
    """Whether this is a list of prompts, each of which is a text or a list of token ids."""
    return bool(_LIST_OF_PROMPTS.match(prompt)) and len(_list.decode(prompt)) > 1


class _Body(msgspec.Struct):
    kv_transfer_params: Raw = Raw(b"null")


_body = msgspec.json.Decoder(_Body)
_params = msgspec.json.Decoder(KVTransferParams)


def _handle_in(response: UpstreamResponse) -> dict[str, Raw] | None:
    """Return the members of the handle in a response that isn't a stream; None if there is none. Raises UpstreamError."""
    try:
        value = bytes(_body.decode(response.body).kv_transfer_params)
    except UNREADABLE:
        return None
    return read_handle(value) if value[:1] == b"{" else None


def _view(members: dict[str, Raw]) -> KVTransferParams:
    """Return the handle of a prefill instance of chiasm's own engine. Raises UpstreamError."""
    try:
        return _params.decode(json_object(members))
    except UNREADABLE as error:
        raise UpstreamError(f"The kv_transfer_params of the prefill instance are malformed: {error}") from None


def _sampled(params: KVTransferParams) -> list[int]:
    """Return the tokens from which decode continues; none for several prompts, whose first tokens decode samples."""
    return [] if params.prompts else list(params.output_token_ids)
