"""Bodies of requests, and texts of a chosen number of tokens."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chiasm.bench.images import data_url
from chiasm.bench.measurement import SERVED_NAME


def image_part(data: bytes) -> dict[str, Any]:
    """An image's file as part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def chat(content: str | Sequence[dict[str, Any]], *, max_tokens: int, **fields: Any) -> bytes:
    """The body of a greedy chat completion with one user message."""
    message = {"role": "user", "content": content if isinstance(content, str) else list(content)}
    body = {"model": SERVED_NAME, "messages": [message], "max_tokens": max_tokens, "temperature": 0, **fields}
    return json.dumps(body).encode()


def ask(images: Sequence[bytes], question: str, *, max_tokens: int, **fields: Any) -> bytes:
    """Images, then a question about them."""
    content = [*(image_part(data) for data in images), text_part(question)] if images else question
    return chat(content, max_tokens=max_tokens, **fields)


def stream(text: str, tokens: int) -> bytes:
    """A stream of exactly so many tokens, each an event of its own, whatever its text."""
    return chat(text, max_tokens=tokens, stream=True, ignore_eos=True, logprobs=True)


class Texts:
    """Seeded texts that a checkpoint's tokenizer cuts into a chosen number of tokens."""

    def __init__(self, checkpoint: Path, seed: int) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._random = random.Random(f"texts {seed}")

    def of(self, tokens: int) -> str:
        """A new text of exactly ``tokens`` tokens, at least 1."""
        while True:
            text = ""
            while (found := self._count(text)) < tokens:
                room = tokens - found
                letters = 1 if room < 4 else self._random.randint(1, min(room, 40))
                text += "".join(self._random.choices(string.ascii_uppercase + " ", k=letters))
            # A few more letters can make fewer tokens, and spaces at the ends go in some chat templates.
            if found == tokens and text == text.strip():
                return text

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
