"""Matrix products with weights that never change: as they are, or packed once for oneDNN where that is faster.

PyTorch hands float32 products to MKL, which is as fast as memory for one row, and as fast as anything for hundreds of rows if
it uses the widest vectors of the CPU. Two kinds of work are better left to oneDNN, which needs weights in an order of its own:

- a few rows, as in a batch that decodes, for which MKL takes up to twice as long (measured on a Zen 3);
- everything on CPUs with AVX-512, which MKL doesn't use on those of AMD.

A weight is kept in one of the two forms, never in both, so packing takes no memory. The choice depends on the CPU, the dtype
and the shape, and not on a measurement, so that all instances on the same kind of CPU compute the same bits.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Set
from typing import TYPE_CHECKING

import torch
from torch import nn

from chiasm.cores import cpu_flags, has_native_bfloat16

if TYPE_CHECKING:
    from torch import Tensor

LEAST_BYTES = 1 << 20
"""Size of the smallest weight that is packed: a call of oneDNN costs more than what smaller ones gain."""
_ROWS = 32
"""The number of rows that the packed order is made for; others are computed with it too."""

Product = Callable[["Tensor"], "Tensor"]
"""Takes ``[rows, inputs]`` and returns ``[rows, outputs]``."""


class Packing(enum.Enum):
    """Which weights are packed."""

    NONE = enum.auto()
    WIDE = enum.auto()
    """Those with at least as many outputs as inputs: for one row, packed ones with fewer are slower than MKL."""
    ALL = enum.auto()


def packing_of(dtype: torch.dtype, device: torch.device, flags: Set[str]) -> Packing:
    """Return what to pack on a device, a CPU with these flags if it is one."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return Packing.NONE
    if dtype == torch.bfloat16:
        return Packing.ALL if has_native_bfloat16(flags) else Packing.NONE
    if dtype != torch.float32:
        return Packing.NONE
    if "avx512f" in flags:
        return Packing.ALL
    return Packing.WIDE if "avx2" in flags else Packing.NONE


def product(weight: Tensor, bias: Tensor | None, packing: Packing | None = None) -> tuple[Product, bool]:
    """Return the product with ``weight`` ``[outputs, inputs]``, and whether it holds a packed copy instead of the weight.

    ``packing`` is what fits the weight's device and dtype if it is None.
    """
    if packing is None:
        packing = packing_of(weight.dtype, weight.device, cpu_flags())
    outputs, inputs = weight.shape
    is_chosen = packing is Packing.ALL or (packing is Packing.WIDE and outputs >= inputs)
    if is_chosen and weight.numel() * weight.itemsize >= LEAST_BYTES:
        return _packed(weight.detach(), bias), True
    transposed = weight.t()
    if bias is None:
        return lambda rows: torch.mm(rows, transposed), False
    return lambda rows: torch.addmm(bias, rows, transposed), False


def _packed(weight: Tensor, bias: Tensor | None) -> Product:
    compute = torch.ops.mkldnn._linear_pointwise.default
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def packed_product(rows: Tensor) -> Tensor:
        result: Tensor = compute(rows, packed, bias, "none", [], "")
        return result

    return packed_product


class PackedLinear(nn.Module):
    """Stands in a model of transformers for an ``nn.Linear`` whose weight is packed."""

    def __init__(self, linear: nn.Linear, compute: Product) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._compute = compute

    def forward(self, rows: Tensor) -> Tensor:
        """Take ``[…, inputs]`` and return ``[…, outputs]``."""
        return self._compute(rows)


def pack_linears(module: nn.Module, flags: Set[str] | None = None) -> None:
    """Replace the linear layers of a model that computes many rows at once, if packed weights are faster for those too.

    ``flags`` are the CPU's; None: this one's.
    """
    flags = cpu_flags() if flags is None else flags
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and packing_of(child.weight.dtype, child.weight.device, flags) is Packing.ALL:
                compute, is_packed = product(child.weight, child.bias, Packing.ALL)
                if is_packed:
                    setattr(parent, name, PackedLinear(child, compute))
