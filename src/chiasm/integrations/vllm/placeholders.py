"""An image's size in a chat completion becomes what vLLM sizes its placeholders by.

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

_EMBEDS = "image_embeds"
_EMBEDS_NAME = f'"{_EMBEDS}"'.encode()

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])


def may_name_embeddings(body: bytes) -> bool:
    """Whether it is worth to look closer."""
    return _EMBEDS_NAME in body


def with_grids(body: bytes, geometry_of: GeometryOf, *, are_named: bool) -> bytes:
    """The body with each ``image_size`` of an ``image_embeds`` part replaced; all else in it keeps its bytes.

    What is no chat completion is given back as it came, for vLLM to refuse. Raises InvalidRequestError for a bad size and,
    if embeddings ``are_named`` by what chiasm's connector looks for, for a bad name.
    """

    def with_grid(part: msgspec.Raw) -> msgspec.Raw:
        fields: dict[str, Any] = _fields.decode(part) if may_name_embeddings(bytes(part)) else {}
        embeds: Any = msgspec.json.decode(fields.get(_EMBEDS, b"null"))
        if not isinstance(embeds, dict):
            return part
        is_sized = SIZE_KEY in embeds
        if is_sized or are_named:
            check_identifier(msgspec.json.decode(fields.get("uuid", b"null")))
        return _raw({**fields, _EMBEDS: geometry_of(embeds).metadata}) if is_sized else part

    try:
        fields = _fields.decode(body)
        messages = _list.decode(fields.get("messages", b""))
        changed = [_with_parts(message, with_grid) for message in messages]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return body
    return body if changed == messages else msgspec.json.encode({**fields, "messages": changed})


def _with_parts(message: msgspec.Raw, change: Callable[[msgspec.Raw], msgspec.Raw]) -> msgspec.Raw:
    fields: dict[str, Any] = _fields.decode(message)
    content = fields.get("content")
    if content is None or not bytes(content).lstrip().startswith(b"["):
        return message
    parts = _list.decode(content)
    changed = [change(part) for part in parts]
    return message if changed == parts else _raw({**fields, "content": changed})


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
