"""The messages that a proxy sends to instances, about an image that nobody has seen before, and what instances count."""

from __future__ import annotations

import base64
import io
import math
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from chiasm.doctor.client import Client, NoAnswerError, Response
from chiasm.doctor.observed import Observed
from chiasm.media import identifier
from chiasm.prometheus import read_samples, total
from chiasm.wire import CHAT_PATH, PLACES_PATH, ECItem, EmbeddingPlaces

_SIDE = 64
_TOKENS = 2
_QUESTION = {"type": "text", "text": "What is in the image?"}
_PREFILL_PARAMS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    **dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")),
}
"""With fields that are null, as vLLM expects it."""
_CHIASM = ("chiasm_images_encoded_total", "chiasm_ec_loads_total", "chiasm_kv_transfers_total")
# vLLM's instances encode an item themselves if their connector doesn't find it.
_VLLM = ("vllm:chiasm_ec_misses_total", "vllm:chiasm_ec_loads_total", "vllm:nixl_xfer_time_seconds_count")


# ---- messages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFile:
    """Random pixels, so no cache holds its embedding."""

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


class Encoded(NamedTuple):
    """An image whose embedding an encoder has published."""

    image: ImageFile
    metadata: msgspec.Raw
    """What sizes the image's placeholders."""
    outcome: str
    """What the encoder did, if it says so."""


class Prefilled(NamedTuple):
    """What a prefill instance answers."""

    handle: dict[str, msgspec.Raw]
    outcome: str
    """How it got the embedding, if it says so."""


class _EncoderAnswer(msgspec.Struct):
    ec_transfer_params: dict[str, ECItem] | None = None


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: dict[str, msgspec.Raw] | None = None
    """Passed on as it is: vLLM's fields have other types where its KV cache has several groups."""


async def encode(client: Client, encoder: Observed) -> Encoded:
    """Have a fresh image encoded and published. Raises NoAnswerError."""
    image = fresh_image(encoder.health.fingerprint)
    content = [image.part | {"uuid": image.identifier}]
    response = await _chat(client, encoder.url, encoder.health.model, content, max_tokens=1, stream=False)
    item = (response.read(_EncoderAnswer).ec_transfer_params or {}).get(image.identifier)
    if item is None:
        raise NoAnswerError(
            "answered, but not that it has published the embedding (no ec_transfer_params of the image)"
        )
    return Encoded(image, item.metadata, response.outcome)


async def tell_place(client: Client, reader: Observed, encoder: Observed, encoded: Encoded) -> None:
    """Tell who will be asked about an image where its embedding is, if it is in the encoder's memory. Raises NoAnswerError."""
    if encoder.health.ec_place is not None:
        places = EmbeddingPlaces(places={encoded.image.identifier: encoder.health.ec_place})
        await client.post(reader.url + PLACES_PATH, places)


async def ask(
    client: Client, instance: Observed, encoded: Encoded, handle: dict[str, msgspec.Raw] | None = None
) -> Response:
    """Ask about an image that is published, by its name and size alone. Raises NoAnswerError."""
    params = {} if handle is None else {"kv_transfer_params": handle}
    return await _ask(client, instance, encoded, max_tokens=_TOKENS, **params)


async def prefill(client: Client, instance: Observed, encoded: Encoded) -> Prefilled:
    """Have a prefill instance hold the KV of the question for a decode instance. Raises NoAnswerError."""
    response = await _ask(client, instance, encoded, max_tokens=1, kv_transfer_params=_PREFILL_PARAMS)
    handle = response.read(_PrefillAnswer).kv_transfer_params
    if not handle:
        raise NoAnswerError("answered without a handle of its KV (kv_transfer_params)")
    return Prefilled(handle, response.outcome)


async def ask_with_pixels(client: Client, url: str, model: str) -> None:
    """Ask about a fresh image as any client would. Raises NoAnswerError."""
    await _chat(client, url, model, [fresh_image().part, _QUESTION], max_tokens=_TOKENS)


async def _ask(client: Client, instance: Observed, encoded: Encoded, **options: Any) -> Response:
    part = {"type": "image_embeds", "image_embeds": encoded.metadata, "uuid": encoded.image.identifier}
    return await _chat(
        client, instance.url, instance.health.model, [part, _QUESTION], ignore_eos=True, stream=False, **options
    )


async def _chat(client: Client, url: str, model: str, content: list[dict[str, Any]], **options: Any) -> Response:
    messages = [{"role": "user", "content": content}]
    return await client.post(url + CHAT_PATH, {"model": model, "messages": messages, "temperature": 0, **options})


# ---- counters ----------------------------------------------------------------------------------------------------------


class Counters(NamedTuple):
    """What an instance has counted since it started; None if it doesn't count that, or can't be asked."""

    encoded: float | None = None
    """Images that the instance itself has encoded."""
    loaded: float | None = None
    """Embeddings that it has loaded from where encoders publish them."""
    kv_transfers: float | None = None
    """Prompts whose KV it has fetched."""

    def since(self, before: Counters) -> Counters:
        return Counters(*(None if a is None or b is None else a - b for a, b in zip(self, before, strict=True)))

    @staticmethod
    def of_all(several: Iterable[Counters]) -> Counters:
        """Return the sums; a count that one of them doesn't have is None."""
        columns = zip(*several, strict=True)
        return Counters(*(None if None in column else sum(count or 0.0 for count in column) for column in columns))


async def read_counters(client: Client, url: str) -> Counters:
    """Return the counters of the instance at base URL ``url``; all are None if its /metrics can't be read."""
    try:
        response = await client.get(f"{url}/metrics")
    except NoAnswerError:
        return Counters()
    return counters_of(response.text()) if response.status == 200 else Counters()


def counters_of(page: str) -> Counters:
    """Read a page in Prometheus' text format."""
    lines = page.split("\n")
    names = _VLLM if any(line.startswith("vllm:") for line in lines) else _CHIASM
    samples = read_samples("\n".join(line for line in lines if line.startswith(names)))
    totals = (total(samples, name) for name in names)
    return Counters(*(value if value is not None and math.isfinite(value) else None for value in totals))
