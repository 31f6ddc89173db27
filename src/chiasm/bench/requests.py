"""What is sent: seeded images and texts, and the bodies of requests. The same arguments give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chiasm.bench.measurement import SERVED_NAME
from chiasm.demo.images import draw_example

QUESTION = "What is shown?"
"""Asked about an image if the answer doesn't matter."""

# ---- images ------------------------------------------------------------------------------------------------------------

_GRID = 12
_GRAIN = 6


def photo(name: str, side: int = 512, height: int | None = None) -> bytes:
    """Return a JPEG of ``side`` x ``side`` pixels with soft shapes and some grain, like a camera's; ``name`` seeds it.

    With ``height``, ``side`` is its width only.
    """
    height = side if height is None else height
    generator = _generator(name)
    coarse = generator.integers(0, 256, (_GRID, _GRID, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((side, height), Image.Resampling.BICUBIC)
    grain = generator.integers(-_GRAIN, _GRAIN + 1, (height, side, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(soft, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    return _encoded(Image.fromarray(pixels), "JPEG", quality=85)


def noise(name: str, size_bytes: int) -> bytes:
    """Return a PNG of about ``size_bytes`` whose pixels cannot be compressed."""
    side = round(math.sqrt(size_bytes / 3))
    pixels = _generator(name).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return _encoded(Image.fromarray(pixels), "PNG", compress_level=0)


def data_url(data: bytes) -> str:
    """Return an image file as a ``data:`` URL."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))


def _encoded(image: Image.Image, file_format: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


# ---- bodies ------------------------------------------------------------------------------------------------------------


def image_part(data: bytes) -> dict[str, Any]:
    """Return an image file as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def embeds_part(identifier: str, side: int) -> dict[str, Any]:
    """Return the part that tells a PD of an image of ``side`` x ``side`` pixels which an encoder publishes."""
    return {"type": "image_embeds", "image_embeds": {"image_size": [side, side]}, "uuid": identifier}


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of a message."""
    return {"type": "text", "text": text}


def chat(content: str | Sequence[dict[str, Any]], *, max_tokens: int, **fields: Any) -> bytes:
    """Return the body of a greedy chat completion with one user message."""
    message = {"role": "user", "content": content if isinstance(content, str) else list(content)}
    body = {"model": SERVED_NAME, "messages": [message], "max_tokens": max_tokens, "temperature": 0, **fields}
    return json.dumps(body).encode()


def ask(images: Sequence[bytes], question: str = QUESTION, *, max_tokens: int, **fields: Any) -> bytes:
    """Return the body of a question about images, which come first."""
    content = [*(image_part(data) for data in images), text_part(question)] if images else question
    return chat(content, max_tokens=max_tokens, **fields)


def stream(content: str | Sequence[dict[str, Any]], tokens: int) -> bytes:
    """Return the body of a streamed answer of exactly ``tokens`` tokens, one event each even if its text is empty."""
    return chat(content, max_tokens=tokens, stream=True, ignore_eos=True, logprobs=True)


def publish(data: bytes, identifier: str) -> bytes:
    """Return the body that makes an encoder publish an image under an identifier."""
    return chat([{**image_part(data), "uuid": identifier}], max_tokens=1)


def identifier_of(name: str) -> str:
    """Return an identifier (64 hex digits) for an image called ``name``."""
    return hashlib.sha256(name.encode()).hexdigest()


_NEW_TOKENS = 128


class Texts:
    """Seeded texts that a checkpoint's tokenizer splits into a chosen number of tokens."""

    def __init__(self, checkpoint: Path, seed: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._random = random.Random(f"texts {seed}")
        self._piece = ""

    def of(self, tokens: int) -> str:
        """Return a new text of exactly ``tokens`` tokens, at least 1."""
        while True:
            text = ""
            while (found := self._count(text)) < tokens:
                room = tokens - found
                letters = 1 if room < 4 else self._random.randint(1, min(room, 40))
                text += "".join(self._random.choices(string.ascii_uppercase + " ", k=letters))
            # More letters can make fewer tokens, and some chat templates remove spaces at the ends.
            if found == tokens and text == text.strip():
                return text

    def long(self, tokens: int) -> str:
        """Return a new text of about ``tokens`` tokens, at least 1. Only the beginning and the end of a long one are new."""
        first = self.of(min(tokens, _NEW_TOKENS))
        pieces, rest = divmod(tokens - min(tokens, _NEW_TOKENS), _NEW_TOKENS)
        if not self._piece:
            self._piece = self.of(_NEW_TOKENS)
        return first + self._piece * pieces + (self.of(rest) if rest else "")

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


# ---- requests of all kinds ---------------------------------------------------------------------------------------------

_IMAGES = {"text": 0, "1 image": 1, "2 images": 2, "3 images": 3, "4 images": 4, "the same image twice": 2}
_SHARES = {"text": 4, "1 image": 6, "2 images": 3, "3 images": 2, "4 images": 2, "the same image twice": 3}
"""Number of each kind in 20 requests."""
_PENALTIES: tuple[dict[str, float], ...] = (
    {},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3},
)


@dataclass(frozen=True)
class DrawnRequest:
    """Image files, and a question about them."""

    kind: str
    images: tuple[bytes, ...]
    question: str


def draw_requests(seed: int, count: int) -> list[DrawnRequest]:
    """Return requests of all kinds in a shuffled order."""
    kinds = [kind for kind, share in _SHARES.items() for _ in range(share)]
    if count < len(kinds):
        kinds = list(_SHARES)
    drawn = [kinds[index % len(kinds)] for index in range(count)]
    random.Random(f"identity {seed}").shuffle(drawn)
    return [_draw(seed * 100_000 + index, kind) for index, kind in enumerate(drawn)]


def _draw(seed: int, kind: str) -> DrawnRequest:
    number = _IMAGES[kind]
    example = draw_example(seed, images=max(1, number))
    images = [_encoded(image, "PNG") for image in example.images[:number]]
    if kind == "the same image twice":
        images[1] = images[0]
    return DrawnRequest(kind, tuple(images), example.question)


def count_kinds(requests: Sequence[DrawnRequest]) -> str:
    """Return a sentence that says how many requests there are of each kind."""
    counted = Counter(request.kind for request in requests)
    return f"{len(requests)} requests: {', '.join(f'{number} × {kind}' for kind, number in counted.items())}."


def sampling(seed: int, index: int) -> dict[str, Any]:
    """Return how request ``index`` is sampled: each with a seed of its own, two in three with penalties.

    Every other request ignores the end token, since most answers of a trained checkpoint end after a few tokens.
    """
    fields: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": seed * 100_000 + index}
    return fields | _PENALTIES[index % len(_PENALTIES)] | {"ignore_eos": index % 2 == 1}
