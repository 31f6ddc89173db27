"""What an instance does of an answer: all of it, its beginning on a prefill instance, or the rest on a decode instance.

The field ``kv_transfer_params`` says how the parts hang together; its contract is in :mod:`chiasm.kv_transfer.params`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from msgspec.structs import replace as with_fields

from chiasm.engine.request import GenerateRequest, SamplingParams
from chiasm.errors import InvalidRequestError
from chiasm.server.protocol import GenerationFields
from chiasm.server.sampling import num_choices
from chiasm.wire import KVTransferParams, Role

PARAM = "kv_transfer_params"
_REMOTE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port", "remote_request_id")
_MAX_SEED = (1 << 63) - 1
_MAX_CREATED = 1 << 53
"""Up to here every number of JavaScript is whole."""


class Stage:
    """All of an answer: pd and aggregated instances."""

    opens = True
    """Whether the answer begins here, and with it each choice's role."""
    shows_text = True
    """Whether what comes of the prompts here belongs to the answer."""
    announces_tokens = False
    """Whether a stream tells the ids of its tokens, so that another instance could go on from any of them."""
    created: int | None = None
    """Unix time of the answer's beginning, if that was elsewhere."""

    def engine_requests(self, requests: Sequence[GenerateRequest], vocab_size: int) -> Sequence[GenerateRequest]:
        """What the engine is to do for the requests, one a prompt, that stand for the whole answer.

        Raises InvalidRequestError where what came with them cannot be theirs.
        """
        return requests

    def handle(self, handles: Sequence[KVTransferParams | None], created: int) -> KVTransferParams | None:
        """With what the answer goes on elsewhere, of what the engine says for each prompt; None if it is complete."""
        return None


class Prefill(Stage):
    """The prompt, and the first token where there is one prompt and one choice."""

    def __init__(self, request: GenerationFields, given: KVTransferParams) -> None:
        if not given.do_remote_decode:
            raise InvalidRequestError(
                "This instance only prefills, and kv_transfer_params doesn't say that the answer goes on elsewhere "
                "(do_remote_decode): send the request to the proxy.",
                param=PARAM,
            )
        if request.stream and not given.continues:
            raise InvalidRequestError(
                "This instance answers with a handle for a decode instance, which is no stream; send stream=false.",
                param="stream",
            )
        self.created = _checked_created(given)
        self.opens = not given.output_token_ids
        self._given = given
        self._streams = bool(request.stream)

    def engine_requests(self, requests: Sequence[GenerateRequest], vocab_size: int) -> Sequence[GenerateRequest]:
        given = self._given
        for request in requests:
            _check_given(given, request, vocab_size)
        if len(requests) == 1 and requests[0].num_choices == 1:
            return [replace(requests[0], kv_transfer_params=given)]
        if given.output_token_ids:
            raise InvalidRequestError("An answer of several choices cannot be resumed.", param=PARAM)
        # Each choice samples its first token for itself, at the decode instance; the one that comes of this is dropped.
        self.shows_text = False
        only_prompt = with_fields(given, continues=False)
        return [
            replace(
                request,
                num_choices=1,
                sampling=SamplingParams(max_tokens=1, temperature=0.0, seed=request.sampling.seed, ignore_eos=True),
                kv_transfer_params=only_prompt,
            )
            for request in requests
        ]

    def handle(self, handles: Sequence[KVTransferParams | None], created: int) -> KVTransferParams | None:
        if self.shows_text:
            (handle,) = handles
            if handle is None:  # the first token has ended the answer
                return None
            num_sent = len(handle.output_token_ids) if self._streams else 0
            return with_fields(handle, created=created, num_sent=num_sent)
        prompts: list[KVTransferParams] = []
        for handle in handles:
            assert handle is not None
            prompts.append(
                with_fields(
                    handle, continues=self._given.continues, output_token_ids=[], output_logprobs=[], created=created
                )
            )
        return prompts[0] if len(prompts) == 1 else KVTransferParams(prompts=prompts)


class Decode(Stage):
    """What follows on what a prefill instance has left."""

    def __init__(self, request: GenerationFields, given: KVTransferParams) -> None:
        self._handles = given.prompts or [given]
        for index, handle in enumerate(self._handles):
            _check_remote(handle, f"prompts[{index}]." if given.prompts else "")
        self.created = _checked_created(self._handles[0])
        alone = len(self._handles) == 1 and num_choices(request) == 1
        self.opens = not alone or self._handles[0].num_sent == 0
        self.announces_tokens = alone and self._handles[0].continues

    def engine_requests(self, requests: Sequence[GenerateRequest], vocab_size: int) -> Sequence[GenerateRequest]:
        if len(self._handles) != len(requests):
            raise InvalidRequestError(
                f"The request has {len(requests)} prompts and kv_transfer_params {len(self._handles)} handles; "
                "there must be one for each prompt.",
                param=PARAM,
            )
        for handle, request in zip(self._handles, requests, strict=True):
            if handle.output_token_ids and (len(requests) > 1 or request.num_choices > 1):
                raise InvalidRequestError("An answer of several choices cannot be resumed.", param=PARAM)
            _check_given(handle, request, vocab_size)
        return [
            replace(request, kv_transfer_params=handle) for handle, request in zip(self._handles, requests, strict=True)
        ]


def stage_of(role: Role, request: GenerationFields) -> Stage:
    """What an instance of ``role`` does for a request. Raises InvalidRequestError where that isn't what is asked for."""
    given = request.kv_transfer_params or KVTransferParams()
    match role:
        case Role.PREFILL:
            return Prefill(request, given)
        case Role.DECODE:
            return Decode(request, given)
    if given != KVTransferParams():
        raise InvalidRequestError(
            f"{PARAM} is not supported by this instance, which is neither prefill nor decode; leave it out.",
            param=PARAM,
        )
    return Stage()


# ---- what must hold of a handle ----------------------------------------------------------------------------------------


def _check_remote(handle: KVTransferParams, where: str) -> None:
    if not handle.do_remote_prefill:
        raise InvalidRequestError(
            f"This instance only decodes, and {PARAM} doesn't say that the prompt's KV lies elsewhere "
            f"({where}do_remote_prefill): send the request to the proxy.",
            param=PARAM,
        )
    for name in _REMOTE:
        if getattr(handle, name) in (None, "", []):
            raise InvalidRequestError(
                f"{PARAM} has no {where}{name}; send what the prefill instance said.", param=PARAM
            )
    if handle.prompts:
        raise InvalidRequestError(f"{PARAM}: {where}prompts holds handles of one prompt each.", param=PARAM)


def _checked_created(handle: KVTransferParams) -> int | None:
    if handle.created is not None and not 0 <= handle.created < _MAX_CREATED:
        raise InvalidRequestError(f"{PARAM}: created is a Unix time, and {handle.created} is none.", param=PARAM)
    return handle.created


def _check_given(given: KVTransferParams, request: GenerateRequest, vocab_size: int) -> None:
    """What came with a request's prompt must fit it; whether its KV is that of this prompt the engine knows."""
    num_given, sampling = len(given.output_token_ids), request.sampling
    token_ids = [*given.output_token_ids, *(token_id for entry in given.output_logprobs for token_id, _ in entry.top)]
    if wrong := [token_id for token_id in token_ids if token_id >= vocab_size]:
        raise InvalidRequestError(
            f"{PARAM}: token id {wrong[0]} is not in the vocabulary of {vocab_size}.", param=PARAM
        )
    if num_given > sampling.max_tokens:
        raise InvalidRequestError(
            f"{PARAM}: there are {num_given} output_token_ids already, and the answer may have {sampling.max_tokens} tokens.",
            param=PARAM,
        )
    if given.num_sent > num_given:
        raise InvalidRequestError(
            f"{PARAM}: num_sent is {given.num_sent}, of {num_given} output_token_ids.", param=PARAM
        )
    if given.output_logprobs and [entry.token_id for entry in given.output_logprobs] != given.output_token_ids:
        raise InvalidRequestError(
            f"{PARAM}: output_logprobs must have one entry for each of output_token_ids, in their order.", param=PARAM
        )
    if sampling.logprobs is not None and given.num_sent < num_given and not given.output_logprobs:
        raise InvalidRequestError(
            f"{PARAM}: the request asks for log probabilities, and output_logprobs is missing.", param=PARAM
        )
    num_tokens = len(request.prompt.token_ids) + num_given
    if given.num_tokens > num_tokens or given.cached_tokens > num_tokens:
        raise InvalidRequestError(
            f"{PARAM}: num_tokens is {given.num_tokens} and cached_tokens {given.cached_tokens}, and prompt and "
            f"output_token_ids have {num_tokens} tokens; send P and D the same request.",
            param=PARAM,
        )
    if given.seed is not None and not -_MAX_SEED <= given.seed <= _MAX_SEED:
        raise InvalidRequestError(f"{PARAM}: seed must be between {-_MAX_SEED} and {_MAX_SEED}.", param=PARAM)
