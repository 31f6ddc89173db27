"""The Muon optimizer (Jordan et al. 2024), in the precision that is fast on the CPU.

``torch.optim.Muon`` always orthogonalises in bfloat16, which takes most of a step on CPUs that only emulate it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum with an update that is made nearly orthogonal for each matrix, then scaled to the RMS of an AdamW update."""

    def __init__(self, params: Iterable[dict[str, Any]], dtype: torch.dtype) -> None:
        """``params`` are groups of matrices with ``weight_decay``; ``lr`` is set before each step.

        ``dtype`` is the precision of the iteration.
        """
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                update = orthogonalise(matrix.grad.lerp(momentum, _MOMENTUM).to(self._dtype))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * max(matrix.shape) ** 0.5
                matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return nearly the closest orthogonal matrix (Newton-Schulz); singular values end between about 0.7 and 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.T if tall else x
    return result
