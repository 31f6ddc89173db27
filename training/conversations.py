"""Training conversations: turns about images as token ids, targets and M-RoPE positions."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from recipe import ID
from samples import draw_pixels
from torch import Tensor
from towers import Grid
from transformers import Qwen2Tokenizer

from chiasm.demo import images, talk

IGNORE = -100
# Numbers are the hardest to read and counts come next, so they are drawn most.
_CONTENTS: tuple[images.Content, ...] = ("shape", "shapes", "shapes", "shapes", "word", "number", "number", "number")


@dataclass
class ImageFile:
    """A drawn image: pixels [H, W, 3] uint8, its grid of image tokens, and the marks of what was drawn where."""

    pixels: np.ndarray
    grid: Grid
    marks: list[images.Mark]


@dataclass
class Turn:
    """One question with the images sent with it, and its answer."""

    question: str
    answer: str
    kind: str
    images: list[ImageFile] = field(default_factory=list)
    images_first: bool = True


@dataclass
class Conversation:
    """Turns in order, after an optional system message."""

    turns: list[Turn]
    system: str | None = None


def topics(rng: random.Random, scene: images.Scene) -> list[str]:
    """Return the topics of questions about ``scene``, in random order."""
    if scene.text is not None:
        found = [scene.content] + (["describe"] if rng.random() < 0.4 else []) + ["colour"] * (rng.random() < 0.25)
    else:
        # Colours and shapes are learned long before places and counts.
        found = [topic for topic in ("colour", "shape") if rng.random() < 0.5]
        if scene.content == "shape":
            found += ["position", "describe"] + ["count"] * (rng.random() < 0.1)
        else:
            found += ["count"] + ["describe"] * (scene.count != 1)
    rng.shuffle(found)
    return found


class Writer:
    """Draws conversations whose images lie on a few given grids."""

    def __init__(self, rng: random.Random, grids: list[Grid]) -> None:
        self.rng, self.grids = rng, grids

    def _scene(self, content: images.Content | None = None) -> images.Scene:
        drawn = self.rng.choice(_CONTENTS)
        return images.draw_scene(self.rng, content or drawn)

    def _image(self, scene: images.Scene) -> ImageFile:
        grid = self.rng.choice(self.grids)
        pixels, marks = draw_pixels(self.rng, scene, grid)
        return ImageFile(pixels, grid, marks)

    def _single(self) -> list[Turn]:
        scene = self._scene()
        turns = []
        for topic in topics(self.rng, scene)[: self.rng.randint(1, 3)]:
            # Asking for "the first image" of one is natural too.
            nth = "first" if self.rng.random() < 0.05 else None
            turns.append(Turn(*images.ask(self.rng, scene, topic, nth), topic))
        turns[0].images = [self._image(scene)]
        return turns

    def _several(self, most: int) -> list[Turn]:
        count = min(most, self.rng.choice((2, 2, 2, 3, 3, 4)))
        alike = self.rng.choice(_CONTENTS) if self.rng.random() < 0.5 else None
        scenes = [self._scene(alike) for _ in range(count)]
        turns = []
        for _ in range(self.rng.choice((1, 2, 3, 3))):
            if self.rng.random() < 0.03 and count < len(images.ORDINALS):
                nth = images.ORDINALS[self.rng.randrange(count, len(images.ORDINALS))]
                other = self.rng.choice(scenes)
                question, _ = images.ask(self.rng, other, topics(self.rng, other)[0], nth)
                turns.append(Turn(question, talk.missing(nth), "missing"))
                continue
            index = self.rng.randrange(count)
            topic = topics(self.rng, scenes[index])[0]
            question, answer = images.ask(self.rng, scenes[index], topic, images.ORDINALS[index])
            turns.append(Turn(question, answer, f"which-{topic}"))
        turns[0].images = [self._image(scene) for scene in scenes]
        return turns

    def _later(self) -> list[Turn]:
        turns: list[Turn] = []
        for _ in range(2):
            turn = self._single()[0]
            turn.kind = f"later-{turn.kind}" if turns else turn.kind
            turns.append(turn)
        return turns

    def draw(self, most: int = 4) -> Conversation:
        """Draw a conversation with at most ``most`` images in one request."""
        pick = self.rng.random()
        if pick < 0.06:
            turns = [Turn(*talk.draw_exchange(self.rng), "talk")]
        elif pick < 0.12:
            turns = self._later()
        elif pick < 0.55 or most < 2:
            turns = self._single()
        else:
            turns = self._several(most)
        for turn in turns:
            turn.images_first = self.rng.random() < 0.8
        system = self.rng.choice(talk.SYSTEM_MESSAGES) if self.rng.random() < 0.25 else None
        return Conversation(turns, system)


def messages(conversation: Conversation) -> list[dict[str, object]]:
    """Return the conversation as chat messages, to compare ``Encoder`` with the chat template."""
    found: list[dict[str, object]] = []
    if conversation.system is not None:
        found.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        images = [{"type": "image"} for _ in turn.images]
        text = [{"type": "text", "text": turn.question}]
        found.append({"role": "user", "content": images + text if turn.images_first else text + images})
        found.append({"role": "assistant", "content": turn.answer})
    return found


@dataclass
class Encoded:
    """A conversation as ids [T], targets [T] (``IGNORE`` except on answers), positions [3, T] and answer spans."""

    ids: list[int]
    targets: list[int]
    positions: np.ndarray
    spans: list[tuple[int, int, str]]
    images: list[ImageFile]


class Encoder:
    """Turns conversations into ids, exactly as the chat template and the tokenizer would."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self._tokenize = lru_cache(maxsize=50_000)(lambda text: tuple(tokenizer(text)["input_ids"]))

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode one conversation."""
        ids: list[int] = []
        targets: list[int] = []
        axes: list[np.ndarray] = []
        spans: list[tuple[int, int, str]] = []
        shown: list[ImageFile] = []
        position = 0

        def put(tokens: tuple[int, ...], learn: bool = False) -> None:
            nonlocal position
            ids.extend(tokens)
            targets.extend(tokens if learn else [IGNORE] * len(tokens))
            axes.append(np.tile(np.arange(position, position + len(tokens)), (3, 1)))
            position += len(tokens)

        def show(image: ImageFile) -> None:
            nonlocal position
            put((ID["<|vision_start|>"],))
            rows, columns = image.grid
            ids.extend([ID["<|image_pad|>"]] * (rows * columns))
            targets.extend([IGNORE] * (rows * columns))
            row, column = np.divmod(np.arange(rows * columns), columns)
            axes.append(position + np.stack([np.zeros_like(row), row, column]))
            position += max(rows, columns)
            put((ID["<|vision_end|>"],))
            shown.append(image)

        start, end, newline = (ID["<|im_start|>"],), (ID["<|im_end|>"],), self._tokenize("\n")
        if conversation.system is not None:
            put(start + self._tokenize("system\n" + conversation.system) + end + newline)
        for turn in conversation.turns:
            put(start + self._tokenize("user\n"))
            if not turn.images_first:
                put(self._tokenize(turn.question))
            for image in turn.images:
                show(image)
            if turn.images_first:
                put(self._tokenize(turn.question))
            put(end + newline + start + self._tokenize("assistant\n"))
            before = len(ids)
            put(self._tokenize(turn.answer) + end, learn=True)
            spans.append((before, len(ids), turn.kind))
            put(newline)
        return Encoded(ids, targets, np.concatenate(axes, 1), spans, shown)


@dataclass
class Batch:
    """Padded conversations: ids and targets [B, T], positions [3, B, T]; images in order of appearance."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    images: list[ImageFile]
    spans: list[tuple[int, int, int, str]]


def collate(encoded: list[Encoded]) -> Batch:
    """Combine conversations, padded on the right, where a causal mask hides the padding from all real tokens."""
    longest = max(len(e.ids) for e in encoded)
    ids = np.full((len(encoded), longest), ID["<|endoftext|>"])
    targets = np.full((len(encoded), longest), IGNORE)
    positions = np.zeros((3, len(encoded), longest), np.int64)
    for i, e in enumerate(encoded):
        ids[i, : len(e.ids)] = e.ids
        targets[i, : len(e.ids)] = e.targets
        positions[:, i, : len(e.ids)] = e.positions
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        [p for e in encoded for p in e.images],
        [(i, a, b, kind) for i, e in enumerate(encoded) for a, b, kind in e.spans],
    )
