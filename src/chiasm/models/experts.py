"""The experts of a mixture, computed with packed weights.

The products are oneDNN's, and everything else is as in transformers' ``grouped_mm``, down to where numbers are rounded: rows
are grouped by expert, each expert's output is weighed and rounded, and a row's outputs are added up in float32. To add them up
one by one in bfloat16, as its ``eager`` does, is a fifth less exact and gives other answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chiasm.cores import cpu_flags
from chiasm.models.products import Form, Product, best_form, is_kept_packed_only, product

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = {"gate_up_proj", "down_proj"}


def pack_experts(mixture: Any, form: Form | None = None) -> None:
    """Have the experts of a mixture of transformers computed with packed weights, if that is the best form of their products.

    Weights that would be kept beside the packed ones stay as they are. Without ``form`` it is the best one.
    """
    if form is None:
        weight = next(mixture.experts.parameters())
        form = best_form(weight.dtype, weight.device, cpu_flags())
        del weight  # so that it is freed as soon as it is packed
    if _may_be_packed(mixture.experts, form):
        mixture.experts = PackedExperts(mixture.experts, form)


def _may_be_packed(experts: Any, form: Form) -> bool:
    weights = dict(experts.named_parameters())
    return weights.keys() == _WEIGHTS and all(is_kept_packed_only(form, weight[0]) for weight in weights.values())


class PackedExperts(nn.Module):
    """``down(act(gate(x)) * up(x))`` of the experts of each row, weighed. It takes the place of transformers' ``experts``."""

    def __init__(self, experts: Any, form: Form) -> None:
        """Pack the weights of ``experts``, which has none of its own any more."""
        super().__init__()
        self._activate = experts.act_fn
        self._gate_up = _take(experts, "gate_up_proj", form)
        self._down = _take(experts, "down_proj", form)

    def forward(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Take ``[T, hidden_size]``, and the experts of each row and their weights, ``[T, k]``; return ``[T, hidden_size]``."""
        per_row = chosen.shape[1]
        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=len(self._down)).tolist()
        outputs: list[Tensor] = []
        grouped = torch.split_with_sizes(rows.index_select(0, order // per_row), counts)
        for inputs, gate_up, down in zip(grouped, self._gate_up, self._down, strict=True):
            if len(inputs):
                gate, up = gate_up(inputs).chunk(2, dim=-1)
                outputs.append(down(self._activate(gate).mul_(up)))
        placed = rows.new_empty(len(experts), rows.shape[1]).index_copy_(0, order, torch.cat(outputs))
        return placed.view(len(rows), per_row, -1).mul_(weights[..., None]).sum(1)


def _take(experts: Any, name: str, form: Form) -> list[Product]:
    """Return the products with a weight of each expert, ``[experts, outputs, inputs]``, and let go of it."""
    computed = [product(weight, None, form)[0] for weight in getattr(experts, name).detach()]
    setattr(experts, name, nn.Parameter(torch.empty(0), requires_grad=False))
    return computed
