"""What the proxy reads of a request's body, and how it puts another media part in a part's place.

Only what decides the request's way is decoded. Every other value keeps the bytes that the client sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from chiasm.ec_transfer import check_identifier
from chiasm.errors import InvalidRequestError

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
_PATH = re.compile(r" - at `\$\.?([A-Za-z_]+)?.*`$")
_NULL = b"null"
_LONG_URL_BYTES = 4096
_SOUGHT_BYTES = 256


class MediaPart(NamedTuple):
    """One ``image_url`` part as the client sent it."""

    url: bytes
    has_uuid: bool
    verbatim: bool
    """Whether the body holds the URL's bytes just so, in quotes."""

    @property
    def is_lifted(self) -> bool:
        return self.verbatim and len(self.url) >= _LONG_URL_BYTES


@dataclass
class Request:
    """A body, and what decides its way."""

    body: bytes
    model: str | None
    salt: str = ""
    """What keeps a tenant's names apart from others' (``cache_salt``)."""
    media: list[MediaPart] = field(default_factory=list)
    """Media parts in the order in which they occur."""

    def forget(self) -> None:
        """Let go of what was sent; an answer may take minutes."""
        self.body = b""
        self.media = []

    def with_parts(self, parts: Sequence[bytes | None]) -> bytes:
        """The body with each media part replaced by the JSON of ``parts``; None leaves one as it is.

        It is put together from what was understood, value by value, so that an instance can find nothing in it that
        wasn't checked here. Keys given twice count once, as the last.
        """
        replacements = iter(parts)
        members = _raw_object.decode(self.body if None in parts else self._without_long_urls())
        messages = [_with_content(message, replacements) for message in _raw_objects.decode(members["messages"])]
        return json_object({**members, "messages": _array(messages)})

    def _without_long_urls(self) -> bytes:
        """The body without the media that is replaced anyway, so that megabytes aren't scanned level by level."""
        if not any(part.is_lifted for part in self.media):
            return self.body
        pieces: list[bytes] = []
        start = 0
        for part in self.media:
            if not part.is_lifted:
                continue
            at = self.body.find(b'"' + part.url[:_SOUGHT_BYTES], start)
            end = at + 1 + len(part.url)
            if at < 0 or not self.body.startswith(part.url, at + 1) or self.body[end : end + 1] != b'"':
                return self.body
            pieces.append(self.body[start:at])
            start = end + 1
        pieces.append(self.body[start:])
        body = b'""'.join(pieces)
        # The same words may stand elsewhere, say in a text: then something else was cut out.
        found = [part.url for part in parse_chat(body).media]
        return body if found == [b"" if part.is_lifted else part.url for part in self.media] else self.body


class _ImageUrl(msgspec.Struct):
    url: Raw


class _Part(msgspec.Struct):
    type: str
    image_url: _ImageUrl | str | None = None
    uuid: Raw | UnsetType = UNSET


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None  # only its type is looked at
    cache_salt: str | None = None
    ec_transfer_params: Raw | UnsetType = UNSET
    kv_transfer_params: Raw | UnsetType = UNSET


class _ChatBody(_Body, kw_only=True):
    messages: list[_Message]
    mm_processor_kwargs: Raw | UnsetType = UNSET
    media_io_kwargs: Raw | UnsetType = UNSET


class _Kind(msgspec.Struct):
    type: str = ""


_B = TypeVar("_B", bound=_Body)

_chat = msgspec.json.Decoder(_ChatBody)
_completion = msgspec.json.Decoder(_Body)
_raw_object = msgspec.json.Decoder(dict[str, Raw])
_raw_objects = msgspec.json.Decoder(list[dict[str, Raw]])
_raw_list = msgspec.json.Decoder(list[Raw])
_string = msgspec.json.Decoder(str)
_kind = msgspec.json.Decoder(_Kind)


def parse_completion(body: bytes) -> Request:
    """Raises InvalidRequestError."""
    parsed = _decode(_completion, body)
    return Request(body, parsed.model)


def parse_chat(body: bytes) -> Request:
    """Raises InvalidRequestError for everything that is known to be wrong without asking an instance."""
    parsed = _decode(_chat, body)
    if not parsed.messages:
        raise InvalidRequestError("messages must hold at least one message", param="messages")
    media = [
        _media_part(part)
        for message in parsed.messages
        if isinstance(message.content, list)
        for part in message.content
        if part.type not in _TEXT_PARTS
    ]
    if media:
        for name in ("mm_processor_kwargs", "media_io_kwargs"):
            _refuse_value(name, getattr(parsed, name), "settings of the processor are the same for all requests")
    return Request(body, parsed.model, parsed.cache_salt or "", media)


def with_member(body: bytes, name: bytes, value: bytes) -> bytes:
    """``body``, a JSON object, with one member more at its end: it counts, should there be another of this name."""
    head = body.rstrip()[:-1]
    comma = b"" if head.strip() == b"{" else b","
    return b'%b%b"%b":%b}' % (head, comma, name, value)


def _decode(decoder: msgspec.json.Decoder[_B], body: bytes) -> _B:
    try:
        parsed = decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        match = _PATH.search(message)
        raise InvalidRequestError(f"the body is not a valid request: {message}", param=match and match[1]) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply", code="invalid_json") from None
    for name in ("ec_transfer_params", "kv_transfer_params"):
        _refuse_value(name, getattr(parsed, name), "it is for instances to set")
    return parsed


def _refuse_value(name: str, value: Raw | UnsetType, why: str) -> None:
    if value is not UNSET and bytes(value) not in {_NULL, b"{}"}:
        raise InvalidRequestError(f"{name} is not taken here: {why}", param=name)


def _media_part(part: _Part) -> MediaPart:
    if part.type == "image_embeds":
        raise InvalidRequestError(
            "image_embeds parts are not taken from clients; send the image as image_url", param="messages"
        )
    if part.type != "image_url":
        raise InvalidRequestError(
            f"content parts of type {part.type[:40]!r} are not supported; text and image_url are", param="messages"
        )
    if part.image_url is None:
        raise InvalidRequestError("an image_url part needs an image_url with a url", param="messages")
    if isinstance(part.image_url, str):
        url, verbatim = part.image_url.encode(errors="replace"), False
    else:
        url, verbatim = _text_of(part.image_url.url)
    has_uuid = part.uuid is not UNSET and bytes(part.uuid) != _NULL
    if has_uuid:
        check_identifier(_string_or_none(part.uuid))
    return MediaPart(url, has_uuid, verbatim)


def _text_of(raw: Raw) -> tuple[bytes, bool]:
    """A JSON string's characters, and whether they stand in it as they are."""
    quoted = memoryview(raw)
    if bytes(quoted[:1]) != b'"':
        raise InvalidRequestError("the url of an image_url part must be a string", param="messages")
    text = bytes(quoted[1:-1])
    if b"\\" in text:
        return _string.decode(raw).encode(errors="replace"), False
    return text, True


def _string_or_none(raw: Raw | UnsetType) -> str | None:
    try:
        return _string.decode(raw) if isinstance(raw, Raw) else None
    except msgspec.ValidationError:
        return None


def _with_content(message: dict[str, Raw], replacements: Iterator[bytes | None]) -> bytes:
    content = message.get("content")
    if content is None or bytes(memoryview(content)[:1]) != b"[":
        return json_object(message)
    parts = [
        part if _kind.decode(part).type in _TEXT_PARTS else next(replacements) or part
        for part in _raw_list.decode(content)
    ]
    return json_object({**message, "content": _array(parts)})


def json_object(members: Mapping[str, Raw | bytes]) -> bytes:
    """A JSON object of these members, whose values are JSON."""
    return b"{" + b",".join([msgspec.json.encode(key) + b":" + bytes(value) for key, value in members.items()]) + b"}"


def _array(values: Sequence[Raw | bytes]) -> bytes:
    return b"[" + b",".join([bytes(value) for value in values]) + b"]"
