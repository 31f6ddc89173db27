"""The JSON of a chat completion, rewritten part by part: the proxy and the vLLM middleware replace image parts in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
from msgspec import Raw

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


def json_object(members: Mapping[str, bytes | Raw]) -> bytes:
    """Return a JSON object whose values are JSON already."""
    return b"{" + b",".join([msgspec.json.encode(key) + b":" + bytes(value) for key, value in members.items()]) + b"}"


def json_array(values: Sequence[bytes | Raw]) -> bytes:
    """Return a JSON array of values that are JSON already."""
    return b"[" + b",".join([bytes(value) for value in values]) + b"]"


def _with_parts(message: Mapping[str, Raw], replace: Callable[[Raw], bytes | Raw]) -> bytes:
    content = message.get("content")
    if content is None or bytes(memoryview(content)[:1]) != b"[":
        return json_object(message)
    return json_object({**message, "content": json_array([replace(part) for part in _array.decode(content)])})
