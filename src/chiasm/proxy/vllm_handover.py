"""From P to D where both are vLLM's: P computes the prompt, D takes the KV and answers.

vLLM's D computes the last position of the prompt again and samples the first token itself, so the token that P has to sample
is nobody's: the client's answer is D's alone. It can't begin with P's token, since the two may differ where two tokens are
about as likely, even without randomness. And vLLM takes no tokens to go on from: an answer that has begun ends with its D.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

import msgspec
from msgspec import Raw

from chiasm.proxy.admission import Ticket
from chiasm.proxy.context import RequestContext
from chiasm.proxy.encode import Encoded
from chiasm.proxy.exchange import Exchange
from chiasm.proxy.fleet import Instance
from chiasm.proxy.racing import unless_fails
from chiasm.proxy.relay import begin
from chiasm.proxy.request import Request, with_member
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
_OF_PREFILL = {
    b"stream": b"false",
    b"stream_options": b"null",
    b"max_tokens": b"1",
    b"min_tokens": b"0",
    _PARAMS: (
        b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
        b'"remote_host":null,"remote_port":null}'
    ),
}
"""What P's body says in place of the client's; nothing of it changes the prompt."""
_OF_CHAT = {b"max_completion_tokens": b"1"}
_CHAT = "/v1/chat/completions"
_ABSENT = (b"", b"null")
_LIST_OF_PROMPTS = re.compile(rb'\[\s*["\[]')


class _LostError(Exception):
    """The KV is lost to the answer, which begins anew; ``error`` is what the client is told if it can't."""

    def __init__(self, error: ToldError | UpstreamError, *, at_prefill: bool) -> None:
        super().__init__(error)
        self.error = error
        self.at_prefill = at_prefill


class VllmHandover:
    """One request's way through P and D; ``go`` ends when its answer is sent."""

    def __init__(
        self,
        services: Services,
        path: str,
        request: Request,
        body_for: Callable[[Instance], Awaitable[bytes]],
        cost: Callable[[Instance], float],
        *,
        exchange: Exchange,
        ticket: Ticket,
        context: RequestContext,
        encoding: asyncio.Future[dict[str, Encoded]] | None,
    ) -> None:
        """``request`` without pixels, of which ``body_for`` makes what goes to an instance; ``encoding`` ends when all
        embeddings are where P finds them."""
        self._config = services.config
        self._language = services.language
        self._metrics = services.metrics
        self._path = path
        self._request = request
        self._body_for = body_for
        self._cost = cost
        self._exchange = exchange
        self._ticket = ticket
        self._context = context
        self._encoding = encoding
        self._prefills = 0
        self._prefill_at: Instance | None = None
        self._avoided: set[Instance] = set()
        """The P that was lost."""

    async def go(self) -> None:
        """Raises ChiasmError for the client to be told."""
        while True:
            try:
                await self._decode(await self._prefill())
                return
            except _LostError as lost:
                self._prepare_again(lost)

    def _prepare_again(self, lost: _LostError) -> None:
        """Raises ChiasmError if the answer can't begin anew."""
        if self._exchange.has_begun or self._prefills >= self._config.max_prefill_attempts:
            raise lost.error from None
        self._language.check_healthy()
        self._avoided = {self._prefill_at} if lost.at_prefill and self._prefill_at else set()
        self._metrics.prefill_retries.inc()

    async def _prefill(self) -> bytes:
        """What D is told of where the KV is."""
        self._prefills += 1
        started = time.perf_counter()
        with self._language.place(self._request.model, self._cost, (Role.PREFILL,), avoid=self._avoided) as place:
            self._prefill_at = place.instance
            try:
                params = await unless_fails(self._encoding, self._ask_prefill(place.instance))
            except (InstanceLostError, BrokenOffError, ToldError) as error:
                raise await self._lost(place.instance, error, at_prefill=True) from None
        self._context.timing.prefill_call = self._context.timing.prefill_call or time.perf_counter() - started
        if self._encoding is None or self._encoding.done():
            self._ticket.give_back_bytes(but=len(self._request.body))
        return params

    async def _ask_prefill(self, instance: Instance) -> bytes:
        body = for_prefill(await self._body_for(instance), self._path)
        with await self._language.ask(instance, self._path, body, self._context) as call:
            return _params_in(await self._read(call))

    async def _decode(self, params: bytes) -> None:
        """One D is asked: were it lost while it read the KV, P might have given the blocks to others by now."""
        started = time.perf_counter()
        with self._language.place(self._request.model, lambda instance: 1.0, (Role.DECODE,)) as place:
            body = with_member(await self._body_for(place.instance), _PARAMS, params)
            try:
                with await self._language.ask(place.instance, self._path, body, self._context) as call:
                    await self._relay(call, started)
            except (InstanceLostError, BrokenOffError, ToldError) as error:
                raise await self._lost(place.instance, error, at_prefill=False) from None

    async def _lost(
        self, instance: Instance, error: InstanceLostError | BrokenOffError | ToldError, *, at_prefill: bool
    ) -> Exception:
        """The error to raise, once the instance has been looked at anew."""
        if isinstance(error, ToldError) and (error.status < 500 or error.status == 503 or self._is_of_encoders(error)):
            return error  # the request is wrong, or the instance is full
        if not isinstance(error, InstanceLostError):
            await self._language.broke_off(instance, error)
        return _LostError(error, at_prefill=at_prefill)

    def _is_of_encoders(self, error: Exception) -> bool:
        return self._encoding is not None and self._encoding.done() and self._encoding.exception() is error

    async def _relay(self, call: Call, started: float) -> None:
        """D's answer is the client's, unless it is an error that another prefill may do away with."""
        if call.status != 200 or not call.is_stream:
            answer = await self._read(call)
            self._note_handover(started)
            await self._exchange.answer(answer)
            return
        first = await begin(call.chunk)
        self._note_handover(started)
        self._request.forget()
        if self._encoding is None or self._encoding.done():
            self._ticket.give_back_bytes()
        await self._exchange.send_stream(call.headers, first, call.chunk)

    def _note_handover(self, started: float) -> None:
        self._context.timing.handover = time.perf_counter() - started
        self._metrics.handovers.inc()

    async def _read(self, call: Call) -> Answer:
        call.check_status()
        answer = await call.read(self._config.max_answer_bytes)
        if call.status != 200:
            raise AnsweredError(answer)
        return answer


class _Shape(msgspec.Struct):
    """What of a body decides whether D can answer it."""

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


def can_be_handed_over(body: bytes) -> bool:
    """Whether P leaves anything for D to do, and D can do it with the KV of one prompt, once.

    One token, several answers, several prompts, and what is said of the prompt's own tokens are for P alone.
    """
    shape = _shape.decode(body)
    most = shape.max_tokens if bytes(shape.max_completion_tokens) in _ABSENT else shape.max_completion_tokens
    return (
        bytes(most) not in (b"0", b"1")
        and bytes(shape.n) in (*_ABSENT, b"1")
        and all(bytes(value) in _ABSENT for value in (shape.prompt_embeds, shape.prompt_logprobs))
        and all(bytes(value) in (*_ABSENT, b"false") for value in (shape.echo, shape.use_beam_search))
        and not _has_several(bytes(shape.prompt))
    )


def for_prefill(body: bytes, path: str) -> bytes:
    """The body as P gets it: the same prompt and sampling, for one token in one piece."""
    for name, value in (_OF_PREFILL | (_OF_CHAT if path == _CHAT else {})).items():
        body = with_member(body, name, value)
    return body


def _has_several(prompt: bytes) -> bool:
    """A prompt is a text or a list of token ids."""
    return bool(_LIST_OF_PROMPTS.match(prompt)) and len(_list.decode(prompt)) > 1


class _Reply(msgspec.Struct):
    kv_transfer_params: Raw = Raw(b"null")


_reply = msgspec.json.Decoder(_Reply)


def _params_in(answer: Answer) -> bytes:
    """Raises UpstreamError if P says nothing of where the KV is."""
    try:
        value = bytes(_reply.decode(answer.body).kv_transfer_params)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        value = b""
    if value[:1] != b"{":
        raise UpstreamError("the prefill instance's answer has no kv_transfer_params: nothing says where the KV is")
    return value
