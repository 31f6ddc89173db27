"""A dense target for the vision tower: the shape or character whose centre is in each patch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from towers import Grid

from chiasm.demo import images

_CLASSES = {name: i + 1 for i, name in enumerate((*images.SHAPES, *"abcdefghijklmnopqrstuvwxyz", *"0123456789"))}
_EMPTY_WEIGHT = 0.05  # most patches contain no centre


class LocalHead(nn.Module):
    """Names what is in each of an image token's four patches; discarded after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, 4 * (len(_CLASSES) + 1))

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Map levels [tokens, H] to logits [4 * tokens, classes], in the order of patches."""
        logits: Tensor = self.linear(self.norm(torch.cat(levels, -1)))
        return logits.view(4 * logits.shape[0], -1).float()


def local_truth(drawn: list[tuple[list[images.Mark], Grid]]) -> Tensor:
    """Return the share of each class in each patch [patches, classes], image after image; class 0 means nothing."""
    found = []
    for marks, (rows, columns) in drawn:
        truth = np.zeros((rows * columns * 4, len(_CLASSES) + 1), np.float32)
        for mark in marks:
            row, column = min(int(mark.y * rows * 2), rows * 2 - 1), min(int(mark.x * columns * 2), columns * 2 - 1)
            token = (row // 2) * columns + column // 2
            truth[token * 4 + row % 2 * 2 + column % 2, _CLASSES[mark.name]] += 1
        found.append(truth)
    shares = np.concatenate(found)
    shares[:, 0] = shares.sum(-1) == 0
    return torch.from_numpy(shares / shares.sum(-1, keepdims=True))


def local_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the summed, weighted cross-entropy of all patches."""
    weight = torch.where(truth[:, 0] > 0, _EMPTY_WEIGHT, 1.0)
    return (nn.functional.cross_entropy(logits, truth, reduction="none") * weight).sum()


def local_score(logits: Tensor, truth: Tensor) -> tuple[int, int]:
    """Return how many patches with something in them were named correctly, and how many there are."""
    spots = truth[:, 0] == 0
    right = truth[spots].gather(1, logits[spots].argmax(-1, keepdim=True)).gt(0)
    return int(right.sum()), int(spots.sum())
