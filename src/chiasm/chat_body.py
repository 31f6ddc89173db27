"""The content parts of a chat completion: how they are replaced, and how those of unknown types are refused.

Those of the APIs of responses and messages, which vLLM serves, are found at the places where vLLM reads images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from chiasm.errors import InvalidRequestError
from chiasm.wire import CHAT_PATH, COUNT_TOKENS_PATH, MESSAGES_PATH, RESPONSES_PATH

MAX_MESSAGES = 1024
"""Messages in one chat."""
MAX_PARTS = 4096
"""Content parts and calls of tools in one chat, over all its messages."""
_AS_TEXT = 'Send it as text: {"type": "text", "text": "…"}.'
_AS_IMAGE = 'Send an image as {"type": "image_url", "image_url": {"url": "…"}}.'
_NO_AUDIO = "Audio is not supported; leave it out."
_NO_VIDEO = f"Video is not supported; leave it out, or send some of its frames as images. {_AS_IMAGE}"
_NO_FILES = f"Files are not supported. {_AS_TEXT} {_AS_IMAGE}"
_ADVICE = {
    **dict.fromkeys(("input_text", "output_text", "refusal", "thinking", "reasoning"), _AS_TEXT),
    **dict.fromkeys(("input_image", "image", "image_pil", "image_file", "image_embeds"), _AS_IMAGE),
    **dict.fromkeys(("input_audio", "audio_url", "audio", "audio_embeds"), _NO_AUDIO),
    **dict.fromkeys(("video_url", "video", "input_video"), _NO_VIDEO),
    **dict.fromkeys(("file", "input_file", "document"), _NO_FILES),
}
_SHOWN_CHARACTERS = 50
IMAGE_TYPES = {RESPONSES_PATH: "input_image", MESSAGES_PATH: "image", COUNT_TOKENS_PATH: "image"}
"""The type of the content parts that are images, by path."""
_WITH_TEXTS = {"messages", "tools", "documents", "chat_template_kwargs", "input", "instructions", "system"}
_WITHOUT_TEXTS = {"type", "role", "uuid", "image_url", "image_embeds"}
_object = msgspec.json.Decoder(dict[str, Raw])
_objects = msgspec.json.Decoder(list[dict[str, Raw]])
_array = msgspec.json.Decoder(list[Raw])
Replace = Callable[[Raw], bytes | Raw]


def with_content_parts(body: bytes, replace: Replace, path: str = CHAT_PATH) -> bytes:
    """Return the body with each content part of each message replaced by the JSON that ``replace`` returns for it.

    The body is put together from what was understood, value by value: every other value keeps its bytes, and of a key that is
    given twice the last value counts. Contents that are strings have no parts; at the paths of ``IMAGE_TYPES``, neither have
    those of which vLLM reads the text alone. Raises msgspec.DecodeError (of which ValidationError is one), UnicodeDecodeError
    and RecursionError if the body is not one of this path.
    """
    members = _object.decode(body)
    name, with_parts = _MESSAGES[path]
    messages = [with_parts(message, replace) for message in _objects.decode(members.get(name, b""))]
    return json_object({**members, name: json_array(messages)})


def content_parts(body: bytes, path: str = CHAT_PATH) -> tuple[list[dict[str, Raw]], list[Raw]]:
    """Return the messages of a body, and all their content parts. Raises like :func:`with_content_parts`."""
    messages = _objects.decode(_object.decode(body).get(_MESSAGES[path][0], b""))
    if path == CHAT_PATH:  # the most frequent one: nothing is put together
        contents = [message["content"] for message in messages if "content" in message]
        return messages, [part for one in contents if bytes(memoryview(one)[:1]) == b"[" for part in _array.decode(one)]
    parts: list[Raw] = []

    def note(part: Raw) -> Raw:
        parts.append(part)
        return part

    for message in messages:
        _MESSAGES[path][1](message, note)
    return messages, parts


def json_array_size(value: bytes | Raw | None) -> int:
    """Return how many elements a value has; 0 if it is no array. Raises like :func:`with_content_parts`."""
    return 0 if value is None or bytes(memoryview(value)[:1]) != b"[" else len(_array.decode(value))


def with_texts(body: bytes, change: Callable[[str], str]) -> bytes:
    """Return the body with each text of its messages, their tool calls and the template's arguments changed, in order.

    All other values keep their bytes. Raises like :func:`with_content_parts`.
    """
    members = _object.decode(body)
    for name in _WITH_TEXTS & members.keys():
        value = msgspec.json.decode(members[name])
        members[name] = Raw(msgspec.json.encode(_changed(value, change)))
    return json_object(members)


def json_object(members: Mapping[str, bytes | Raw]) -> bytes:
    """Return a JSON object whose values are JSON already."""
    pieces: list[bytes] = []
    for key, value in members.items():
        pieces += (b"," if pieces else b"{", msgspec.json.encode(key), b":", bytes(value))
    return b"".join([*pieces, b"}"] if pieces else [b"{}"])  # joining large pieces lets other threads run


def json_array(values: Sequence[bytes | Raw]) -> bytes:
    """Return a JSON array of values that are JSON already."""
    pieces: list[bytes] = []
    for value in values:
        pieces += (b"," if pieces else b"[", bytes(value))
    return b"".join([*pieces, b"]"] if pieces else [b"[]"])


def _with_parts(message: Mapping[str, Raw], replace: Replace, name: str = "content") -> bytes:
    content = message.get(name)
    if content is None or bytes(memoryview(content)[:1]) != b"[":
        return json_object(message)
    return json_object({**message, name: json_array([replace(part) for part in _array.decode(content)])})


def _with_parts_of_item(item: Mapping[str, Raw], replace: Replace) -> bytes:
    """Do it for an item of the API of responses: a message, unless it is the model's own, or what a tool has returned."""
    kind = _word(item, "type")
    if kind in ("", "message") and _word(item, "role") in ("user", "system", "developer"):
        return _with_parts(item, replace)
    if kind in ("function_call_output", "custom_tool_call_output"):
        return _with_parts(item, replace, "output")
    return json_object(item)


def _with_blocks(message: Mapping[str, Raw], replace: Replace) -> bytes:
    """Do it for a message of the API of messages: its blocks, and those in what tools have returned."""
    role = _word(message, "role")

    def with_result(block: Raw) -> bytes | Raw:
        fields = _object.decode(block)
        if _word(fields, "type") != "tool_result":
            return replace(block)
        return _with_parts(fields, replace) if role == "user" else block

    return _with_parts(message, with_result) if role in ("user", "assistant") else json_object(message)


_MESSAGES: dict[str, tuple[str, Callable[[Mapping[str, Raw], Replace], bytes]]] = {
    CHAT_PATH: ("messages", _with_parts),
    RESPONSES_PATH: ("input", _with_parts_of_item),
    MESSAGES_PATH: ("messages", _with_blocks),
    COUNT_TOKENS_PATH: ("messages", _with_blocks),
}
"""By path, the member that holds the messages, and what replaces the parts of one of them."""


def _word(fields: Mapping[str, Raw], name: str) -> str:
    """Return a member that is a string; "" for any other value."""
    value = msgspec.json.decode(fields.get(name, b'""'))
    return value if isinstance(value, str) else ""


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    if isinstance(value, dict):
        return {name: item if name in _WITHOUT_TEXTS else _changed(item, change) for name, item in value.items()}
    return value


def check_counts(messages: int, parts: int, *, max_messages: int = MAX_MESSAGES, max_parts: int = MAX_PARTS) -> None:
    """Raise InvalidRequestError if a chat has too many messages, or too many content parts and calls of tools."""
    if messages > max_messages:
        raise InvalidRequestError(f"There are {messages} messages and {max_messages} is the limit.", param="messages")
    if parts > max_parts:
        raise InvalidRequestError(
            f"The messages have {parts} content parts and calls of tools, and {max_parts} is the limit.",
            param="messages",
        )


def refused_part(message: int, place: int, kind: str) -> InvalidRequestError:
    """Return the error for a content part of a type that is not supported: place ``place`` of message ``message``."""
    advice = _ADVICE.get(kind, "The types of content parts are text and image_url.")
    return InvalidRequestError(
        f"messages[{message}].content[{place}] has the type {kind[:_SHOWN_CHARACTERS]!r}, which is not supported. {advice}",
        param="messages",
    )
