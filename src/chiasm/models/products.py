"""Matrix products with weights that never change, in the form that is fastest on the CPU.

PyTorch hands float32 products to MKL, which is as fast as memory for one row. For more rows there are better ways:

- MKL takes up to twice as long for a few rows of a wide product as for the same product in strips of some outputs each, and a
  tenth longer for hundreds (measured on a Zen 3).
- On AMD's CPUs with AVX-512, MKL is known to keep to AVX2. oneDNN doesn't; it needs weights in an order of its own, into
  which they are packed once. On a Zen 5, products with packed weights take 0.7 of MKL's time for one row, and less than half of
  it for more. With AVX2 alone, packed weights are slower for one row, and for more rows no faster than strips.
- A call of oneDNN takes 10 µs. So MKL is faster where there is little to multiply.

A large weight is kept in one form, so it takes no more memory; small ones in float32 are kept as they are and packed. The form
depends on the CPU, the dtype and the shape, and not on a measurement, so that all instances on the same kind of CPU compute
alike.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from chiasm import cores
from chiasm.cores import cpu_flags, has_native_bfloat16

if TYPE_CHECKING:
    from torch import Tensor

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
LEAST_BYTES_IN_STRIPS = 1 << 20
"""Size of the smallest weight that is used in strips: further calls cost more than what smaller ones gain."""
LEAST_PACKED = 1 << 14
"""Numbers in the smallest weight that is packed."""
FEW_MULTIPLICATIONS = 1 << 19
"""Rows times numbers in the weight from which oneDNN is faster in float32, measured on a Zen 5 for weights of any shape."""
_STRIP = 256
"""Outputs that each thread computes at a time."""
_PACKED_ROWS = 32
"""The number of rows that the packed order is made for; others are computed with it too."""


class Product(Protocol):
    """A product with a weight."""

    def __call__(self, rows: Tensor, onto: Tensor | None = None, /) -> Tensor:
        """Take ``[rows, inputs]`` and return ``[rows, outputs]``, added to ``onto``, which may be overwritten."""


MakePacked = Callable[["Tensor", "Tensor | None"], Product]
"""Takes a weight ``[outputs, inputs]`` and a bias, and returns their product in the order of a library."""
MakeProduct = Callable[["Tensor", "Tensor | None"], tuple[Product, bool]]
"""What :func:`product` is without a form."""


class Form(enum.Enum):
    """How products with a weight are computed."""

    PLAIN = enum.auto()
    STRIPS = enum.auto()
    PACKED = enum.auto()


def best_form(dtype: torch.dtype, device: torch.device, flags: Set[str]) -> Form:
    """Return the form for large weights on a device, which is a CPU with these flags if it is one."""
    if device.type != "cpu":
        return Form.PLAIN
    if dtype == torch.bfloat16:
        return Form.PACKED if HAS_ONEDNN and has_native_bfloat16(flags) else Form.PLAIN
    if dtype != torch.float32:
        return Form.PLAIN
    if HAS_ONEDNN and "avx512f" in flags:
        return Form.PACKED
    return Form.STRIPS if "avx2" in flags else Form.PLAIN


def is_packed_in(form: Form, weight: Tensor) -> bool:
    """Tell whether products with a weight are oneDNN's, where this is the form of large ones."""
    return form is Form.PACKED and weight.numel() >= LEAST_PACKED


def is_kept_packed_only(form: Form, weight: Tensor) -> bool:
    """Tell whether products with a weight have no use for the weight itself, where this is the form of large ones."""
    return is_packed_in(form, weight) and (weight.dtype != torch.float32 or weight.numel() >= FEW_MULTIPLICATIONS)


def product(
    weight: Tensor, bias: Tensor | None, form: Form | None = None, *, pack: MakePacked | None = None
) -> tuple[Product, bool]:
    """Return the product with ``weight`` ``[outputs, inputs]``, and whether it has no more use for the weight itself.

    Without ``form`` it is the best one. ``pack`` makes packed products, by default those of oneDNN.
    """
    if form is None:
        form = best_form(weight.dtype, weight.device, cpu_flags())
    if is_packed_in(form, weight):
        packed = (pack or _packed)(weight.detach(), bias)
        if is_kept_packed_only(form, weight):
            return packed, True
        return _plain_or_packed(weight, _plain(weight, bias), packed), False
    if form is Form.STRIPS and weight.numel() * weight.itemsize >= LEAST_BYTES_IN_STRIPS:
        return _Strips(weight, bias), False
    return _plain(weight, bias), False


def forget_weight(layer: nn.Linear | nn.Conv2d | nn.Conv3d) -> None:
    """Let go of the weight of a layer, which a product with it has no more use for."""
    layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


def _plain(weight: Tensor, bias: Tensor | None) -> Product:
    transposed = weight.t()

    def compute(rows: Tensor, onto: Tensor | None = None) -> Tensor:
        cores.adapt()
        if onto is not None:
            return _add(rows, transposed, bias, onto)
        return torch.mm(rows, transposed) if bias is None else torch.addmm(bias, rows, transposed)

    return compute


def _add(rows: Tensor, transposed: Tensor, bias: Tensor | None, onto: Tensor) -> Tensor:
    onto.addmm_(rows, transposed)
    return onto if bias is None else onto.add_(bias)


def _plain_or_packed(weight: Tensor, plain: Product, packed: Product) -> Product:
    least = -(-FEW_MULTIPLICATIONS // weight.numel())

    def compute(rows: Tensor, onto: Tensor | None = None) -> Tensor:
        return (plain if len(rows) < least else packed)(rows, onto)

    return compute


def product_with_gelu(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the packed product with ``weight``, followed by GELU as tanh approximates it: ``[rows, inputs]`` to outputs."""
    compute = torch.ops.mkldnn._linear_pointwise.default
    packed = _pack(weight.detach())

    def compute_gelu(rows: Tensor) -> Tensor:
        cores.adapt()
        return cast("Tensor", compute(rows, packed, bias, "gelu", [], "tanh"))

    return compute_gelu


def _pack(weight: Tensor) -> Tensor:
    return cast("Tensor", torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS))


def _packed(weight: Tensor, bias: Tensor | None) -> Product:
    alone = torch.ops.mkldnn._linear_pointwise.default
    added = torch.ops.mkldnn._linear_pointwise.binary
    packed = _pack(weight)

    def compute(rows: Tensor, onto: Tensor | None = None) -> Tensor:
        cores.adapt()
        if onto is not None:
            return cast("Tensor", added(rows, onto, packed, bias, "add"))
        return cast("Tensor", alone(rows, packed, bias, "none", [], ""))

    return compute


class _Strips:
    """A product of one row at once, of more in strips of outputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self._whole = _plain(weight, bias)
        self._strips: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        """Transposed weights and biases, by the number of outputs of a strip."""

    def __call__(self, rows: Tensor, onto: Tensor | None = None) -> Tensor:
        cores.adapt()
        width = _STRIP * torch.get_num_threads()
        outputs = len(self._weight)
        if len(rows) == 1 or width >= outputs:
            return self._whole(rows, onto)
        result = rows.new_empty(len(rows), outputs) if onto is None else onto
        for (weight, bias), part in zip(self._of_width(width), torch.split(result, width, 1), strict=True):
            if onto is not None:
                _add(rows, weight, bias, part)
            elif bias is None:
                torch.mm(rows, weight, out=part)
            else:
                torch.addmm(bias, rows, weight, out=part)
        return result

    def _of_width(self, width: int) -> list[tuple[Tensor, Tensor | None]]:
        strips = self._strips.get(width)
        if strips is None:
            weights = [weight.t() for weight in torch.split(self._weight, width)]
            biases: Sequence[Tensor | None] = [None] * len(weights)
            if self._bias is not None:
                biases = torch.split(self._bias, width)
            strips = self._strips[width] = list(zip(weights, biases, strict=True))
        return strips
