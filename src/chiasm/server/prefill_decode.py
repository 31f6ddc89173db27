"""Answers that begin at a prefill instance and continue at a decode instance: which part of one is made here.

The field ``kv_transfer_params`` (:class:`chiasm.wire.KVTransferParams`) connects the parts. What it says is checked here; only
the engine can tell whether a handle's KV is that of the prompt.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec.structs import replace as with_fields

from chiasm.engine.request import GenerateRequest, SamplingParams
from chiasm.errors import InvalidRequestError
from chiasm.server.protocol import GenerationFields
from chiasm.server.sampling import num_choices
from chiasm.wire import KVTransferParams, Role

_PARAM = "kv_transfer_params"
_MAX_CREATED = 1 << 53
"""Up to here JavaScript represents every integer."""


@dataclass(frozen=True)
class AnswerPart:
    """The part of an answer that is made here. The defaults are those of pd and aggregated instances: all of it."""

    given: Sequence[KVTransferParams] = ()
    """What the sender says about each prompt; empty for pd and aggregated instances."""
    created: int | None = None
    """Unix time at which the answer began, if that was elsewhere."""
    begins_here: bool = True
    """Whether the answer begins here, with the role of each choice."""
    has_text: bool = True
    """Whether tokens that are sampled here belong to the answer; otherwise only the prompt is computed."""
    announces_tokens: bool = False
    """Whether a stream carries the ids of its tokens, so that another instance can continue from any of them."""


def answer_part(role: Role, request: GenerationFields, *, num_prompts: int = 1) -> AnswerPart:
    """Return which part of the answer an instance of ``role`` makes. Raises InvalidRequestError if it is asked for more."""
    given = request.kv_transfer_params or KVTransferParams()
    is_single = num_prompts == 1 and num_choices(request) == 1
    match role:
        case Role.PREFILL:
            return _first_part(given, is_single=is_single, num_prompts=num_prompts, streams=bool(request.stream))
        case Role.DECODE:
            return _last_part(given, is_single=is_single, num_prompts=num_prompts)
    if given != KVTransferParams():
        raise InvalidRequestError(
            f"{_PARAM} is not supported by this instance, which is neither prefill nor decode; leave it out.",
            param=_PARAM,
        )
    return AnswerPart()


def _first_part(given: KVTransferParams, *, is_single: bool, num_prompts: int, streams: bool) -> AnswerPart:
    """Return prefill's part: the prompt, and the first token if there is one prompt with one choice."""
    if not given.do_remote_decode:
        raise InvalidRequestError(
            f"This instance only prefills, and {_PARAM} doesn't say that the answer continues elsewhere "
            "(do_remote_decode); send the request to the proxy.",
            param=_PARAM,
        )
    if streams and not given.continues:
        raise InvalidRequestError(
            "This instance answers with a handle for a decode instance, which is not a stream; send stream=false.",
            param="stream",
        )
    _check_handle(given, is_single=is_single)
    return AnswerPart(
        given=[with_fields(_with_token_ids(given), lease=given.lease or secrets.token_hex(16))] * num_prompts,
        created=given.created,
        begins_here=not given.output_token_ids,
        has_text=is_single,
    )


def _last_part(given: KVTransferParams, *, is_single: bool, num_prompts: int) -> AnswerPart:
    """Return decode's part: what follows the part that a prefill instance made."""
    handles = given.prompts or [given]
    for index, handle in enumerate(handles):
        _check_remote(handle, f"prompts[{index}]." if given.prompts else "")
        _check_handle(handle, is_single=is_single)
    if len(handles) != num_prompts:
        raise InvalidRequestError(
            f"The request has {num_prompts} prompts and {_PARAM} {len(handles)} handles; send one for each prompt.",
            param=_PARAM,
        )
    return AnswerPart(
        given=[_with_token_ids(handle) for handle in handles],
        created=handles[0].created,
        begins_here=not is_single or handles[0].num_sent == 0,
        announces_tokens=is_single and handles[0].continues,
    )


def _with_token_ids(given: KVTransferParams) -> KVTransferParams:
    """Return ``given`` with the token ids of its log probabilities, which versions before 0.4 don't send."""
    if len(given.output_logprobs) != len(given.output_token_ids):  # none, or what _check_given refuses
        return given
    logprobs = [
        with_fields(entry, token_id=token_id) if entry.token_id < 0 else entry
        for entry, token_id in zip(given.output_logprobs, given.output_token_ids, strict=True)
    ]
    return with_fields(given, output_logprobs=logprobs)


# ---- what the engine does ----------------------------------------------------------------------------------------------


def engine_requests(
    part: AnswerPart, requests: Sequence[GenerateRequest], *, vocab_size: int
) -> Sequence[GenerateRequest]:
    """Return what the engine does for ``requests``, which ask for the whole answer, one for each prompt.

    Raises InvalidRequestError if what the sender says about a prompt contradicts its request.
    """
    if not part.given:
        return requests
    for request, given in zip(requests, part.given, strict=True):
        _check_given(given, request, vocab_size)
    if part.has_text:
        return [replace(request, kv_transfer_params=given) for request, given in zip(requests, part.given, strict=True)]
    # Each choice samples its first token at the decode instance. The engine samples one here in any case; it is dropped.
    return [
        replace(
            request,
            num_choices=1,
            sampling=SamplingParams(max_tokens=1, temperature=0.0, seed=request.sampling.seed, ignore_eos=True),
            kv_transfer_params=with_fields(given, continues=False),
        )
        for request, given in zip(requests, part.given, strict=True)
    ]


def handle_for_decode(
    part: AnswerPart, handles: Sequence[KVTransferParams], created: int, *, is_sent: bool
) -> KVTransferParams | None:
    """Return the handle with which the answer continues at a decode instance; None if it is complete.

    ``handles`` are the engine's, one for each prompt or none at all; ``created`` is the Unix time at which the answer began,
    and ``is_sent`` tells whether the client already has its text.
    """
    if not handles:
        return None
    if part.has_text:
        (handle,) = handles
        return with_fields(handle, created=created, num_sent=len(handle.output_token_ids) if is_sent else 0)
    prompts = [
        with_fields(handle, continues=given.continues, output_token_ids=[], output_logprobs=[], created=created)
        for handle, given in zip(handles, part.given, strict=True)
    ]
    return prompts[0] if len(prompts) == 1 else KVTransferParams(prompts=prompts)


# ---- checks ------------------------------------------------------------------------------------------------------------


def _check_remote(handle: KVTransferParams, where: str) -> None:
    """Raise InvalidRequestError unless the handle says where the KV is."""
    if not handle.do_remote_prefill:
        raise InvalidRequestError(
            f"This instance only decodes, and {_PARAM} doesn't say that the KV of the prompt is elsewhere "
            f"({where}do_remote_prefill); send the request to the proxy.",
            param=_PARAM,
        )
    if missing := handle.missing():
        raise InvalidRequestError(
            f"{_PARAM} has no {where}{missing[0]}; send what the prefill instance answered.", param=_PARAM
        )
    if handle.prompts:
        raise InvalidRequestError(
            f"{_PARAM}: {where}prompts must be empty, because a handle in a list is for one prompt.", param=_PARAM
        )


def _check_handle(handle: KVTransferParams, *, is_single: bool) -> None:
    """Raise InvalidRequestError for what no prompt can have."""
    if handle.created is not None and not 0 <= handle.created < _MAX_CREATED:
        raise InvalidRequestError(f"{_PARAM}: created must be a Unix time, got {handle.created}.", param=_PARAM)
    if handle.output_token_ids and not is_single:
        raise InvalidRequestError(
            f"{_PARAM}: output_token_ids must be empty, because an answer of several choices cannot be resumed.",
            param=_PARAM,
        )


def _check_given(given: KVTransferParams, request: GenerateRequest, vocab_size: int) -> None:
    """Raise InvalidRequestError if what came with a prompt contradicts its request."""
    num_given, sampling = len(given.output_token_ids), request.sampling
    token_ids = [*given.output_token_ids, *(token_id for entry in given.output_logprobs for token_id, _ in entry.top)]
    if wrong := [token_id for token_id in token_ids if token_id >= vocab_size]:
        raise InvalidRequestError(
            f"{_PARAM}: token id {wrong[0]} is not in the vocabulary of {vocab_size} tokens.", param=_PARAM
        )
    if num_given > sampling.max_tokens:
        raise InvalidRequestError(
            f"{_PARAM} has {num_given} output_token_ids, and the answer may have {sampling.max_tokens} tokens.",
            param=_PARAM,
        )
    if given.num_sent > num_given:
        raise InvalidRequestError(
            f"{_PARAM}: num_sent is {given.num_sent}, but there are {num_given} output_token_ids.", param=_PARAM
        )
    if given.output_logprobs and [entry.token_id for entry in given.output_logprobs] != given.output_token_ids:
        raise InvalidRequestError(
            f"{_PARAM}: output_logprobs must have one entry for each of output_token_ids, in their order.", param=_PARAM
        )
    if sampling.logprobs is not None and given.num_sent < num_given and not given.output_logprobs:
        raise InvalidRequestError(
            f"{_PARAM} has no output_logprobs, and the request asks for log probabilities.", param=_PARAM
        )
    num_tokens = len(request.prompt.token_ids) + num_given
    if given.num_tokens > num_tokens or given.cached_tokens > num_tokens:
        raise InvalidRequestError(
            f"{_PARAM}: num_tokens is {given.num_tokens} and cached_tokens {given.cached_tokens}, but prompt and "
            f"output_token_ids have {num_tokens} tokens; send P and D the same request.",
            param=_PARAM,
        )
