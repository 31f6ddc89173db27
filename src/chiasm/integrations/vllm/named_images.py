"""Names of images, and embeddings in place of images, in requests to vLLM's APIs of responses and messages.

Unlike chats, these APIs have no field for either. But vLLM makes a chat of such a request, and what its parser of chats gets
for an image is the URL. So the middleware gives each image a stand-in for a URL, which is random, and the parser finds behind
it what the image's part said. The stand-ins are known to the request alone: no client can write one that means anything.
"""

from __future__ import annotations

import functools
import logging
import secrets
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from chiasm.chat_body import IMAGE_TYPES, json_object, with_content_parts
from chiasm.wire import RESPONSES_PATH, UNREADABLE

_logger = logging.getLogger(__name__)
_SCHEME = "chiasm-image:"
_fields = msgspec.json.Decoder(dict[str, Raw])


class NamedImage(NamedTuple):
    """What the content part of a chat says about an image that has a name."""

    uuid: str
    url: str | None
    """None if its embedding takes its place."""
    embeds: Any
    """What sizes the embedding's placeholders."""


Named = Mapping[str, NamedImage]
NOTHING_NAMED: Named = MappingProxyType({})
_named: ContextVar[Named] = ContextVar("chiasm_named_images", default=NOTHING_NAMED)


def with_stand_ins(body: bytes, path: str, urls: Mapping[bytes, bytes]) -> tuple[bytes, Named]:
    """Return a body of ``path``, one of ``IMAGE_TYPES``, as vLLM understands it, and what its stand-ins stand for.

    In it, images have the content parts of chats if they have names: ``image_embeds``, or ``image_url`` with a ``uuid``.
    ``urls`` are those that were lifted out of it. A body that isn't understood is returned as it is, for vLLM to refuse.
    """
    named: dict[str, NamedImage] = {}
    secret = secrets.token_hex(16)

    def with_stand_in(part: Raw) -> bytes | Raw:
        fields = _fields.decode(part)
        if msgspec.json.decode(fields.get("type", b'""')) not in ("image_embeds", "image_url"):
            return part
        image = _named_image(fields, urls)
        if image is None:
            return part
        stand_in = f"{_SCHEME}{secret}-{len(named)}"
        named[stand_in] = image
        members: dict[str, bytes | Raw] = {"type": msgspec.json.encode(IMAGE_TYPES[path])}
        if path == RESPONSES_PATH:
            members["image_url"] = msgspec.json.encode(stand_in)
            members |= {"detail": fields["detail"]} if "detail" in fields else {}
        else:
            members["source"] = msgspec.json.encode({"type": "url", "url": stand_in})
        return json_object(members)

    try:
        rewritten = with_content_parts(body, with_stand_in, path)
    except UNREADABLE:
        return body, NOTHING_NAMED
    return (rewritten, named) if named else (body, NOTHING_NAMED)


def _named_image(fields: Mapping[str, Raw], urls: Mapping[bytes, bytes]) -> NamedImage | None:
    """Return what a part says; None if it has no name, which vLLM refuses."""
    uuid = msgspec.json.decode(fields.get("uuid", b"null"))
    if not isinstance(uuid, str):
        return None
    if "image_embeds" in fields:
        return NamedImage(uuid, None, msgspec.json.decode(fields["image_embeds"]))
    image = msgspec.json.decode(fields.get("image_url", b"null"))
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        return None
    given = url.encode()
    return NamedImage(uuid, urls.get(given, given).decode(), None)


def note_named(named: Named) -> None:
    """Let the parser find what the request that is being handled says about its images."""
    _named.set(named)


@functools.cache
def resolve_stand_ins() -> bool:
    """Let vLLM's parser of chats resolve stand-ins; return whether it can."""
    try:
        from vllm.exceptions import VLLMValidationError
        from vllm.renderers.chat_utils import AsyncMultiModalItemTracker

        # The parser has another module in 0.33 than in 0.32. Wherever it is, what makes it has it at hand.
        Parser: Any = sys.modules[AsyncMultiModalItemTracker.__module__].AsyncMultiModalContentParser
        parse, _ = Parser.parse_image, Parser.parse_image_embeds
    except (ImportError, AttributeError) as error:
        _logger.warning(
            "Images in requests to /v1/responses and /v1/messages can't be encoded apart, because chiasm doesn't know this "
            "version of vLLM: %s",
            error,
        )
        return False

    @functools.wraps(parse)
    def resolve(self: Any, image_url: str | None, uuid: str | None = None) -> None:
        if not (isinstance(image_url, str) and image_url.startswith(_SCHEME)):
            parse(self, image_url, uuid)
            return
        image = _named.get().get(image_url)
        if image is None:
            raise VLLMValidationError(
                "An image of an earlier request is not kept; send the whole conversation.", parameter="input"
            )
        if image.url is None:
            self.parse_image_embeds(image.embeds, image.uuid)
        else:
            parse(self, image.url, image.uuid)

    Parser.parse_image = resolve
    return True
