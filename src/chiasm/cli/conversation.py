"""Questions about images, asked through the OpenAI API."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.errors import ChiasmError, ConfigurationError

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_TOKENS = 48
_ENTRY = re.compile(r'([\w-]+)(?:;desc="([^"]*)")?(?:;dur=([\d.]+))?')
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY is not for this machine


class AnswerError(ChiasmError):
    """A question was answered with an error; the message is the server's."""


@dataclass(frozen=True)
class ImageFile:
    """An image as it is sent."""

    image: Image
    """To look at."""
    data: bytes
    """Of the file."""
    media_type: str

    @property
    def url(self) -> str:
        """A ``data:`` URL."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Turn:
    """One question, its images in order, and the right answer where one is known."""

    title: str
    question: str
    images: tuple[ImageFile, ...] = ()
    right_answer: str | None = None


@dataclass(frozen=True)
class Item:
    """How one image's embedding came to the language model."""

    outcome: str
    """``hit`` or ``waited``."""
    milliseconds: float


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Of the ``Server-Timing`` header, by name; the first of a name counts, which is the proxy's."""
    items: tuple[Item, ...] = ()

    def agrees_with(self, right_answer: str) -> bool:
        """Whether it says the same, whatever the case and the last full stop."""
        return _plain(self.text) == _plain(right_answer)


def drawn(image: Image) -> ImageFile:
    """An image that was drawn here, as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageFile(image, file.getvalue(), "image/png")


def read_image(path: Path) -> ImageFile:
    """An image file. Raises ConfigurationError when it isn't one."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            media_type = image.get_format_mimetype() or "application/octet-stream"
            return ImageFile(ImageOps.exif_transpose(image).convert("RGB"), data, media_type)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigurationError(f"{path} cannot be read as an image: {error}") from error


def ask(url: str, turn: Turn) -> Answer:
    """Post a turn to the API at base URL ``url``. Raises AnswerError."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": one.url}} for one in turn.images]
    content.append({"type": "text", "text": turn.question})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": _MAX_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with _NO_PROXY.open(request) as reply:
            text = json.load(reply)["choices"][0]["message"]["content"]
            timing = reply.headers.get("Server-Timing", "")
    except urllib.error.HTTPError as error:
        with error:
            raise AnswerError(_message(error.read()) or str(error)) from None
    except (OSError, ValueError, LookupError) as error:
        raise AnswerError(f"no answer: {error}") from error
    return _answer(text, timing)


def _answer(text: str, server_timing: str) -> Answer:
    milliseconds: dict[str, float] = {}
    items: list[Item] = []
    for entry in server_timing.split(","):
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            continue
        name, description, duration = match.groups()
        if name.startswith("item") and name != "item":
            items.append(Item(description or "", float(duration or 0)))
        else:
            milliseconds.setdefault(name, float(duration or 0))
    return Answer(text, milliseconds, tuple(items))


def _message(body: bytes) -> str | None:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!")


def all_agree(turns: Sequence[Turn], answers: Sequence[Answer]) -> bool:
    """Whether every answer whose right one is known is right."""
    return all(
        turn.right_answer is None or answer.agrees_with(turn.right_answer)
        for turn, answer in zip(turns, answers, strict=True)
    )
