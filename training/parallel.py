"""Data-parallel steps over a few single-threaded processes of one machine."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient with its mean over the processes, in one message."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    present = [p for p in parameters if p.requires_grad]
    for p in present:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads: list[Tensor] = [p.grad for p in present if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int = 100, floor: float = 0.03) -> None:
    """Set each group's learning rate: linear warm-up, then a cosine down to ``floor`` of ``base``."""
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def groups(parts: list[tuple[nn.Module, float]], decay: float = 0.05) -> list[dict[str, object]]:
    """Return AdamW groups for (module, learning rate) pairs; vectors (norms and biases) are not decayed."""
    found: list[dict[str, object]] = []
    for module, rate in parts:
        for matrix in (True, False):
            chosen = [p for p in module.parameters() if (p.ndim > 1) == matrix]
            if chosen:
                found.append({"params": chosen, "base": rate, "lr": rate, "weight_decay": decay if matrix else 0.0})
    return found
