"""First stage: the vision tower alone learns to recognize what an image shows.

Temporary linear heads read the tower's merged output and its DeepStack levels. One names the shape or character
whose centre is in each patch. The other, over features resampled to a fixed grid, names the colour, shape, count,
position and text of the whole image. Without this stage, the whole model learns colours and positions in the same
time, but hardly shapes and text. Without the first head, the second takes much longer to learn shapes and
characters.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch
from parallel import Optimizers, Part, forward_precision
from samples import draw_grid, draw_pixels
from things import LocalHead, local_loss, local_score, local_truth
from torch import Tensor, nn
from towers import BatchedVision, Grid, to_patches
from transformers import Qwen3VLForConditionalGeneration

from chiasm.demo import images

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD_LENGTH, _NUMBER_LENGTH, _SIDE = 6, 3, 5
_IGNORE = -100
# (name, number of classes), in the order of the head's outputs
_TASKS: tuple[tuple[str, int], ...] = (
    ("content", 4),
    ("colour", len(images.COLOURS)),
    ("shape", len(images.SHAPES)),
    ("count", len(images.COUNTS)),
    ("position", len(images.POSITIONS)),
    ("word", len(images.WORDS)),
    *((f"letter{i}", len(_LETTERS) + 1) for i in range(_WORD_LENGTH)),
    *((f"digit{i}", 11) for i in range(_NUMBER_LENGTH)),
)


_MOST_PIXELS = 160 * 160  # somewhat larger than the images that the processor produces
_LOCAL_WEIGHT = 3.0
_TEXT_WEIGHT = 0.4  # for each task on text: it is learned late, and until then its gradients are mostly noise


def labels(scene: images.Scene) -> list[int]:
    """Return one class per task, or ``_IGNORE`` if the task does not apply."""
    found = {
        "content": ("shape", "shapes", "word", "number").index(scene.content),
        "colour": list(images.COLOURS).index(scene.colour),
    }
    if scene.content == "shapes" and scene.count == 1:
        del found["content"]  # looks just like a lone shape
    if scene.shape is not None and scene.count is not None:
        found |= {"shape": images.SHAPES.index(scene.shape), "count": scene.count - 1}
    if scene.position is not None:
        found["position"] = images.POSITIONS.index(scene.position)
    if scene.content == "word" and scene.text is not None:
        found["word"] = images.WORDS.index(scene.text)
        padded = scene.text.ljust(_WORD_LENGTH)
        found |= {f"letter{i}": _LETTERS.find(c) % 27 for i, c in enumerate(padded)}
    if scene.content == "number" and scene.text is not None:
        padded = scene.text.ljust(_NUMBER_LENGTH)
        found |= {f"digit{i}": int(c) if c.isdigit() else 10 for i, c in enumerate(padded)}
    return [found.get(name, _IGNORE) for name, _ in _TASKS]


class Head(nn.Module):
    """Linear classifiers of the whole image over features resampled to a 5 x 5 grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.narrow = nn.Linear(width, 96)
        self.linear = nn.Linear(96 * _SIDE * _SIDE, sum(n for _, n in _TASKS))

    def forward(self, levels: list[Tensor], grid: Grid) -> list[Tensor]:
        """Map levels [B, N, H] to one [B, classes] per task."""
        x = self.norm(torch.cat(levels, -1))
        x = self.narrow(x).transpose(1, 2).unflatten(2, grid).float()
        x = nn.functional.interpolate(x, (_SIDE, _SIDE), mode="bilinear", align_corners=True)
        return list(self.linear(x.flatten(1)).float().split([n for _, n in _TASKS], -1))


def _batch(rng: random.Random, size: int) -> tuple[Tensor, Tensor, Tensor, Grid]:
    grid = draw_grid(rng, small=0.7, most=_MOST_PIXELS)
    contents: tuple[images.Content, ...] = ("shape", "shapes", "shapes", "word", "word", "number", "number")
    scenes = [images.draw_scene(rng, rng.choice(contents)) for _ in range(size)]
    drawn = [draw_pixels(rng, scene, grid) for scene in scenes]
    truth = torch.tensor([labels(s) for s in scenes])
    things = local_truth([(marks, grid) for _, marks in drawn])
    return to_patches(np.stack([pixels for pixels, _ in drawn])), truth, things, grid


def train_vision(
    model: Qwen3VLForConditionalGeneration,
    *,
    steps: int,
    batch: int,
    seed: int,
    rank: int,
    log: Callable[[str], None],
    save: Callable[[], None],
    stop: int,
) -> None:
    """Train ``model.model.visual`` in place for ``stop`` steps of ``batch`` images per process.

    The learning rate falls as if there were ``steps``, because the next stage continues where this one stops.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"vision {seed} {rank}")
    visual = model.model.visual
    width = 3 * visual.config.out_hidden_size
    tower, head, local_head = BatchedVision(visual), Head(width), LocalHead(width)
    optimizers = Optimizers(
        [Part(visual, adam=1.5e-3, muon=4e-3), Part(head, adam=1.5e-3), Part(local_head, adam=1.5e-3)]
    )
    right, seen = torch.zeros(len(_TASKS) + 1), torch.zeros(len(_TASKS) + 1)
    started = time.monotonic()
    drawing = 0.0
    for step in range(stop):
        for _ in range(2):  # two grids per step, so that each step sees two sizes
            before = time.monotonic()
            patches, truth, things, grid = _batch(rng, batch // 2)
            drawing += time.monotonic() - before
            with forward_precision():
                levels = tower(patches, grid)
                outputs, local = head(levels, grid), local_head([level.flatten(0, 1) for level in levels])
            losses = [_LOCAL_WEIGHT * local_loss(local, things)]
            named, spots = local_score(local, things)
            right[-1] += named
            seen[-1] += spots
            for i, output in enumerate(outputs):
                known = truth[:, i] != _IGNORE
                if known.any():
                    loss = nn.functional.cross_entropy(output[known], truth[known, i], reduction="sum")
                    losses.append(loss * (_TEXT_WEIGHT if _TASKS[i][0].startswith(("word", "letter", "digit")) else 1))
                    right[i] += (output[known].argmax(-1) == truth[known, i]).sum()
                    seen[i] += known.sum()
            torch.autograd.backward(torch.stack(losses).sum() / batch)
        optimizers.step(step, step / steps)
        if (step + 1) % 200 == 0:
            names = (*(n for n, _ in _TASKS), "thing")
            share = [f"{n} {100 * r / max(s, 1):.0f}" for n, r, s in zip(names, right, seen, strict=True)]
            spent = time.monotonic() - started
            log(f"vision step {step + 1} of {steps}, {spent:.0f} s ({drawing:.0f} drawing): {', '.join(share)}")
            right.zero_(), seen.zero_()
        if (step + 1) % 500 == 0:
            save()
