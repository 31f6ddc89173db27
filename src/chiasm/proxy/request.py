"""Parses a request's body, and replaces its media parts.

Only what the proxy decides by is decoded. Every other value keeps the bytes that the client sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from chiasm.chat_body import refused_part, with_content_parts
from chiasm.ec_transfer import check_identifier
from chiasm.errors import Code, InvalidRequestError
from chiasm.http.untrusted import read_json
from chiasm.wire import UNREADABLE

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
"""What vLLM takes as text. The built-in engine takes only the first of them, and says so."""
_NULL = b"null"
_LONG_URL_BYTES = 4096
_SOUGHT_BYTES = 256


class MediaPart(NamedTuple):
    """One ``image_url`` part as the client sent it."""

    url: bytes
    has_uuid: bool
    verbatim: bool
    """Whether the body holds exactly these bytes, in quotes."""

    @property
    def is_lifted(self) -> bool:
        """Whether the URL is cut out before the body is taken apart."""
        return self.verbatim and len(self.url) >= _LONG_URL_BYTES


@dataclass
class Request:
    """A body, and what the proxy reads of it."""

    body: bytes
    model: str | None
    salt: str = ""
    """``cache_salt``, which keeps the identifiers of tenants apart."""
    media: list[MediaPart] = field(default_factory=list)
    """Media parts in the order in which they occur."""
    stream: bool = False

    def text_before_media(self) -> list[bytes]:
        """Return what the messages have before each media part, beginning behind the one before it.

        It ends early at a URL that the body doesn't hold as it is.
        """
        pieces: list[bytes] = []
        start = max(0, self.body.find(b'"messages"'))
        for part in self.media:
            at = self.body.find(b'"' + part.url[:_SOUGHT_BYTES], start) if part.verbatim else -1
            if at < 0:
                break
            pieces.append(self.body[start:at])
            start = at + 1 + len(part.url)
        return pieces

    def forget(self) -> None:
        """Free the memory of what was sent; the answer may take minutes."""
        self.body = b""
        self.media = []

    def with_parts(self, parts: Sequence[bytes | None]) -> bytes:
        """Return the body with each media part replaced by the JSON in ``parts``; None leaves one as it is.

        It is put together from what was parsed, value by value, so that an instance can't find anything in it that
        wasn't checked here. Of keys given twice, the last counts.
        """
        replacements = iter(parts)

        def replace(part: Raw) -> bytes | Raw:
            return part if _kind.decode(part).type in _TEXT_PARTS else next(replacements) or part

        try:
            return with_content_parts(self.body if None in parts else self._without_long_urls(), replace)
        except UNREADABLE as error:  # in what is only passed on, such as the name of a field that nobody knows
            raise InvalidRequestError(f"The body is not valid JSON: {error}.", code=Code.INVALID_JSON) from None

    def _without_long_urls(self) -> bytes:
        """Return the body without the long URLs, which are replaced anyway, so that megabytes aren't scanned level by level."""
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
        # The same bytes may occur elsewhere, such as in a text: then the wrong ones were cut out.
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
    stream: bool | None = None
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
_string = msgspec.json.Decoder(str)
_kind = msgspec.json.Decoder(_Kind)


def parse_completion(body: bytes) -> Request:
    """Parse the body of a completion. Raises InvalidRequestError."""
    parsed = _decode(_completion, body)
    return Request(body, parsed.model, parsed.cache_salt or "", stream=bool(parsed.stream))


def parse_chat(body: bytes) -> Request:
    """Parse the body of a chat completion. Raises InvalidRequestError for what is wrong whatever the instances are."""
    parsed = _decode(_chat, body)
    if not parsed.messages:
        raise InvalidRequestError("messages must contain at least one message.", param="messages")
    media = [
        _media_part(part, index, place)
        for index, message in enumerate(parsed.messages)
        if isinstance(message.content, list)
        for place, part in enumerate(message.content)
        if part.type not in _TEXT_PARTS
    ]
    if media:
        for name in ("mm_processor_kwargs", "media_io_kwargs"):
            _refuse_value(name, getattr(parsed, name), "the processor's settings are the same for all requests")
    return Request(body, parsed.model, parsed.cache_salt or "", media, bool(parsed.stream))


def with_member(body: bytes, name: bytes, value: bytes) -> bytes:
    """Return ``body``, a JSON object, with a member added at its end, where it counts even if the name occurs before."""
    head = body.rstrip()[:-1]
    comma = b"" if head.strip() == b"{" else b","
    return b'%b%b"%b":%b}' % (head, comma, name, value)


def _decode(decoder: msgspec.json.Decoder[_B], body: bytes) -> _B:
    parsed = read_json(decoder, body)
    for name in ("ec_transfer_params", "kv_transfer_params"):
        _refuse_value(name, getattr(parsed, name), "only the proxy and its instances set it")
    return parsed


def _refuse_value(name: str, value: Raw | UnsetType, why: str) -> None:
    if value is not UNSET and bytes(value) not in {_NULL, b"{}"}:
        raise InvalidRequestError(f"{name} is not accepted from clients: {why}.", param=name)


def _media_part(part: _Part, message: int, place: int) -> MediaPart:
    if part.type != "image_url":
        raise refused_part(message, place, part.type)
    if part.image_url is None:
        raise InvalidRequestError(
            f"messages[{message}].content[{place}] is an image_url part and needs an image_url with a url.",
            param="messages",
        )
    if isinstance(part.image_url, str):
        url, verbatim = part.image_url.encode(errors="replace"), False
    else:
        url, verbatim = _text_of(part.image_url.url)
    has_uuid = part.uuid is not UNSET and bytes(part.uuid) != _NULL
    if has_uuid:
        check_identifier(_string_or_none(part.uuid))
    return MediaPart(url, has_uuid, verbatim)


def _text_of(raw: Raw) -> tuple[bytes, bool]:
    """Return a JSON string's characters, and whether it holds them as they are, without escapes."""
    quoted = memoryview(raw)
    if bytes(quoted[:1]) != b'"':
        raise InvalidRequestError("The url of an image_url part must be a string.", param="messages")
    text = bytes(quoted[1:-1])
    if b"\\" in text:
        return read_json(_string, bytes(quoted)).encode(errors="replace"), False
    return text, True


def _string_or_none(raw: Raw | UnsetType) -> str | None:
    try:
        return _string.decode(raw) if isinstance(raw, Raw) else None
    except UNREADABLE:
        return None
