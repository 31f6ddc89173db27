"""Data-parallel training steps in a few single-threaded processes on one machine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from muon import Muon
from torch import Tensor, nn


def fast_dtype() -> torch.dtype:
    """Return bfloat16 if the CPU supports it; otherwise float32, because emulated bfloat16 is twenty times slower."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def forward_precision() -> torch.autocast:
    """Return the context in which to run the forward pass."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)


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
    for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


class Clock:
    """Progress of a stage from 0 to 1, the same in every process.

    It follows the steps, or the first process's wall clock if ``minutes`` is given: the stage then ends in time even
    on a busy machine, but is not repeatable step by step.
    """

    def __init__(self, steps: int, minutes: float | None = None) -> None:
        self.steps, self.minutes = steps, minutes
        self._started = time.monotonic()

    def __call__(self, step: int) -> float:
        """Return the progress before ``step``, and at least 1 at the end."""
        if self.minutes is None:
            return step / self.steps
        passed = torch.tensor((time.monotonic() - self._started) / 60 / self.minutes)
        if dist.is_initialized():
            dist.broadcast(passed, 0)
        return passed.item()


@dataclass(frozen=True)
class Part:
    """A module to train, with its learning rates for AdamW and, for the matrices in its repeated blocks, for Muon."""

    module: nn.Module
    adam: float
    muon: float = 0.0


class Optimizers:
    """AdamW for embeddings, norms, biases and projections, Muon for the matrices inside the blocks.

    In short runs of the first stage, Muon was slightly better than AdamW alone. Outside the blocks, orthogonalising
    the larger matrices would cost more than it gains.
    """

    def __init__(self, parts: list[Part], decay: float = 0.05) -> None:
        adam: list[dict[str, Any]] = []
        muon: list[dict[str, Any]] = []
        self.parameters: list[nn.Parameter] = []
        for part in parts:
            chosen: dict[str, list[nn.Parameter]] = {"muon": [], "matrix": [], "vector": []}
            for name, parameter in part.module.named_parameters():
                inner = parameter.ndim == 2 and ("blocks." in name or "layers." in name) and part.muon > 0
                chosen["muon" if inner else "matrix" if parameter.ndim > 1 else "vector"].append(parameter)
                self.parameters.append(parameter)
            muon.append({"params": chosen["muon"], "base": part.muon, "weight_decay": decay})
            adam.append({"params": chosen["matrix"], "base": part.adam, "weight_decay": decay})
            adam.append({"params": chosen["vector"], "base": part.adam, "weight_decay": 0.0})
        self._all: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, betas=(0.9, 0.98), fused=True)]
        muon = [group for group in muon if group["params"]]
        if muon:
            self._all.append(Muon(muon, fast_dtype()))

    def step(self, step: int, progress: float, warmup: int = 60, floor: float = 0.02) -> None:
        """Average the gradients over the processes, clip them and update every parameter.

        The rate rises linearly over ``warmup`` steps, and falls as a cosine of ``progress`` (0 to 1) to
        ``floor`` of its base.
        """
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
            optimizer.step()
            optimizer.zero_grad()
