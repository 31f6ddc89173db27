"""From messages or text to prompts that the engine can run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from chiasm.chat_body import check_counts
from chiasm.errors import Code, InvalidRequestError
from chiasm.http import Exchange
from chiasm.http.json_size import JsonSize
from chiasm.models.base import ItemGeometry, Message, Prompt
from chiasm.models.token_bytes import longest_token
from chiasm.server.context import GeneratingEngine, ServerContext
from chiasm.server.json_schema import check_depth
from chiasm.server.protocol import CallInMessage, ChatMessage, ChatRequest, CompletionRequest, unsupported
from chiasm.wire import UNREADABLE

_INLINE_BYTES = 8 << 10
"""Up to this size of body, tokenizing takes less time than waking a thread on a busy machine."""
_TEMPLATE_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""From roles of OpenAI's API to roles that chat templates know."""
_SHOWN_CHARACTERS = 50


# ---- chats -------------------------------------------------------------------------------------------------------------


def check_messages(request: ChatRequest, *, max_messages: int, max_parts: int) -> None:
    """Raise InvalidRequestError unless there are messages, not too many, with not too many parts, of known roles."""
    if not request.messages:
        raise InvalidRequestError("messages is empty; send at least one.", param="messages")
    parts = sum(_num_parts(message) for message in request.messages)
    check_counts(len(request.messages), parts, max_messages=max_messages, max_parts=max_parts)
    for index, message in enumerate(request.messages):
        if message.role not in _TEMPLATE_ROLES:
            raise InvalidRequestError(
                f"messages[{index}].role must be one of {', '.join(_TEMPLATE_ROLES)}, "
                f"got {message.role[:_SHOWN_CHARACTERS]!r}.",
                param="messages",
            )


def _num_parts(message: ChatMessage) -> int:
    content = message.content
    return (len(content) if isinstance(content, list) else 0) + len(message.tool_calls or ())


async def chat_prompt(
    context: ServerContext,
    exchange: Exchange,
    engine: GeneratingEngine,
    request: ChatRequest,
    items: Sequence[tuple[str, ItemGeometry]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> Prompt:
    """Render and tokenize a chat; ``items`` are its images in order, ``tools`` what the model may call.

    Raises InvalidRequestError, DeadlineExceededError.
    """
    if request.add_special_tokens:
        raise unsupported("add_special_tokens")
    continue_final = bool(request.continue_final_message)
    if continue_final and request.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot be combined.", param="continue_final_message"
        )
    check_depth(request.chat_template_kwargs, "chat_template_kwargs", param="chat_template_kwargs")

    def build() -> Prompt:
        characters = sum(len(text) for message in request.messages for text in _texts(message))
        of_tools = sum(len(json.dumps(tool, ensure_ascii=False)) for tool in tools)
        _check_length(engine, of_tools, "tools")
        _check_length(engine, characters + of_tools, "messages")
        size = JsonSize()
        return engine.processor.build_chat(
            [_template_message(message, size) for message in request.messages],
            items,
            tools=tools,
            add_generation_prompt=not continue_final and request.add_generation_prompt is not False,
            continue_final_message=continue_final,
            template_kwargs=_template_kwargs(request),
        )

    return _checked(engine, await _built(context, exchange, build), "messages")


def _template_kwargs(request: ChatRequest) -> dict[str, Any]:
    """Return what the chat template is told besides the messages: the client's own values, and with them, as in vLLM, how much
    the model should reason."""
    kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        kwargs["reasoning_effort"] = request.reasoning_effort
        kwargs.setdefault("enable_thinking", request.reasoning_effort != "none")
    return kwargs


def _texts(message: ChatMessage) -> list[str]:
    if isinstance(message.content, list):
        return [part.text for part in message.content if part.text is not None]
    return [message.content] if message.content else []


def _template_message(message: ChatMessage, size: JsonSize) -> Message:
    """Return the message as chat templates expect it. ``size`` counts what all arguments of calls become."""
    result: Message = {"role": _TEMPLATE_ROLES[message.role], "content": _template_content(message)}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
    if message.role == "assistant" and reasoning is not None:
        result |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if message.tool_calls:
        result["tool_calls"] = [_template_call(call, size) for call in message.tool_calls]
    return result


def _template_content(message: ChatMessage) -> str | list[dict[str, str]]:
    if not isinstance(message.content, list):
        return message.content or ""
    return [
        {"type": "text", "text": part.text or ""} if part.type == "text" else {"type": "image"}
        for part in message.content
    ]


def _template_call(call: CallInMessage, size: JsonSize) -> Message:
    """Return the call with its arguments decoded: a JSON string in requests, an object in templates."""
    arguments = call.function.arguments or "{}"
    if isinstance(arguments, str):
        size.add(arguments.encode(errors="replace"))
        with contextlib.suppress(*UNREADABLE, UnicodeEncodeError):
            arguments = msgspec.json.decode(arguments)
            check_depth(arguments, "The arguments of a call", param="messages")
    return {
        "id": call.id or "",
        "type": call.type or "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


# ---- text completions --------------------------------------------------------------------------------------------------


def given_prompts(request: CompletionRequest, *, max_prompts: int) -> list[str | list[int]]:
    """Return the prompts of a text completion, as texts or token ids. Raises InvalidRequestError."""
    given = request.prompt
    if isinstance(given, str):
        return [given]
    token_ids = [element for element in given if isinstance(element, int)]
    if given and len(token_ids) == len(given):
        return [token_ids]
    prompts = [element for element in given if not isinstance(element, int)]
    if not given or len({type(element) for element in given}) > 1:
        raise InvalidRequestError(
            "prompt must be a string, a list of strings, a list of token ids, or a list of such lists, and not empty.",
            param="prompt",
        )
    if len(prompts) > max_prompts:
        raise InvalidRequestError(f"There are {len(prompts)} prompts and {max_prompts} is the limit.", param="prompt")
    return prompts


async def completion_prompt(
    context: ServerContext,
    exchange: Exchange,
    engine: GeneratingEngine,
    request: CompletionRequest,
    given: str | list[int],
) -> Prompt:
    """Return one of the prompts of a text completion. Raises InvalidRequestError, DeadlineExceededError."""

    def build() -> Prompt:
        if not isinstance(given, str):
            if len(given) >= engine.max_model_len:
                raise _too_long(str(len(given)), engine.max_model_len, "prompt")
            return engine.processor.build_tokens(given)
        _check_length(engine, len(given), "prompt")
        return engine.processor.build_text(given, add_special_tokens=request.add_special_tokens is not False)

    return _checked(engine, await _built(context, exchange, build), "prompt")


# ---- both --------------------------------------------------------------------------------------------------------------


async def _built(context: ServerContext, exchange: Exchange, build: Callable[[], Prompt]) -> Prompt:
    if len(exchange.body) <= _INLINE_BYTES:
        return build()
    async with exchange.until_deadline():
        return await context.in_thread(build)


def _check_length(engine: GeneratingEngine, characters: int, param: str) -> None:
    """Refuse text that cannot fit the context before time is spent on tokenizing it."""
    if characters < engine.max_model_len:
        return
    at_least = characters // longest_token(engine.processor.tokenizer)
    if at_least >= engine.max_model_len:
        raise _too_long(f"at least {at_least}", engine.max_model_len, param)


def _checked(engine: GeneratingEngine, prompt: Prompt, param: str) -> Prompt:
    """Return the prompt. Raises InvalidRequestError if it is empty or leaves no room for an answer."""
    if not prompt.token_ids:
        raise InvalidRequestError("The prompt is empty; send at least one token.", param=param)
    if len(prompt.token_ids) >= engine.max_model_len:
        raise _too_long(str(len(prompt.token_ids)), engine.max_model_len, param)
    return prompt


def _too_long(tokens: str, limit: int, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        # By the first words clients know the error, since they are OpenAI's and vLLM's: they send less, or ask another model.
        f"This model's maximum context length is {limit} tokens, answer included, and the prompt has {tokens} tokens. "
        "Shorten the prompt, or send fewer or smaller images.",
        param=param,
        code=Code.CONTEXT_LENGTH_EXCEEDED,
    )
