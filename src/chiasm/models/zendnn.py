"""Packed products of ZenDNN, AMD's library, which comes with the package ``zentorch``.

A step that decodes reads all weights for a few rows. Where they come from memory, oneDNN reads them at less than half of the
memory's speed on a Zen 4; ZenDNN's products of few rows take 0.6 to 0.87 of its time there, and those of many rows as long.

The package itself is not imported, since that would load PyTorch's compiler and add to the log. Its library has the operators.
"""

from __future__ import annotations

import functools
import importlib.metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from chiasm import cores
from chiasm.errors import ConfigurationError
from chiasm.extras import Extra, require
from chiasm.models.products import MakeProduct, Product, product

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE, _LIBRARY = "zentorch", "libzentorch.so"


def product_of_zendnn(user: str) -> MakeProduct:
    """Return what makes products that are ZenDNN's where others are oneDNN's. ``user`` is the option that asks for it.

    Raises ConfigurationError if it isn't installed, doesn't suit this PyTorch, or is of no use on this CPU.
    """
    require(Extra.ZEN, user)
    if cores.cpu_vendor() != "AMD" or "avx512f" not in cores.cpu_flags():
        raise ConfigurationError(f"{user} is for AMD's CPUs with AVX-512, and this CPU isn't one; leave it out.")
    _load(user)
    return functools.partial(product, pack=_packed)


@functools.cache
def _load(user: str) -> None:
    spec = find_spec(_PACKAGE)
    folder = Path(next(iter((spec and spec.submodule_search_locations) or ()), ""))
    try:
        torch.ops.load_library(folder / _LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        version = ".".join(torch.__version__.split(".")[:2])
        raise ConfigurationError(
            f"{user}: zentorch {importlib.metadata.version(_PACKAGE)} can't be loaded with PyTorch {torch.__version__}: "
            f"{error}. Install one for this PyTorch: pip install 'zentorch=={version}.*'."
        ) from error


def _packed(weight: Tensor, bias: Tensor | None) -> Product:
    operators: Any = torch.ops.zentorch
    alone = operators.zentorch_linear_unary.default
    added = operators.zentorch_linear_unary_binary.default
    packed = operators.zentorch_weight_prepack_for_linear.default(weight)

    def compute(rows: Tensor, onto: Tensor | None = None) -> Tensor:
        cores.adapt()
        if onto is not None:
            return cast("Tensor", added(rows, packed, onto, bias, is_weight_prepacked=True, post_op_2="add"))
        return cast("Tensor", alone(rows, packed, bias, is_weight_prepacked=True))

    return compute
