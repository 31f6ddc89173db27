"""From the fields of a request to the engine's sampling parameters.

The client's value comes first, then the checkpoint's, then OpenAI's default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chiasm.engine.request import MAX_CHOICES, MAX_TOP_LOGPROBS, SamplingParams
from chiasm.errors import InvalidRequestError
from chiasm.server.protocol import ChatRequest, CompletionRequest, GenerationFields

if TYPE_CHECKING:
    from chiasm.engine.grammar import Grammar
    from chiasm.models.base import Processor

_SAME_NAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)
MAX_ANSWER_ENTRIES = 1 << 18
"""Tokens and candidates of log probabilities that all answers of one request may have together."""
_MAX_SALT_CHARACTERS = 1024
_COMPLETION_MAX_TOKENS = 16
"""``max_tokens`` of a text completion that doesn't give it; a chat may fill the context."""


def num_choices(request: GenerationFields) -> int:
    """Return ``n``. Raises InvalidRequestError if it is out of range."""
    choices = 1 if request.n is None else request.n
    if not 1 <= choices <= MAX_CHOICES:
        raise InvalidRequestError(f"n must be between 1 and {MAX_CHOICES}, got {choices}.", param="n")
    return choices


def check_answers(answers: int, limit: int) -> None:
    """Raise InvalidRequestError if a request asks for more answers, over all its prompts, than it may ever have in a queue."""
    if answers > limit:
        raise InvalidRequestError(
            f"The request asks for {answers} answers, n for each prompt, and {limit} is the limit; send several requests.",
            param="n",
        )


def cache_salt(request: GenerationFields) -> str:
    """Return the salt that separates a tenant's cached blocks and items from others'; empty if none is given.

    Raises InvalidRequestError if it is too long.
    """
    salt = request.cache_salt or ""
    if len(salt) > _MAX_SALT_CHARACTERS:
        raise InvalidRequestError(
            f"cache_salt has {len(salt)} characters and {_MAX_SALT_CHARACTERS} is the limit.", param="cache_salt"
        )
    return salt


def sampling_params(
    request: ChatRequest | CompletionRequest,
    processor: Processor,
    grammar: Grammar | None,
    *,
    context_tokens: int,
    prompt_tokens: int,
    answers: int,
) -> SamplingParams:
    """Return how the engine samples.

    The answer follows ``grammar`` if there is one. As with vLLM, ``max_tokens`` must not exceed the context, and an answer ends
    when prompt and answer fill it. Raises InvalidRequestError for values out of range.
    """
    room_tokens = context_tokens - prompt_tokens
    values: dict[str, Any] = dict(processor.default_sampling)
    for name in _SAME_NAME:
        if (value := getattr(request, name)) is not None:
            values[name] = value
    logprobs = values["logprobs"] = _logprobs(request)
    given, default = _max_tokens(request, context_tokens)
    max_tokens = answer_tokens(given, default, answers=answers, candidates=logprobs or 0, context_tokens=context_tokens)
    values["max_tokens"] = min(max_tokens, room_tokens)
    stop = request.stop or ()
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["grammar"] = grammar
    values["stop_token_ids"] = tuple(request.stop_token_ids or ())
    params = SamplingParams(**values)
    params.check_vocabulary(processor.vocab_size)
    return params


def answer_tokens(given: int | None, default: int | None, *, answers: int, candidates: int, context_tokens: int) -> int:
    """Return how many tokens each answer may have: what is given, or the default as far as that is within the bound.

    Each token counts once, and each of its candidates. One answer without candidates may always fill the context. Raises
    InvalidRequestError if what is given is beyond the bound.
    """
    entries_per_token = answers * (1 + max(0, candidates))
    limit = max(1, MAX_ANSWER_ENTRIES // entries_per_token)
    if entries_per_token == 1:
        limit = max(limit, context_tokens)
    if given is None:
        assert default is not None
        return min(default, limit)
    if given > limit:
        raise InvalidRequestError(
            f"The answers may have {given} tokens each, which makes {given * entries_per_token} tokens and candidates of log "
            f"probabilities, and {MAX_ANSWER_ENTRIES} is the limit; ask for fewer tokens (max_tokens), answers (n) or "
            "top_logprobs.",
            param="max_tokens",
        )
    return given


def _max_tokens(request: ChatRequest | CompletionRequest, context_tokens: int) -> tuple[int | None, int]:
    """Return what the request gives, and the default."""
    name = "max_tokens"
    value = request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name = "max_completion_tokens"
        value = request.max_completion_tokens
    if value is not None and value < 1:
        raise InvalidRequestError(f"{name} must be at least 1, got {value}.", param=name)
    if value is not None and value > context_tokens:
        raise InvalidRequestError(
            f"{name} is {value}, which cannot be greater than the context of this model, {context_tokens} tokens for prompt "
            "and answer together; ask for fewer.",
            param=name,
        )
    return value, context_tokens if isinstance(request, ChatRequest) else _COMPLETION_MAX_TOKENS


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    top = request.top_logprobs or 0
    if top and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true.", param="top_logprobs")
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, got {top}.", param="top_logprobs"
        )
    return top if request.logprobs else None
