"""The vision tower's forward pass over many images of one size at once.

The model's own forward pass runs attention image by image. If all images of a batch share a grid, one batched
matrix product does the same work several times faster on a CPU. This uses the model's own modules and gives the
same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel, apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

Grid = tuple[int, int]
"""Rows and columns of image tokens (32 x 32 pixels each)."""

PATCH, MERGE = 16, 2
CELL = PATCH * MERGE


def to_patches(pixels: np.ndarray) -> Tensor:
    """Cut images [B, H, W, 3] uint8 into patches [B, N, 3 * 16 * 16] float32 in -1 to 1.

    The order is that of the image processor: the 2 x 2 patches of an image token are adjacent. The two temporal
    copies of a still image are equal, so only one is kept.
    """
    batch, height, width, _ = pixels.shape
    rows, columns = height // CELL, width // CELL
    x = torch.from_numpy(pixels).float().div_(127.5).sub_(1)
    x = x.view(batch, rows, MERGE, PATCH, columns, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.reshape(batch, rows * columns * MERGE * MERGE, 3 * PATCH * PATCH)


class BatchedVision(nn.Module):
    """Runs ``visual`` over images that share a grid."""

    def __init__(self, visual: Qwen3VLVisionModel) -> None:
        super().__init__()
        self.visual = visual
        self._layouts: dict[Grid, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def _layout(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return position-grid indices and weights [N, 4] and rotary cos and sin [N, head]."""
        if grid not in self._layouts:
            thw = torch.tensor([[1, grid[0] * MERGE, grid[1] * MERGE]])
            indices, weights = get_vision_interpolation_indices_and_weights(
                thw,
                num_grid_per_side=self.visual.num_grid_per_side,
                mode=self.visual.interpolation_mode,
                align_corners=self.visual.interpolation_align_corners,
                spatial_merge_size=MERGE,
            )
            positions = get_vision_position_ids(thw, MERGE)
            cos, sin = self.visual.rotary_pos_emb(torch.zeros(1), positions)
            self._layouts[grid] = (indices, weights, cos, sin)
        return self._layouts[grid]

    def forward(self, patches: Tensor, grid: Grid) -> list[Tensor]:
        """Encode patches [B, N, 768]; return the merged output and each DeepStack level, [B, N / 4, H] each."""
        visual = self.visual
        indices, weights, cos, sin = self._layout(grid)
        kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both temporal copies are the same image
        x = nn.functional.linear(patches, kernel, visual.patch_embed.proj.bias)
        x = x + (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
        levels = []
        for index, block in enumerate(visual.blocks):
            x = x + self._attend(block.attn, block.norm1(x), cos, sin)
            x = x + block.mlp(block.norm2(x))
            if index in visual.deepstack_visual_indexes:
                levels.append(visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)](x))
        shape = (patches.shape[0], patches.shape[1] // MERGE**2, -1)
        return [level.view(shape) for level in (visual.merger(x), *levels)]

    @staticmethod
    def _attend(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = attention.num_heads
        q, k, v = attention.qkv(x).view(batch, length, 3, heads, -1).unbind(2)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # Plain products, because the backward pass of the fused attention kernel in bfloat16 is slow on CPUs.
        scores = torch.matmul(q, k.transpose(2, 3)) * attention.scaling
        mixed = torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
        projected: Tensor = attention.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return projected
