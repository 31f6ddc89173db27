"""Training images, in the grid sizes that the image processor produces."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image
from recipe import MAX_PIXELS, MIN_PIXELS
from towers import CELL, Grid
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from chiasm.demo import images

_SMALL: tuple[Grid, ...] = ((3, 3), (3, 3), (3, 4), (4, 3), (4, 4), (3, 5), (5, 3))


def draw_grid(rng: random.Random, small: float = 0.5, most: int = MAX_PIXELS) -> Grid:
    """Choose a grid: with probability ``small`` one of the small, cheap ones, otherwise that of a drawn canvas."""
    if rng.random() < small:
        return rng.choice(_SMALL)
    width, height = images.draw_size(rng)
    height, width = smart_resize(height, width, CELL, MIN_PIXELS, most)
    return height // CELL, width // CELL


def draw_pixels(rng: random.Random, scene: images.Scene, grid: Grid) -> tuple[np.ndarray, list[images.Mark]]:
    """Draw ``scene``, scale it to ``grid``, and return pixels [H, W, 3] uint8 and the marks of what was drawn where.

    Canvases are up to twice as large as the grid, and their aspect ratio differs a little from it, as that of uploads does.
    """
    height, width = grid[0] * CELL, grid[1] * CELL
    scale = 1.0 if rng.random() < 0.5 else rng.uniform(1.0, 2.0)
    stretch = rng.uniform(0.9, 1.1)
    canvas = max(96, round(width * scale * stretch)), max(96, round(height * scale / stretch))
    image, marks = images.draw_marked(rng, scene, canvas)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image), marks
