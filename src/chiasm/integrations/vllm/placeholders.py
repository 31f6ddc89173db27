"""A picture's size in a chat completion becomes what vLLM sizes its placeholders by.

vLLM takes ``image_grid_thw``, which an encoder's answer holds; chiasm's proxy knows height and width before that. So the
proxy sends ``{"image_size": [height, width]}``, and this file works out the grid as the encoder will.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from chiasm.ec_transfer import check_identifier
from chiasm.models.base import ItemGeometry, Metadata
from chiasm.models.families.base import SIZE_KEY

GeometryOf = Callable[[Metadata], ItemGeometry]

_SIZE_NAME = f'"{SIZE_KEY}"'.encode()

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])


def may_hold_sizes(body: bytes) -> bool:
    """Whether it is worth to look closer."""
    return _SIZE_NAME in body


def with_grids(body: bytes, geometry_of: GeometryOf) -> bytes:
    """The body with each ``image_size`` of an ``image_embeds`` part replaced; all else in it keeps its bytes.

    What is no chat completion is given back as it came, for vLLM to refuse. Raises InvalidRequestError for a bad size or
    name of a picture.
    """
    try:
        fields = _fields.decode(body)
        messages = _list.decode(fields.get("messages", b""))
        changed = [_with_grids(message, geometry_of) for message in messages]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return body
    return body if changed == messages else msgspec.json.encode({**fields, "messages": changed})


def _with_grids(message: msgspec.Raw, geometry_of: GeometryOf) -> msgspec.Raw:
    fields: dict[str, Any] = _fields.decode(message)
    content = fields.get("content")
    if content is None or not bytes(content).lstrip().startswith(b"["):
        return message
    parts = _list.decode(content)
    changed = [_with_grid(part, geometry_of) for part in parts]
    return message if changed == parts else _raw({**fields, "content": changed})


def _with_grid(part: msgspec.Raw, geometry_of: GeometryOf) -> msgspec.Raw:
    if not may_hold_sizes(bytes(part)):
        return part
    fields: dict[str, Any] = _fields.decode(part)
    embeds: Any = msgspec.json.decode(fields.get("image_embeds", b"null"))
    if not isinstance(embeds, dict) or SIZE_KEY not in embeds:
        return part
    check_identifier(msgspec.json.decode(fields.get("uuid", b"null")))
    return _raw({**fields, "image_embeds": geometry_of(embeds).metadata})


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
