"""Parses a request's body, and replaces its media parts.

Only what the proxy decides by is decoded. Every other value keeps the bytes that the client sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from chiasm.chat_body import IMAGE_TYPES, check_counts, json_object, refused_part, with_content_parts
from chiasm.ec_transfer import check_identifier
from chiasm.errors import Code, InvalidRequestError
from chiasm.http.json_size import INLINE_BYTES, MAX_TEXT_BYTES, check_text_size
from chiasm.http.lifted import NOTHING_LIFTED, Lifted, read_lifted
from chiasm.http.untrusted import read_json
from chiasm.wire import CHAT_PATH, UNREADABLE

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
"""What vLLM takes as text. The built-in engine takes only the first of them, and says so."""
_NULL = b"null"
_ONLY_FLEET = "only the proxy and its instances set it"
_OF_FLEET = ("ec_transfer_params", "kv_transfer_params")


class MediaPart(NamedTuple):
    """One ``image_url`` part as the client sent it."""

    url: bytes
    has_uuid: bool
    written: bytes | None
    """What the body has in its place, in quotes: the URL itself, or the stand-in for a long one. None if it has escapes."""


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
    text_characters: int = 0
    """Of all texts of a chat together, or of the prompt of a completion that has one."""
    lifted: Lifted = NOTHING_LIFTED
    """The long URLs of media parts, for which ``body`` has stand-ins."""
    kept: str = ""
    """The first member by which a body of another path names what an instance keeps between requests; empty if none does."""
    path: str = CHAT_PATH
    """Where it was sent, if its media parts can be replaced; empty if they can't."""

    @property
    def text_bytes(self) -> int:
        """The size of all but the media parts' URLs."""
        return max(0, len(self.body) - sum(len(part.written or part.url) for part in self.media))

    def text_before_media(self) -> list[bytes]:
        """Return what the messages have before each media part, beginning behind the one before it.

        It ends early at a URL that the body doesn't hold as it is.
        """
        pieces: list[bytes] = []
        start = max(0, self.body.find(b'"messages"'))  # the input of responses may begin anywhere
        for part in self.media:
            at = -1 if part.written is None else self.body.find(b'"%b"' % part.written, start)
            if part.written is None or at < 0:
                break
            pieces.append(self.body[start:at])
            start = at + 1 + len(part.written)
        return pieces

    def forget(self) -> None:
        """Free the memory of what was sent; the answer may take minutes."""
        self.body = b""
        self.media = []
        self.lifted = NOTHING_LIFTED

    async def whole_body(self) -> bytes:
        """Return the body as the client sent it."""
        return await asyncio.to_thread(self.lifted.restored, self.body) if self.lifted.urls else self.body

    async def with_parts_replaced(self, parts: Sequence[bytes | None]) -> bytes:
        """Do what ``with_parts`` does; for a large body, beside the event loop."""
        size_bytes = len(self.body) + sum(len(part) for part in parts if part is not None)
        if size_bytes <= INLINE_BYTES and not (self.lifted.urls and None in parts):
            return self.with_parts(parts)
        return await asyncio.to_thread(self.with_parts, parts)

    def with_parts(self, parts: Sequence[bytes | None]) -> bytes:
        """Return the body with each media part replaced by the JSON in ``parts``; None leaves one as it is.

        It is put together from what was parsed, value by value, so that an instance can't find anything in it that
        wasn't checked here. Of keys given twice, the last counts.
        """
        replacements = iter(parts)

        def replace(part: Raw) -> bytes | Raw:
            kind = _kind.decode(part).type
            if kind in _TEXT_PARTS if self.path == CHAT_PATH else kind != IMAGE_TYPES[self.path]:
                return part
            replacement = next(replacements)
            if replacement is None:
                return part
            return replacement if self.path == CHAT_PATH else _with_detail(replacement, part)

        try:
            body = with_content_parts(self.body, replace, self.path)
        except UNREADABLE as error:  # in what is only passed on, such as the name of a field that nobody knows
            raise InvalidRequestError(f"The body is not valid JSON: {error}.", code=Code.INVALID_JSON) from None
        return self.lifted.restored(body)


class _ImageUrl(msgspec.Struct):
    url: Raw


class _Part(msgspec.Struct):
    type: str
    text: str | None = None
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
    vllm_xargs: Raw | UnsetType = UNSET


class _CompletionBody(_Body):
    prompt: Raw = Raw()


class _ChatBody(_Body, kw_only=True):
    messages: list[_Message]
    mm_processor_kwargs: Raw | UnsetType = UNSET
    media_io_kwargs: Raw | UnsetType = UNSET


class OfFleet(Protocol):
    """A body that may have what only the fleet may give."""

    ec_transfer_params: Raw | UnsetType
    kv_transfer_params: Raw | UnsetType
    vllm_xargs: Raw | UnsetType


class WithSettings(Protocol):
    """A body that may have settings of the processor of its images."""

    mm_processor_kwargs: Raw | UnsetType
    media_io_kwargs: Raw | UnsetType


class _Kind(msgspec.Struct):
    type: str = ""
    detail: Raw | UnsetType = UNSET
    """Which the API of responses has beside an image's URL, and vLLM checks."""


_B = TypeVar("_B", bound=_Body)

_chat = msgspec.json.Decoder(_ChatBody)
_completion = msgspec.json.Decoder(_CompletionBody)
_string = msgspec.json.Decoder(str)
_kind = msgspec.json.Decoder(_Kind)
_object = msgspec.json.Decoder(dict[str, Raw])


def parse_completion(body: bytes, max_text_bytes: int = MAX_TEXT_BYTES) -> Request:
    """Parse the body of a completion. Raises InvalidRequestError, also if it is larger than ``max_text_bytes``."""
    check_text_size(body, max_text_bytes)
    parsed = _decode(_completion, body)
    prompt = _string_or_none(parsed.prompt) or ""  # of several prompts, each has its limit at the instance
    return Request(body, parsed.model, parsed.cache_salt or "", stream=bool(parsed.stream), text_characters=len(prompt))


def parse_chat(body: bytes, max_text_bytes: int = MAX_TEXT_BYTES) -> Request:
    """Parse the body of a chat completion. Raises InvalidRequestError for what is wrong whatever the instances are, and for
    more than ``max_text_bytes`` besides images in base64."""
    request, lifted = read_lifted(body, max_text_bytes, _parsed_chat, lambda found: [part.url for part in found.media])
    request.lifted = lifted
    if lifted.urls:
        request.media = [
            part._replace(url=lifted.urls[part.url], written=part.url) if part.url in lifted.urls else part
            for part in request.media
        ]
    return request


def _parsed_chat(body: bytes) -> Request:
    parsed = _decode(_chat, body)
    if not parsed.messages:
        raise InvalidRequestError("messages must contain at least one message.", param="messages")
    contents = [message.content if isinstance(message.content, list) else [] for message in parsed.messages]
    check_counts(len(contents), sum(map(len, contents)))
    media = [
        _media_part(part, index, place)
        for index, content in enumerate(contents)
        for place, part in enumerate(content)
        if part.type not in _TEXT_PARTS
    ]
    if media:
        refuse_settings(parsed)
    texts = [message.content for message in parsed.messages if isinstance(message.content, str)]
    texts += [part.text for content in contents for part in content if part.text is not None]
    return Request(
        body, parsed.model, parsed.cache_salt or "", media, bool(parsed.stream), text_characters=sum(map(len, texts))
    )


def with_member(body: bytes, name: bytes, value: bytes) -> bytes:
    """Return ``body``, a JSON object, with a member added at its end, where it counts even if the name occurs before."""
    head = body.rstrip()[:-1]
    comma = b"" if head.strip() == b"{" else b","
    return b'%b%b"%b":%b}' % (head, comma, name, value)


def refuse_fleet_values(parsed: OfFleet) -> None:
    """Raise InvalidRequestError for a body that gives what only the fleet may."""
    more = _members(parsed.vllm_xargs)  # which vLLM puts beside the two
    for name in _OF_FLEET:
        _refuse_value(name, getattr(parsed, name), _ONLY_FLEET)
        _refuse_value(f"vllm_xargs.{name}", more.get(name, UNSET), _ONLY_FLEET)


def refuse_settings(parsed: WithSettings) -> None:
    """Raise InvalidRequestError for a body with images that gives settings of their processor."""
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        _refuse_value(name, getattr(parsed, name), "the processor's settings are the same for all requests")


def _decode(decoder: msgspec.json.Decoder[_B], body: bytes) -> _B:
    parsed = read_json(decoder, body)
    refuse_fleet_values(parsed)
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
        url, is_verbatim = part.image_url.encode(errors="replace"), False
    else:
        url, is_verbatim = _text_of(part.image_url.url)
    has_uuid = part.uuid is not UNSET and bytes(part.uuid) != _NULL
    if has_uuid:
        check_identifier(_string_or_none(part.uuid))
    return MediaPart(url, has_uuid, url if is_verbatim else None)


def _with_detail(replacement: bytes, part: Raw) -> bytes:
    """Return a part with the ``detail`` of the one that it replaces, if that has one."""
    detail = _kind.decode(part).detail
    return (
        replacement if isinstance(detail, UnsetType) else json_object({**_object.decode(replacement), "detail": detail})
    )


def _text_of(raw: Raw) -> tuple[bytes, bool]:
    """Return a JSON string's characters, and whether it holds them as they are, without escapes."""
    quoted = memoryview(raw)
    if bytes(quoted[:1]) != b'"':
        raise InvalidRequestError("The url of an image_url part must be a string.", param="messages")
    text = bytes(quoted[1:-1])
    if b"\\" in text:
        return read_json(_string, bytes(quoted)).encode(errors="replace"), False
    return text, True


def _members(raw: Raw | UnsetType) -> dict[str, Raw]:
    """Return an object's members; none of another value."""
    try:
        return _object.decode(raw) if isinstance(raw, Raw) else {}
    except UNREADABLE:
        return {}


def _string_or_none(raw: Raw | UnsetType) -> str | None:
    try:
        return _string.decode(raw) if isinstance(raw, Raw) else None
    except UNREADABLE:
        return None
