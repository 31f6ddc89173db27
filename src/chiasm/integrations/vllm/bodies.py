"""The bodies of completions on their way to vLLM: what they may cost and say, and what vLLM gets in place of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
from msgspec import Raw

from chiasm.chat_body import check_counts, content_parts, json_array_size, json_object, with_content_parts, with_texts
from chiasm.ec_transfer import check_identifier
from chiasm.errors import Code, InvalidRequestError
from chiasm.http.fleet_calls import Caller, check_fleet
from chiasm.http.json_size import check_json_size, check_text_size
from chiasm.http.lifted import read_lifted
from chiasm.integrations.vllm.health import Description
from chiasm.integrations.vllm.named_images import NOTHING_NAMED, Named, with_stand_ins
from chiasm.models.families.base import SIZE_KEY
from chiasm.server.config import ServerConfig
from chiasm.wire import CHAT_PATH, UNREADABLE

EMBEDS = "image_embeds"
EMBEDS_KEY = f'"{EMBEDS}"'.encode()
_NAME_KEY = b'"uuid"'
_JOINER = "\u2060"
"""A character without width, between which and its neighbours no line is broken."""
_OF_FLEET = ("kv_transfer_params", "ec_transfer_params")
"""Fields of a request that only the fleet may give."""
_SEVERAL = (b'"', b"[")
"""How the elements of a list of prompts begin; those of one prompt are numbers."""
_fields = msgspec.json.Decoder(dict[str, Raw])
_array = msgspec.json.Decoder(list[Raw])


def chat_for_vllm(
    body: bytes, caller: Caller, described: Description | None, placeholder: str, *, max_text_bytes: int
) -> bytes:
    """Return the body of a chat completion as vLLM gets it.

    ``described`` sizes the placeholders of embeddings; None if the body has none. ``placeholder`` stands for an image in a
    rendered chat; "" if it isn't known. Long bodies take a while, so call it beside an event loop. Raises ForbiddenError for
    what only the fleet may, PayloadTooLargeError and InvalidRequestError for a body beyond the limits of chiasm's own
    instances, and InvalidRequestError for a bad size or name of an embedding.
    """
    _, lifted = read_lifted(body, max_text_bytes, _image_urls, lambda urls: urls)
    text = lifted.body
    if not caller.is_of_fleet:
        check_stranger(text, caller)
    if described is not None:
        text = _with_grids(text, described)
    text = _without_placeholders(text, placeholder)
    return body if text is lifted.body else lifted.restored(text)


def other_for_vllm(
    path: str, body: bytes, described: Description | None, placeholder: str, *, max_text_bytes: int
) -> tuple[bytes, Named]:
    """Do what :func:`chat_for_vllm` does for a body of one of ``wire.IMAGE_PATHS``, which only the fleet may send.

    Returns the images that have names too.
    """
    _, lifted = read_lifted(body, max_text_bytes, partial(_image_urls, path=path), lambda urls: urls)
    text, named = lifted.body, NOTHING_NAMED
    if described is not None:
        text = _with_grids(text, described, path)
    if _NAME_KEY in text:
        text, named = with_stand_ins(text, path, lifted.urls)
    text = _without_placeholders(text, placeholder)
    return body if text is lifted.body else lifted.restored(text), named


def check_completion(body: bytes, caller: Caller, *, max_text_bytes: int) -> None:
    """Raise a ChiasmError for a text completion that is beyond the limits, or does what only the fleet may."""
    check_text_size(body, max_text_bytes)
    check_json_size(body)
    if not caller.is_of_fleet:
        check_stranger(body, caller)
    try:
        prompt = _fields.decode(body).get("prompt", Raw(b"null"))
        prompts = _array.decode(prompt) if bytes(memoryview(prompt)[:1]) == b"[" else []
    except UNREADABLE:
        return  # vLLM refuses it
    if len(prompts) > ServerConfig.max_prompts and bytes(memoryview(prompts[0])[:1]) in _SEVERAL:
        raise InvalidRequestError(
            f"There are {len(prompts)} prompts and {ServerConfig.max_prompts} is the limit.", param="prompt"
        )


def check_stranger(body: bytes, caller: Caller) -> None:
    """Raise ForbiddenError for a body that does what only the fleet may, InvalidRequestError for one that isn't understood.

    vLLM understands some JSON that isn't valid, so that it can't be left to refuse it.
    """

    def check(part: Raw) -> Raw:
        fields = _fields.decode(part) if bytes(part).startswith(b"{") else {}  # vLLM takes bare strings too
        if _is_given(fields, "uuid"):
            check_fleet(caller, "Naming an image (uuid)")
        if EMBEDS in fields:
            check_fleet(caller, f"Asking about an image by its name ({EMBEDS})")
        return part

    try:
        fields = _fields.decode(body)
        more = _members(fields.get("vllm_xargs", b""))  # which vLLM puts beside those of _OF_FLEET
        if "messages" in fields:
            with_content_parts(body, check)
    except UNREADABLE:
        raise InvalidRequestError("The body is not valid JSON of a completion.", code=Code.INVALID_JSON) from None
    for name in _OF_FLEET:
        if _is_given(fields, name) or _is_given(more, name):
            check_fleet(caller, f"Handing over what instances have computed ({name})")


def _image_urls(body: bytes, path: str = CHAT_PATH) -> list[bytes]:
    """Return the URLs of images, or their base64, as the body has them. Raises InvalidRequestError for too much of anything."""
    check_json_size(body)
    try:
        messages, parts = content_parts(body, path)
        calls = sum(json_array_size(message.get("tool_calls")) for message in messages)
        check_counts(len(messages), len(parts) + calls)
        return [url for part in parts if (url := _url_of(part))]
    except UNREADABLE:
        return []  # vLLM refuses it


def _url_of(part: Raw) -> bytes:
    """Return the URL or base64 of an image part, without its quotes; nothing for any other part."""
    fields = _members(part)
    image: Raw | bytes = fields.get("image_url", b"")
    if bytes(memoryview(image)[:1]) == b"{":
        image = _members(image).get("url", b"")
    elif "source" in fields:
        image = _members(fields["source"]).get("data", b"")
    return bytes(image)[1:-1] if bytes(memoryview(image)[:1]) == b'"' else b""


def _members(value: Raw | bytes) -> Mapping[str, Raw]:
    return _fields.decode(value) if bytes(memoryview(value)[:1]) == b"{" else {}


def _is_given(fields: Mapping[str, Raw], name: str) -> bool:
    return name in fields and bytes(fields[name]) != b"null"


def _with_grids(body: bytes, described: Description, path: str = CHAT_PATH) -> bytes:
    """Return the body with each ``image_size`` of an ``image_embeds`` part replaced by what vLLM sizes placeholders by.

    vLLM takes ``image_grid_thw``, which is in the encoder's answer. chiasm's proxy knows height and width before that, and the
    grid follows from them. A body that isn't a chat completion is returned as it is, for vLLM to refuse. Raises
    InvalidRequestError for a bad size, for one whose embedding can never be brought in, and for a bad name of an embedding that
    chiasm's connector would look for.
    """
    is_changed = False

    def with_grid(part: Raw) -> bytes | Raw:
        nonlocal is_changed
        fields: dict[str, Any] = _fields.decode(part) if EMBEDS_KEY in bytes(part) else {}
        embeds: Any = msgspec.json.decode(fields.get(EMBEDS, b"null"))
        if not isinstance(embeds, dict):
            return part
        is_sized = SIZE_KEY in embeds
        if is_sized or described.has_connector:
            check_identifier(msgspec.json.decode(fields.get("uuid", b"null")))
        if not is_sized:
            return part
        if described.processor is None:
            raise InvalidRequestError(
                "This instance cannot tell how many tokens an image of this size takes; send the metadata of the encoder's "
                "answer, or the image.",
                param="messages",
            )
        is_changed = True
        geometry = described.processor.geometry_of_metadata(embeds)
        described.check_rows(len(geometry.rows))
        return json_object({**fields, EMBEDS: msgspec.json.encode(geometry.metadata)})

    try:
        rewritten = with_content_parts(body, with_grid, path)
    except UNREADABLE:
        return body
    return rewritten if is_changed else body


def _without_placeholders(body: bytes, placeholder: str) -> bytes:
    """Return the body with an invisible character in each placeholder of an image that a text contains.

    vLLM would put the embedding of an image there, and leave the image's own place empty.
    """
    if not placeholder or not (placeholder[0].encode() in body or b"\\u" in body):
        return body
    before, is_changed = "", False

    def broken(text: str) -> str:
        nonlocal before, is_changed
        changed = text.replace(placeholder, placeholder[0] + _JOINER + placeholder[1:])
        if placeholder in before + changed:  # a template may join two texts
            changed = _JOINER + changed
        is_changed = is_changed or changed != text
        before = (before + changed)[1 - len(placeholder) :]
        return changed

    try:
        rewritten = with_texts(body, broken)
    except UNREADABLE:
        return body
    return rewritten if is_changed else body
