"""Messages to instances, as a proxy would write them."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from chiasm.demo.images import draw_image, draw_scene
from chiasm.media import identifier

from .processes import MODEL, Server

Part = dict[str, Any]
Body = dict[str, Any]


def image_bytes(seed: int, size: tuple[int, int] = (96, 96)) -> bytes:
    """Return a drawing of the kind that the demo model knows, a different one for each seed."""
    rng = random.Random(seed)
    return encoded(draw_image(rng, draw_scene(rng, "shape"), size))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def with_comment(png: bytes) -> bytes:
    """Return another file with the same pixels."""
    file = io.BytesIO()
    text = PngInfo()
    text.add_text("Comment", "the same")
    Image.open(io.BytesIO(png)).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def name_of(data: bytes) -> str:
    """Return a proxy's name of the image: 64 hex digits."""
    return identifier(data, fingerprint="test")


def image_part(data: bytes, name: str | None = None) -> Part:
    """Return an image part as a client sends it or, with a name, as a proxy sends it to an encoder."""
    part: Part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}
    return part if name is None else {**part, "uuid": name}


def embeds_part(name: str, metadata: dict[str, Any]) -> Part:
    """Return an image part for a PD; ``metadata`` is the encoder's, or ``{"image_size": [height, width]}``."""
    return {"type": "image_embeds", "image_embeds": metadata, "uuid": name}


def chat(*content: str | Part, **options: Any) -> Body:
    """Return a greedy chat completion with one user message."""
    parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    body: Body = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 12}
    return body | options


def encode(encoder: Server, *images: bytes) -> dict[str, dict[str, Any]]:
    """Have an encoder publish images, and return the metadata of each by name."""
    parts = [image_part(data, name_of(data)) for data in images]
    response = encoder.post(chat(*parts, max_tokens=1, stream=False))
    assert response.status_code == 200, response.text
    items = response.json()["ec_transfer_params"]
    return {name: item["metadata"] for name, item in items.items()}


def published(encoder: Server, data: bytes) -> Part:
    """Have the encoder publish an image, and return its part for a PD."""
    ((name, metadata),) = encode(encoder, data).items()
    return embeds_part(name, metadata)
