"""Attention of many rows on a CPU, by products of oneDNN.

PyTorch's attention on a CPU has its float32 products computed by MKL, which is known to keep to AVX2 on AMD's CPUs, and takes
as long in bfloat16: on a Zen 5 it reaches two fifths and a fifth of what oneDNN's products do. So where oneDNN computes the
large products of a model (:mod:`chiasm.models.products`), it computes those of attention too: block by block of rows, each
with the softmax of its whole rows between the two products. For few rows, and on other devices, PyTorch's attention is faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from chiasm import cores
from chiasm.cores import cpu_flags
from chiasm.models.products import Form, best_form

if TYPE_CHECKING:
    from torch import Tensor

FEW_SCORES = 1 << 16
"""Scores for each KV head of which PyTorch computes attention faster: with more, further operators cost less than they gain."""
_BLOCK_SCORES = 1 << 21
"""Scores of a block. With more of them, it leaves the caches of a core."""
_FEWEST_ROWS, _CAUSAL_ROWS = 16, 128
"""Fewest rows of a block, and most under a causal mask: of the scores in a block's last columns, half are for nothing."""


def is_faster_in_blocks(query: Tensor, key: Tensor, *, is_causal: bool) -> bool:
    """Tell whether ``attend_in_blocks`` is faster than PyTorch's attention for tensors like these, on this machine."""
    rows, heads, _ = query.shape
    columns, kv_heads, _ = key.shape
    seen = columns - rows // 2 if is_causal else columns
    if rows * (heads // kv_heads) * seen <= FEW_SCORES:
        return False
    flags = cpu_flags()
    if query.dtype == torch.bfloat16 and "amx_bf16" in flags:
        return False  # PyTorch's attention uses AMX.
    return best_form(query.dtype, query.device, flags) is Form.PACKED


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    is_causal: bool,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``softmax(query · key * scaling + mask) · value``, ``[rows, heads, head_dim]``.

    ``query`` is ``[rows, heads, head_dim]``; ``key`` and ``value`` are ``[columns, kv_heads, head_dim]``, and ``heads`` is a
    multiple of ``kv_heads``. All are on the CPU, in float32 or bfloat16; scores are float32. With ``is_causal`` the rows
    belong to the last columns, and each attends to its own column and those before it: to all, or to ``window`` in all.
    ``mask``, additive ``[rows, columns]``, is for rows that attend to columns on both sides.
    """
    rows, heads, head_dim = query.shape
    columns, kv_heads, _ = key.shape
    group = heads // kv_heads
    # Query heads that share a KV head are rows of one product.
    queries = query.float().mul(scaling).view(rows, kv_heads, group, head_dim)
    keys = key.transpose(0, 1).float().contiguous()
    values = value.permute(1, 2, 0).contiguous()
    result = query.new_empty(rows, kv_heads, group, head_dim)
    size = max(_FEWEST_ROWS, _BLOCK_SCORES // (group * columns))
    if is_causal:
        size = min(size, _CAUSAL_ROWS)
    for start in range(0, rows, size):
        end = min(start + size, rows)
        first, last = 0, columns
        hidden = None if mask is None else mask[start:end]
        if is_causal:
            last -= rows - end
            if window is not None:
                first = max(0, last - (end - start) - window + 1)
            hidden = _causal_mask(end - start, last - first, window)
        for head in range(kv_heads):
            cores.adapt()
            scores = _product(queries[start:end, head].reshape(-1, head_dim), keys[head, first:last])
            if hidden is not None:
                scores.view(end - start, group, -1)[..., -hidden.shape[1] :] += hidden[:, None]
            torch.softmax(scores, -1, out=scores)
            # A view of some columns isn't taken: oneDNN computes with it a hundred times as long.
            attended = _product(scores.to(value.dtype), values[head, :, first:last].contiguous())
            result[start:end, head] = attended.view(end - start, group, head_dim)
    return result.view(rows, heads, head_dim)


def _causal_mask(rows: int, columns: int, window: int | None) -> Tensor:
    """Return the additive mask of a block's rows for those of its last columns that some of them don't see."""
    masked = rows if window is None else columns
    hidden = torch.full((rows, masked), float("-inf")).triu_(masked - rows + 1)
    if window is not None:
        hidden += torch.full((rows, masked), float("-inf")).tril_(masked - rows - window)
    return hidden


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``rows · weightᵀ`` of two contiguous matrices."""
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise.default(rows, weight, None, "none", [], ""))
