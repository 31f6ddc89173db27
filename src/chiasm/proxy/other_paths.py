"""Requests of vLLM's other paths, which the proxy passes on without understanding them.

Only what must hold for every request is looked at: whose caches it may use, what only the fleet may give, whether it names what
an instance keeps, and whether it has images or other media. Images of responses and messages are treated like those of chats if
the instances take names for them (``wire.IMAGE_PATHS``). No others can be encoded apart: an instance that encodes itself gets
them, if the proxy has checked them as those of a chat completion, so they must be in the body, and every other instance gets
text alone. A request with a salt has no such image, because without a name it would be everybody's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec

from chiasm.chat_body import IMAGE_TYPES, check_counts, content_parts, with_content_parts
from chiasm.errors import Code, InvalidRequestError
from chiasm.http.json_size import MAX_TEXT_BYTES
from chiasm.http.lifted import Lifted, read_lifted
from chiasm.http.untrusted import read_json
from chiasm.proxy.request import MediaPart, Request, refuse_fleet_values, refuse_settings, with_member
from chiasm.wire import CHAT_PATH, RESPONSES_PATH, UNREADABLE

_HINTS = re.compile(rb"image|audio|video|file|document|media|prompt_embeds|\\u")
"""One of these is in every body with media; most bodies have none, and aren't decoded."""
_MEDIA_TYPES = frozenset(
    {
        *("image", "image_url", "input_image", "image_pil", "image_file", "image_embeds"),
        *("audio", "audio_url", "input_audio", "audio_embeds", "video", "video_url", "input_video"),
        *("file", "input_file", "document"),
    }
)
_MEDIA_KEYS = frozenset(
    {
        *(
            "image_url",
            "image_embeds",
            "image_pil",
            "input_image",
            "audio_url",
            "audio_embeds",
            "input_audio",
            "video_url",
        ),
        *("file_data", "file_id", "file_url", "images", "prompt_embeds"),
    }
)
_OPAQUE = frozenset(
    {
        "tools",
        "tool_choice",
        "response_format",
        "text",
        "metadata",
        "structured_outputs",
        "output_config",
        "output_format",
    }
)
"""Members of a body that hold schemas and the like, whose names mean nothing."""
_CALLS = frozenset({"tool_use", "server_tool_use", "function_call"})
"""Blocks whose arguments are a tool's own."""
WITHOUT_SALT = {"/v2/embed": "/v1/embeddings"}
"""Paths at which vLLM computes KV and takes no ``cache_salt``, and those that do the same with one."""
_KEPT = ("previous_response_id", "conversation", "background", "request_id")
"""Members by which a request names what an instance keeps, or by which it is kept; others could name the same."""
_NOTHING = (msgspec.UNSET, None, False, "")
_DATA = "data:"
_TAKEN = b"null"
_IMAGE_TYPE = re.compile(r"image/[a-z0-9.+-]{1,60}", re.ASCII)


class _OtherBody(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    ec_transfer_params: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    kv_transfer_params: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    vllm_xargs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    previous_response_id: Any = msgspec.UNSET
    conversation: Any = msgspec.UNSET
    background: Any = msgspec.UNSET
    request_id: Any = msgspec.UNSET
    mm_processor_kwargs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    media_io_kwargs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_other = msgspec.json.Decoder(_OtherBody)
_anything = msgspec.json.Decoder(dict[str, Any])


def parse_other(body: bytes, max_text_bytes: int = MAX_TEXT_BYTES, *, path: str) -> Request:
    """Parse a body of ``path``, one of ``wire.OTHER_PATHS``; its ``media`` are the images that it has.

    Raises InvalidRequestError for media that no instance may get like this: all but images whose bytes are in the body, and
    images with a URL that can be replaced.
    """

    def read(text: bytes) -> Request:
        return _parsed(text, path)

    request, lifted = read_lifted(
        body, max_text_bytes, read, lambda found: [part.written for part in found.media if part.written is not None]
    )
    request.lifted = lifted
    request.media = [_with_pixels(part, lifted) for part in request.media]
    return request


def media_refused(path: str) -> InvalidRequestError:
    """Return the error for images that no instance can encode, because a body of this path has them."""
    return InvalidRequestError(
        f"The images of this request to {path} are encoded only by aggregated instances of vLLM, and none is healthy; send "
        "images to /v1/chat/completions.",
        code=Code.MEDIA_NOT_SUPPORTED,
    )


def check_salted(path: str, request: Request) -> None:
    """Raise InvalidRequestError for a request with a salt that an instance wouldn't heed on this path."""
    if request.salt and path in WITHOUT_SALT:
        raise _not_kept_apart(f"{path} takes no cache_salt. Send it to {WITHOUT_SALT[path]}.")


def check_unnamed(path: str, request: Request) -> None:
    """Raise InvalidRequestError for images that can be sent only with a name, which no instance takes for them."""
    if request.salt and request.media:
        raise _not_kept_apart(f"on {path} an image of this request can't be kept apart. Send images to {CHAT_PATH}.")
    if not all(_is_in_body(part.url) for part in request.media):
        raise _unsupported()


def _not_kept_apart(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        "Requests with a cache_salt, and those of API keys with a tenant, share nothing that is cached with others, and "
        + why,
        code=Code.NOT_KEPT_APART,
    )


def kept_apart(path: str, request: Request) -> Request:
    """Return a tenant's request as one of which no instance keeps what others could ask for.

    Raises InvalidRequestError if it names what an instance keeps.
    """
    if request.kept:
        raise InvalidRequestError(
            f"{request.kept} is not accepted from API keys with a tenant, because what instances keep under such a name is not "
            "kept apart. Leave it out, and send the whole conversation.",
            param=request.kept,
            code=Code.NOT_KEPT_APART,
        )
    return replace(request, body=with_member(request.body, b"store", b"false")) if path == RESPONSES_PATH else request


def _parsed(body: bytes, path: str) -> Request:
    parsed = read_json(_other, body)
    refuse_fleet_values(parsed)
    found = list(_media(read_json(_anything, body))) if _HINTS.search(body) else []
    kept = next((name for name in _KEPT if getattr(parsed, name) not in _NOTHING), "")
    request = Request(body, parsed.model, parsed.cache_salt or "", stream=bool(parsed.stream), kept=kept, path="")
    if found:
        refuse_settings(parsed)
        placed = _placed_images(body, path) if path in IMAGE_TYPES else []
        if placed:
            found, request.path = placed, path
        request.media = [_media_part(one, may_be_elsewhere=bool(request.path)) for one in found]
    return request


def _placed_images(body: bytes, path: str) -> list[dict[str, Any]]:
    """Return the images that stand where an instance reads images, in their order; none if there are media besides.

    Raises InvalidRequestError for too many messages or parts.
    """
    images: list[dict[str, Any]] = []

    def take(part: msgspec.Raw) -> bytes | msgspec.Raw:
        one = msgspec.json.decode(part)
        if not isinstance(one, dict) or one.get("type") != IMAGE_TYPES[path]:
            return part
        images.append(one)
        return _TAKEN

    try:
        messages, parts = content_parts(body, path)
        check_counts(len(messages), len(parts))
        rest = _anything.decode(with_content_parts(body, take, path))
    except UNREADABLE:
        return []
    return [] if any(True for _ in _media(rest)) else images


def _media(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the objects in a body that are media, or that name some. They may be nested as deeply as a client likes."""
    left: list[Any] = [{name: value for name, value in body.items() if name not in _OPAQUE and name != "type"}]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            kind = value.get("type")
            is_named = isinstance(kind, str)
            if (is_named and kind in _MEDIA_TYPES) or not _MEDIA_KEYS.isdisjoint(value):
                yield value
            elif is_named and kind in _CALLS:
                left += [one for name, one in value.items() if name not in ("input", "arguments")]
            else:
                left += value.values()


def _media_part(part: dict[str, Any], *, may_be_elsewhere: bool) -> MediaPart:
    """Return an image. Raises InvalidRequestError for other media, and for an image elsewhere unless it may be."""
    source = part.get("source")
    header = ""
    written: Any = None
    if part.get("type") == "image" and isinstance(source, dict):
        _check_members(part, {"type", "source", "cache_control"})
        if source.get("type") == "base64" and _IMAGE_TYPE.fullmatch(str(source.get("media_type"))):
            header, written = f"{_DATA}{source['media_type']};base64,", source.get("data")
        elif source.get("type") == "url":
            written = source.get("url")
    elif part.get("type") in ("input_image", "image_url"):
        _check_members(part, {"type", "image_url", "detail"})
        written = part.get("image_url")
        if isinstance(written, dict):
            written, may_be_elsewhere = written.get("url"), False
    if isinstance(written, str):
        found = written.encode(errors="replace")
        url = header.encode() + found
        if _is_in_body(url) or may_be_elsewhere:
            return MediaPart(url, has_uuid=False, written=found)
    raise _unsupported()


def _with_pixels(part: MediaPart, lifted: Lifted) -> MediaPart:
    """Return an image with its own bytes in its URL, in place of a stand-in."""
    if part.written is None or part.written not in lifted.urls:
        return part
    return part._replace(url=b"".join((part.url.removesuffix(part.written), lifted.urls[part.written])))


def _is_in_body(url: bytes) -> bool:
    return url[: len(_DATA)].lower() == _DATA.encode()


def _unsupported() -> InvalidRequestError:
    return InvalidRequestError(
        "Of images, audio, video and files, only images whose bytes are in the body can be sent to this path, in base64; send "
        "the URL of an image to /v1/chat/completions.",
        code=Code.MEDIA_NOT_SUPPORTED,
    )


def _check_members(part: dict[str, Any], known: set[str]) -> None:
    """Raise InvalidRequestError for members by which an instance could find another image than the one that is checked."""
    if other := sorted(part.keys() - known):
        raise InvalidRequestError(
            f"An image has the member {other[0][:40]!r}, which is not supported on this path; leave it out.",
            code=Code.MEDIA_NOT_SUPPORTED,
        )
