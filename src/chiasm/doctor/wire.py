"""The messages that a proxy sends to instances, around an image that nobody has seen before."""

from __future__ import annotations

import base64
import io
import os
import secrets
from dataclasses import dataclass
from typing import Any

from chiasm.doctor.client import Answer, Client, NoAnswerError
from chiasm.doctor.instances import Instance
from chiasm.media import identifier

CHAT = "/v1/chat/completions"
_SIDE = 64
_TOKENS = 2
_QUESTION = "What is in the image?"


@dataclass(frozen=True)
class ImageFile:
    """Random pixels: no cache holds its embedding."""

    data: bytes
    identifier: str

    @property
    def part(self) -> dict[str, Any]:
        url = f"data:image/png;base64,{base64.b64encode(self.data).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}


def fresh_image(fingerprint: str = "") -> ImageFile:
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("RGB", (_SIDE, _SIDE), os.urandom(3 * _SIDE * _SIDE)).save(file, "PNG")
    data = file.getvalue()
    return ImageFile(data, identifier(data, fingerprint=fingerprint, salt=f"chiasm doctor {secrets.token_hex(8)}"))


@dataclass(frozen=True)
class Encoded:
    """What an encoder answers."""

    metadata: dict[str, Any]
    """What sizes the image's placeholders."""
    outcome: str
    """What it did, if it says so."""


@dataclass(frozen=True)
class Prefilled:
    """What a prefill instance answers."""

    handle: dict[str, Any]
    outcome: str
    """How it came by the embedding, if it says so."""


async def encode(client: Client, encoder: Instance, image: ImageFile, timeout_seconds: float) -> Encoded:
    """Have the image encoded and published. Raises NoAnswerError."""
    body = _chat(encoder, [image.part | {"uuid": image.identifier}], max_tokens=1, stream=False)
    answer = checked(await client.post(encoder.url + CHAT, body, timeout_seconds=timeout_seconds))
    items = answer.json().get("ec_transfer_params")
    item = items.get(image.identifier) if isinstance(items, dict) else None
    if not isinstance(item, dict) or not isinstance(item.get("metadata"), dict):
        raise NoAnswerError("answered, but not that the embedding is published (no ec_transfer_params of the image)")
    return Encoded(item["metadata"], answer.outcome)


async def ask_about(
    client: Client,
    instance: Instance,
    image: ImageFile,
    metadata: dict[str, Any],
    timeout_seconds: float,
    kv_transfer_params: dict[str, Any] | None = None,
) -> Answer:
    """Ask about an image that is published, by its name and size alone. Raises NoAnswerError."""
    part = {"type": "image_embeds", "image_embeds": metadata, "uuid": image.identifier}
    options: dict[str, Any] = {"ignore_eos": True, "stream": False}
    if kv_transfer_params is not None:
        options["kv_transfer_params"] = kv_transfer_params
    tokens = 1 if kv_transfer_params and kv_transfer_params.get("do_remote_decode") else _TOKENS
    body = _chat(instance, [part, {"type": "text", "text": _QUESTION}], max_tokens=tokens, **options)
    return checked(await client.post(instance.url + CHAT, body, timeout_seconds=timeout_seconds))


async def prefill(
    client: Client, instance: Instance, image: ImageFile, metadata: dict[str, Any], timeout_seconds: float
) -> Prefilled:
    """Have P leave the KV of the question for a D. Raises NoAnswerError."""
    wanted = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    params = {"do_remote_decode": True, "do_remote_prefill": False, **wanted}
    answer = await ask_about(client, instance, image, metadata, timeout_seconds, params)
    handle = answer.json().get("kv_transfer_params")
    if not isinstance(handle, dict):
        raise NoAnswerError("answered without a handle of its KV (no kv_transfer_params)")
    return Prefilled(handle, answer.outcome)


async def ask_proxy_about(client: Client, url: str, model: str, image: ImageFile, timeout_seconds: float) -> None:
    """The same question as any client would ask it. Raises NoAnswerError."""
    content = [image.part, {"type": "text", "text": _QUESTION}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": _TOKENS, "temperature": 0}
    checked(await client.post(url + CHAT, body, timeout_seconds=timeout_seconds))


def checked(answer: Answer) -> Answer:
    """Raises NoAnswerError for an error status."""
    if answer.status != 200:
        raise NoAnswerError(f"answered HTTP {answer.status}: {answer.complaint()}")
    return answer


def _chat(instance: Instance, content: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": instance.model, "messages": messages, "temperature": 0, **options}
