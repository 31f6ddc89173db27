"""Seeded images, questions about them, and the right answers. Nothing here needs torch.

An image shows one shape, several shapes of a kind, a word or a number on a background that varies in colour, gradient
and noise. Canvases vary in size and aspect ratio. Seeds below ``HELD_OUT_SEEDS`` are never drawn in training, and the
numbers that their images show never occur there.

The checkpoint was trained on these images and phrases: do not change what is drawn, what is asked, or the order in
which random numbers are drawn.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Content = Literal["shape", "shapes", "word", "number"]

HELD_OUT_SEEDS = 1_000_000
"""Seeds in ``range(HELD_OUT_SEEDS)`` are for evaluation; training draws from the seeds above."""

COLOURS: dict[str, Colour] = {
    "red": (215, 38, 40),
    "green": (40, 160, 70),
    "blue": (40, 85, 220),
    "yellow": (240, 218, 50),
    "orange": (245, 138, 28),
    "purple": (140, 55, 175),
    "black": (22, 22, 24),
    "white": (246, 246, 246),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond")
COUNTS: tuple[str, ...] = ("one", "two", "three", "four", "five")
POSITIONS: tuple[str, ...] = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""Row by row: index = 3 * row + column."""
ORDINALS: tuple[str, ...] = ("first", "second", "third", "fourth")
_WORDS = (
    "apple bread chair cloud dance eagle exit fish flame forest ghost glass hello honey horse house island "
    "jungle kite lamp lemon lion milk moon music night north ocean olive open paper piano queen river robot "
    "salt ship snow spoon stone stop storm sugar table tiger train tree violin water wheel wind zebra"
)
WORDS: tuple[str, ...] = tuple(_WORDS.split())

SINGLE_KINDS: tuple[str, ...] = ("colour", "shape", "count", "position", "word", "number", "describe")
WHICH_KINDS: tuple[str, ...] = ("which-picture", "which-colour", "which-shape", "which-word", "which-number")
KINDS: tuple[str, ...] = SINGLE_KINDS + WHICH_KINDS
"""Every kind of question; the ``which`` kinds show two to four images in one request."""

# Neutral, pale and dark tints, so that the strong colours above stand out.
_BACKGROUNDS: tuple[Colour, ...] = (
    (250, 250, 248),
    (225, 225, 228),
    (180, 182, 185),
    (120, 122, 126),
    (70, 72, 78),
    (28, 30, 34),
    (205, 225, 245),
    (250, 238, 205),
    (210, 235, 210),
    (245, 215, 220),
    (25, 35, 75),
    (25, 60, 45),
    (75, 30, 40),
)
_CONTRAST = 210  # smallest sum of channel differences between what is drawn and its background


@dataclass(frozen=True)
class Scene:
    """What one image shows; fields that don't apply to ``content`` are None."""

    content: Content
    colour: str
    shape: str | None = None
    count: int | None = None
    position: str | None = None
    text: str | None = None

    def describe(self) -> str:
        """Return the scene as a short noun phrase, which is also the answer to "describe the picture"."""
        if self.content in ("word", "number"):
            return f"the {self.content} {self.text}"
        assert self.shape is not None
        assert self.count is not None
        if self.count == 1:
            article = "an" if self.colour[0] in "aeiou" else "a"
            phrase = f"{article} {self.colour} {self.shape}"
            return phrase if self.position is None else f"{phrase} {_place(self.position)}"
        return f"{COUNTS[self.count - 1]} {self.colour} {plural(self.shape)}"


@dataclass(frozen=True)
class Mark:
    """One drawn shape or character, and its centre as fractions of the canvas's width and height."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Example:
    """One request: images in order, the question, its answer and the kind of question."""

    images: list[Image.Image]
    question: str
    answer: str
    kind: str
    scenes: tuple[Scene, ...] = ()


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def _place(position: str) -> str:
    return {"centre": "in the centre", "left": "on the left", "right": "on the right"}.get(
        position, f"at the {position}"
    )


def is_held_out(seed: int) -> bool:
    """Tell whether ``seed`` belongs to the held-out range."""
    return 0 <= seed < HELD_OUT_SEEDS


def number_is_held_out(number: int) -> bool:
    """Tell whether ``number`` (0 to 999) is kept out of training: about one in eight is, spread over all digits."""
    return (number * 5417 + 1237) % 9973 % 8 == 0


def draw_number(rng: random.Random, held_out: bool) -> str:
    """Return a number of two or three digits, from the held-out set or from the training set."""
    while True:
        number = rng.randint(10, 99) if rng.random() < 0.25 else rng.randint(100, 999)
        if number_is_held_out(number) == held_out:
            return str(number)


def draw_size(rng: random.Random) -> tuple[int, int]:
    """Return a canvas size (width, height) in pixels: the shorter side has 96 to 400, the longer at most 1.9 times that."""
    short = rng.uniform(96, 224) if rng.random() < 0.7 else rng.uniform(224, 400)
    long = short * (rng.uniform(1.0, 1.9) if rng.random() < 0.7 else 1.0)
    sides = round(short), round(long)
    return sides if rng.random() < 0.6 else (sides[1], sides[0])


def draw_scene(rng: random.Random, content: Content, *, held_out: bool = False, many: bool = False) -> Scene:
    """Choose what an image shows; every colour, shape, count, position and word is equally likely.

    With ``many`` a scene of ``shapes`` never shows a single one.
    """
    colour = rng.choice(list(COLOURS))
    if content == "word":
        return Scene("word", colour, text=rng.choice(WORDS))
    if content == "number":
        return Scene("number", colour, text=draw_number(rng, held_out))
    shape = rng.choice(SHAPES)
    if content == "shape":
        return Scene("shape", colour, shape, 1, rng.choice(POSITIONS))
    # A single shape that is counted may be anywhere, so it has no named position.
    return Scene("shapes", colour, shape, rng.randint(2 if many else 1, len(COUNTS)))


def draw_image(rng: random.Random, scene: Scene, size: tuple[int, int] | None = None) -> Image.Image:
    """Draw ``scene`` as an RGB image of ``size`` (width, height) pixels, by default a random size."""
    return draw_marked(rng, scene, size)[0]


def draw_marked(
    rng: random.Random, scene: Scene, size: tuple[int, int] | None = None
) -> tuple[Image.Image, list[Mark]]:
    """Draw ``scene`` like ``draw_image``, and also return where each shape or character is."""
    width, height = size or draw_size(rng)
    ink = _jitter(rng, COLOURS[scene.colour], 12)
    image = _background(rng, (width, height), ink)
    draw = ImageDraw.Draw(image)
    if scene.text is not None:
        marks = _draw_text(rng, draw, (width, height), scene.text, ink)
    else:
        assert scene.shape is not None
        assert scene.count is not None
        if scene.position is not None:
            places = [_spot(rng, (width, height), scene.position)]
        else:
            places = _scatter(rng, (width, height), scene.count)
        for x, y, radius in places:
            _draw_shape(rng, draw, scene.shape, (x, y), radius, ink)
        marks = [Mark(scene.shape, x / width, y / height) for x, y, _ in places]
    if rng.random() < 0.6:
        image = _noisy(rng, image)
    if rng.random() < 0.15:
        # Uploads are often compressed, and block artefacts at coloured edges differ from noise.
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(55, 95))
        image = Image.open(buffer).convert("RGB")
    return image, marks


def ask(rng: random.Random, scene: Scene, kind: str, nth: str | None = None) -> tuple[str, str]:
    """Return a question of ``kind`` about ``scene`` and its answer.

    ``nth`` ("second") makes it a question about one of several images. No phrasing gives away the answer. ``kind`` is one
    of ``SINGLE_KINDS`` and must apply to the scene.
    """
    where = f"in the {nth} {rng.choice(('picture', 'picture', 'image'))}"
    if nth is None:
        where = rng.choice(("", "in the picture", "in this picture", "in the image", "here"))
    forms: tuple[str, ...]
    if kind == "describe":
        answer = scene.describe()
        forms = ("what is {w}?", "what do you see {w}?", "what can you see {w}?", "what is shown {w}?")
        if nth is None:
            forms += ("describe the picture.", "describe this image.", "what does the picture show?", "what is this?")
            where = where or "in the picture"
        else:
            forms += (f"describe the {nth} picture.", f"what does the {nth} picture show?")
    elif kind == "colour":
        answer = scene.colour
        thing = scene.content if scene.text else ("shape" if scene.count == 1 else "shapes")
        verb = "are" if thing == "shapes" else "is"
        forms = (f"what colour {verb} the {thing} {{w}}?", f"which colour {verb} the {thing} {{w}}?")
        forms += (f"what color {verb} the {thing} {{w}}?", f"name the colour of the {thing} {{w}}.")
    elif kind == "shape":
        assert scene.shape is not None
        answer = scene.shape
        forms = ("what shape is {w}?", "which shape is {w}?", "what shape is shown {w}?", "name the shape {w}.")
        forms += ("which shape do you see {w}?",)
        where = where or "shown"
        if where == "shown":
            forms = ("what shape is {w}?", "which shape is this?", "what shape is it?", "name the shape.")
    elif kind == "count":
        assert scene.count is not None
        answer = COUNTS[scene.count - 1]
        forms = ("how many shapes are {w}?", "how many shapes do you see {w}?", "count the shapes {w}.")
        forms += ("how many shapes can you count {w}?",)
        where = where or "there"
        if where == "there":
            forms = ("how many shapes are {w}?", "how many shapes do you see?", "count the shapes.")
    elif kind == "position":
        assert scene.position is not None
        answer = scene.position
        forms = ("where is the shape {w}?", "at which position is the shape {w}?", "where does the shape lie {w}?")
    elif kind in ("word", "number"):
        assert scene.text is not None
        answer = scene.text
        forms = (f"what {kind} is {{w}}?", f"which {kind} is written {{w}}?", f"which {kind} do you see {{w}}?")
        forms += (f"read the {kind} {{w}}.", f"what is the {kind} {{w}}?")
        where = where or "written"
        if where == "written":
            forms = (f"what {kind} is {{w}}?", f"which {kind} is this?", f"read the {kind}.", f"what is the {kind}?")
    else:
        raise ValueError(f"no such kind of question: {kind!r}")
    question = rng.choice(forms).format(w=where)
    return _tidy(rng, question), answer


def draw_example(
    seed: int, kind: str | None = None, images: int | None = None, *, size: tuple[int, int] | None = None
) -> Example:
    """Draw the request of ``seed``: the same arguments give the same pixels and words.

    ``kind`` is one of ``KINDS``, by default a random one. ``images`` is the number of images: 2 to 4 for the ``which``
    kinds, 1 for the others. ``size`` is that of every canvas (width, height) in pixels. Raises ValueError.
    """
    rng = random.Random(f"chiasm demo {seed} {kind} {images}")
    if kind is None:
        kind = rng.choice(KINDS if images is None else (SINGLE_KINDS if images == 1 else WHICH_KINDS))
    if kind not in KINDS:
        raise ValueError(f"no such kind: {kind!r}; there are {', '.join(KINDS)}")
    which = kind in WHICH_KINDS
    if images is None:
        images = rng.randint(2, 4) if which else 1
    if not (2 <= images <= len(ORDINALS) if which else images == 1):
        raise ValueError(f"a question of kind {kind!r} cannot have {images} images")
    held_out = is_held_out(seed)
    asked = rng.randrange(images)
    topic = ("describe" if kind == "which-picture" else kind.removeprefix("which-")) if which else kind
    scenes = [draw_scene(rng, content_for(rng, topic), held_out=held_out, many=topic == "describe")]
    answers = {answer_for(scenes[0], topic)}
    while len(scenes) < images:
        # All images have different answers, so that the answer to the wrong image is wrong.
        other = draw_scene(rng, content_for(rng, topic), held_out=held_out, many=topic == "describe")
        if answer_for(other, topic) not in answers:
            answers.add(answer_for(other, topic))
            scenes.append(other)
    scenes[0], scenes[asked] = scenes[asked], scenes[0]
    question, answer = ask(rng, scenes[asked], topic, ORDINALS[asked] if which else None)
    drawn = [draw_image(rng, scene, size) for scene in scenes]
    return Example(drawn, question, answer, kind, tuple(scenes))


def content_for(rng: random.Random, topic: str) -> Content:
    """Choose the content of an image to which a question on ``topic`` (one of ``SINGLE_KINDS``) applies."""
    fixed: dict[str, Content] = {"position": "shape", "count": "shapes", "word": "word", "number": "number"}
    if topic in fixed:
        return fixed[topic]
    if topic == "describe":
        return rng.choice(("shape", "shape", "shapes", "word", "number"))
    if topic == "colour":
        return rng.choice(("shape",) * 7 + ("shapes", "word", "number"))
    return "shape" if rng.random() < 0.8 else "shapes"


def answer_for(scene: Scene, topic: str) -> str:
    """Return the answer to any question on ``topic`` about ``scene``."""
    return ask(random.Random(0), scene, topic)[1]


def _tidy(rng: random.Random, question: str) -> str:
    """Remove the spaces around empty phrases, and vary case and punctuation as people do."""
    question = " ".join(question.split()).replace(" ?", "?").replace(" .", ".")
    style = rng.random()
    if style < 0.45:
        question = question[0].upper() + question[1:]
    elif style < 0.6:
        question = question[:-1]
    return question


def _jitter(rng: random.Random, colour: Colour, by: int) -> Colour:
    """Shift brightness and each channel by up to ``by`` of 255."""
    shift = rng.randint(-by, by)
    red, green, blue = (min(255, max(0, c + shift + rng.randint(-by // 2, by // 2))) for c in colour)
    return red, green, blue


def _background(rng: random.Random, size: tuple[int, int], ink: Colour) -> Image.Image:
    """Return a plain or graded canvas that contrasts with ``ink`` everywhere."""

    def far(colour: Colour) -> bool:
        return sum(abs(a - b) for a, b in zip(colour, ink, strict=True)) >= _CONTRAST

    while not far(first := _jitter(rng, rng.choice(_BACKGROUNDS), 10)):
        pass
    if rng.random() < 0.5:
        return Image.new("RGB", size, first)
    second = _jitter(rng, first, 28)
    if not far(second):
        return Image.new("RGB", size, first)
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", size, first), Image.new("RGB", size, second), ramp)


def _noisy(rng: random.Random, image: Image.Image) -> Image.Image:
    """Add uniform noise of up to 14 of 255 to every channel."""
    strength = rng.randint(2, 14)
    noise = np.random.default_rng(rng.getrandbits(32)).integers(
        -strength, strength + 1, (image.height, image.width, 3), dtype=np.int16
    )
    noise += np.asarray(image)
    return Image.fromarray(np.clip(noise, 0, 255, out=noise).astype(np.uint8))


def _spot(rng: random.Random, size: tuple[int, int], position: str) -> tuple[float, float, float]:
    """Return centre and radius in pixels of one shape at a named position."""
    width, height = size
    row, column = divmod(POSITIONS.index(position), 3)
    # Only a shape in the centre has room to be large.
    radius = min(size) * (rng.uniform(0.14, 0.44) if (row, column) == (1, 1) else rng.uniform(0.12, 0.19))
    x = width * ((0.19, 0.5, 0.81)[column] + rng.uniform(-0.055, 0.055))
    y = height * ((0.19, 0.5, 0.81)[row] + rng.uniform(-0.055, 0.055))
    margin = radius + 1
    return min(max(x, margin), width - margin), min(max(y, margin), height - margin), radius


def _scatter(rng: random.Random, size: tuple[int, int], count: int) -> list[tuple[float, float, float]]:
    """Return ``count`` places (x, y, radius) in pixels that don't touch, each in one of six cells."""
    width, height = size
    columns, rows = (3, 2) if width >= height else (2, 3)
    cell_width, cell_height = width / columns, height / rows
    radius = min(cell_width, cell_height) * rng.uniform(0.28, 0.38)
    places: list[tuple[float, float, float]] = []
    for cell in rng.sample(range(columns * rows), count):
        row, column = divmod(cell, columns)
        slack_x, slack_y = (side / 2 - 1.12 * radius for side in (cell_width, cell_height))
        x = (column + 0.5) * cell_width + rng.uniform(-slack_x, slack_x)
        y = (row + 0.5) * cell_height + rng.uniform(-slack_y, slack_y)
        places.append((x, y, radius))
    return places


def _draw_shape(
    rng: random.Random, draw: ImageDraw.ImageDraw, shape: str, at: tuple[float, float], radius: float, ink: Colour
) -> None:
    """Draw one filled shape of ``radius`` pixels, rotated by at most ten degrees."""
    x, y = at
    turn = math.radians(rng.uniform(-10, 10))
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        return
    corners = [
        (
            x + radius * distance * math.cos(math.radians(angle) + turn),
            y + radius * distance * math.sin(math.radians(angle) + turn),
        )
        for angle, distance in _OUTLINES[shape]
    ]
    draw.polygon(corners, fill=ink)


def _cross() -> tuple[tuple[float, float], ...]:
    corners = []
    for quarter in range(4):
        for a, b in ((0.95, -0.28), (0.95, 0.28), (0.28, 0.28)):
            corners.append((math.degrees(math.atan2(b, a)) + 90 * quarter, math.hypot(a, b)))
    return tuple(corners)


# Corners as (angle in degrees clockwise from the right, distance in radii).
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": tuple((45 + 90 * i, 1.1) for i in range(4)),
    "diamond": ((0, 0.72), (90, 1.05), (180, 0.72), (270, 1.05)),
    "triangle": tuple((-90 + 120 * i, 1.05) for i in range(3)),
    "star": tuple((-90 + 36 * i, 1.05 if i % 2 == 0 else 0.45) for i in range(10)),
    "cross": _cross(),
}


@lru_cache(maxsize=256)
def font(pixels: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's built-in outline font at a size in pixels."""
    chosen = ImageFont.load_default(size=pixels)
    assert isinstance(chosen, ImageFont.FreeTypeFont)
    return chosen


def _draw_text(
    rng: random.Random, draw: ImageDraw.ImageDraw, size: tuple[int, int], text: str, ink: Colour
) -> list[Mark]:
    """Write ``text`` in one line inside the canvas."""
    width, height = size
    unit = font(100).getbbox(text)
    # As large as fits, or a little smaller: it must stay readable when scaled down to a few image tokens.
    largest = min(0.92 * width / (unit[2] - unit[0]) * 100, 0.5 * min(size))
    chosen = font(max(8, int(largest * rng.uniform(0.7, 1.0))))
    left, top, right, bottom = chosen.getbbox(text)
    # Around the middle, moved by at most half of the room on each side.
    x = (width - (right - left)) * rng.uniform(0.25, 0.75) - left
    y = (height - (bottom - top)) * rng.uniform(0.25, 0.75) - top
    draw.text((x, y), text, fill=ink, font=chosen, stroke_width=1 if rng.random() < 0.2 and chosen.size > 24 else 0)
    # The middle of each character's advance; kerning moves it by less than a pixel.
    middles = [(chosen.getlength(text[:i]) + chosen.getlength(text[: i + 1])) / 2 for i in range(len(text))]
    row = (y + (top + bottom) / 2) / height
    return [Mark(character, (x + middle) / width, row) for character, middle in zip(text, middles, strict=True)]
