"""The messages between a proxy and instances, as a proxy would write them."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image

from chiasm.demo.images import draw_image, draw_scene
from chiasm.media import identifier

from .processes import MODEL, Server

Part = dict[str, Any]
Body = dict[str, Any]


def image_bytes(seed: int, size: tuple[int, int] = (96, 96)) -> bytes:
    """A drawing of its own for each seed, as the demo model knows them."""
    rng = random.Random(seed)
    return encoded(draw_image(rng, draw_scene(rng, "shape"), size))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def name_of(data: bytes) -> str:
    """What a proxy names the image: 64 hex digits."""
    return identifier(data, fingerprint="test")


def image_part(data: bytes, name: str | None = None) -> Part:
    """An image as a client sends it, or as a proxy sends it to an encoder, with a name."""
    part: Part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}
    return part if name is None else {**part, "uuid": name}


def embeds_part(name: str, metadata: dict[str, Any]) -> Part:
    """An image as a proxy sends it to a PD: ``metadata`` is the encoder's, or ``{"image_size": [height, width]}``."""
    return {"type": "image_embeds", "image_embeds": metadata, "uuid": name}


def chat(*content: str | Part, **options: Any) -> Body:
    """A greedy chat completion with one user message."""
    parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    body: Body = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 12}
    return body | options


def encode(encoder: Server, *images: bytes) -> dict[str, dict[str, Any]]:
    """Have an encoder publish images; gives the metadata of each by name."""
    parts = [image_part(data, name_of(data)) for data in images]
    response = encoder.post(chat(*parts, max_tokens=1, stream=False))
    assert response.status_code == 200, response.text
    items = response.json()["ec_transfer_params"]
    return {name: item["metadata"] for name, item in items.items()}


def published(encoder: Server, data: bytes) -> Part:
    """An image that the encoder has published, as a part for a PD."""
    ((name, metadata),) = encode(encoder, data).items()
    return embeds_part(name, metadata)
