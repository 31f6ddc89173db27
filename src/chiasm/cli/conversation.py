"""Questions about images, asked through the OpenAI API, and images for output that has no colours."""

from __future__ import annotations

import base64
import http.client
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from chiasm.errors import ChiasmError, ConfigurationError, MediaError
from chiasm.http.timing import read_timing
from chiasm.wire import CHAT_PATH, UNREADABLE, ErrorBody

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_TOKENS = 48
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # HTTP_PROXY is not for this machine
_INK = " .:-=+*#%@"
_NOISE = 48
"""Differences from the background up to this, of 255, are left blank."""
_CELL_RATIO = 0.5
"""A character cell is about half as wide as it is high."""


class AnswerError(ChiasmError):
    """The server answered a question with an error, or not at all; the message is the server's."""


@dataclass(frozen=True)
class ImageFile:
    """An image, and the file that is sent for it."""

    image: Image
    data: bytes
    """The file's bytes."""
    media_type: str

    @property
    def url(self) -> str:
        """The file as a ``data:`` URL."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Turn:
    """One question, its images in order, and the right answer if it is known."""

    title: str
    question: str
    images: tuple[ImageFile, ...] = ()
    right_answer: str | None = None


@dataclass(frozen=True)
class ImageTiming:
    """How the language model got one image's embedding."""

    outcome: str
    """``hit`` or ``waited``."""
    milliseconds: float


@dataclass(frozen=True)
class Answer:
    """The model's answer, and where its time went."""

    text: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Durations in the ``Server-Timing`` header, by name; if a name occurs twice, the first one, which is the proxy's."""
    items: tuple[ImageTiming, ...] = ()

    def agrees_with(self, right_answer: str) -> bool:
        """Return whether the texts are equal except for case, spaces and a final full stop."""
        return _plain(self.text) == _plain(right_answer)


def drawn(image: Image) -> ImageFile:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageFile(image, file.getvalue(), "image/png")


def read_image(path: Path) -> ImageFile:
    """Return an image file. Raises ConfigurationError if it cannot be read as an image."""
    from chiasm.media import decode, inspect

    try:
        data = path.read_bytes()
        return ImageFile(decode(data), data, inspect(data).media_type)
    except (OSError, MediaError) as error:
        raise ConfigurationError(f"{path} cannot be read as an image: {error}") from error


def ask(url: str, turn: Turn) -> Answer:
    """Ask a question at base URL ``url`` and return the answer. Raises AnswerError."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": one.url}} for one in turn.images]
    content.append({"type": "text", "text": turn.question})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": _MAX_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}{CHAT_PATH}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with _NO_PROXY.open(request) as response:
            text = str(json.load(response)["choices"][0]["message"]["content"])
            timing = response.headers.get("Server-Timing")
    except urllib.error.HTTPError as error:
        with error:
            raise AnswerError(_message(error.read()) or str(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise AnswerError(f"No answer: {error}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise AnswerError(f"The answer isn't that of a chat completion: {error}") from error
    return _answer(text, timing)


def _answer(text: str, server_timing: str | None) -> Answer:
    milliseconds: dict[str, float] = {}
    items: list[ImageTiming] = []
    for name, seconds, description, _ in read_timing(server_timing):
        if name.startswith("item") and name != "item":
            items.append(ImageTiming(description, 1000 * (seconds or 0)))
        else:
            milliseconds.setdefault(name, 1000 * (seconds or 0))
    return Answer(text, milliseconds, tuple(items))


def _message(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=ErrorBody).error.message
    except UNREADABLE:
        return ""


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!")


def all_agree(turns: Sequence[Turn], answers: Sequence[Answer]) -> bool:
    """Return whether every answer is right, as far as the right one is known."""
    return all(
        turn.right_answer is None or answer.agrees_with(turn.right_answer)
        for turn, answer in zip(turns, answers, strict=True)
    )


def draw_in_characters(image: Image, width: int) -> str:
    """Return an image as lines of ``width`` characters, for output that has no colours.

    A character's ink stands for how much a spot's colour differs from the background, which is blank.
    """
    from PIL import Image as PillowImage
    from PIL import ImageChops, ImageStat

    height = max(1, round(image.height * width / image.width * _CELL_RATIO))
    small = image.convert("RGB").resize((width, height), PillowImage.Resampling.BOX)
    red, green, blue = (int(channel) for channel in ImageStat.Stat(small).median)
    background = PillowImage.new("RGB", small.size, (red, green, blue))
    distances = ImageChops.difference(small, background).split()
    furthest = ImageChops.lighter(ImageChops.lighter(distances[0], distances[1]), distances[2]).tobytes()
    span = max(255 - _NOISE, 1) if max(furthest) <= _NOISE else max(furthest) - _NOISE
    inks = [_INK[max(0, distance - _NOISE) * (len(_INK) - 1) // span] for distance in furthest]
    return "\n".join("".join(inks[row * width : (row + 1) * width]).rstrip() for row in range(height))
