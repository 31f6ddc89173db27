"""The content parts of a chat completion: how they are replaced, and how those of unknown types are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from chiasm.errors import InvalidRequestError

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
_WITH_TEXTS = {"messages", "tools", "documents", "chat_template_kwargs"}
_WITHOUT_TEXTS = {"type", "role", "uuid", "image_url", "image_embeds"}
_object = msgspec.json.Decoder(dict[str, Raw])
_objects = msgspec.json.Decoder(list[dict[str, Raw]])
_array = msgspec.json.Decoder(list[Raw])


def with_content_parts(body: bytes, replace: Callable[[Raw], bytes | Raw]) -> bytes:
    """Return the body with each content part of each message replaced by the JSON that ``replace`` returns for it.

    The body is put together from what was understood, value by value: every other value keeps its bytes, and of a key that is
    given twice the last value counts. Contents that are strings have no parts. Raises msgspec.DecodeError (of which
    ValidationError is one), UnicodeDecodeError and RecursionError if the body is not a chat completion.
    """
    members = _object.decode(body)
    messages = [_with_parts(message, replace) for message in _objects.decode(members.get("messages", b""))]
    return json_object({**members, "messages": json_array(messages)})


def content_parts(body: bytes) -> tuple[list[dict[str, Raw]], list[Raw]]:
    """Return the messages of a chat completion, and all their content parts. Raises like :func:`with_content_parts`."""
    messages = _objects.decode(_object.decode(body).get("messages", b""))
    contents = [message["content"] for message in messages if "content" in message]
    return messages, [part for one in contents if bytes(memoryview(one)[:1]) == b"[" for part in _array.decode(one)]


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


def _with_parts(message: Mapping[str, Raw], replace: Callable[[Raw], bytes | Raw]) -> bytes:
    content = message.get("content")
    if content is None or bytes(memoryview(content)[:1]) != b"[":
        return json_object(message)
    return json_object({**message, "content": json_array([replace(part) for part in _array.decode(content)])})


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
