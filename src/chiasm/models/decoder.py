"""The decoder of a checkpoint, computed with few operators.

transformers loads the weights. What all decoders in ``TEXT_TYPES`` have in common is written here once: layers of attention
and MLP, each after an RMSNorm and added to its input, with rotary positions. A small model spends its time on calling
operators, so there are few of them: queries, keys and values are one product, gate and up are one, and queries and keys are
normalized and rotated together, in place; products are added to the input of their half of a layer.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from chiasm.errors import UnsupportedModelError
from chiasm.models.experts import pack_experts
from chiasm.models.products import MakeProduct, Product, product

if TYPE_CHECKING:
    from torch import Tensor

    from chiasm.models.base import Attention

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Rotation(NamedTuple):
    """What turns queries and keys by their positions: ``heads * cos + (heads rolled by half a head) * sin``."""

    cos: Tensor
    """``[T, 1, head_dim]``"""
    sin: Tensor
    """``[T, 1, head_dim]``; the first half is negative, as rotating takes the second half from the first."""


def take_layers(decoder: nn.Module, make: MakeProduct = product) -> list[Layer]:
    """Replace the layers of a decoder of transformers by those of this module, with the same weights, and return them.

    ``make`` makes their products, but for those of experts.
    Raises UnsupportedModelError if they have parts that are not known here, which would otherwise be left out.
    """
    layers: Any = decoder.layers
    for index, layer in enumerate(layers):
        layers[index] = Layer(layer, index, make)
    return list(layers)


class Layer(nn.Module):
    """One layer. It keeps the modules of transformers, whose weights are parts of the fused ones, under their names."""

    def __init__(self, layer: nn.Module, index: int, make: MakeProduct) -> None:
        super().__init__()
        parts = _children(layer)
        _check(layer, parts.keys(), required=_LAYER)
        self.input_layernorm = parts["input_layernorm"]
        self.self_attn = parts["self_attn"]
        self.post_attention_layernorm = parts["post_attention_layernorm"]
        self.mlp = parts["mlp"]
        self._index = index
        attention: Any = self.self_attn
        norms = _children(attention)
        _check(attention, norms.keys(), required=_ATTENTION, optional=_HEAD_NORMS)
        self._head_dim = int(attention.head_dim)
        self._scaling = float(attention.scaling)
        self._window = _window(attention)
        self._rows = tuple(part.weight.shape[0] for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        self._heads = tuple(rows // self._head_dim for rows in self._rows)
        self._before_attention = RMSNorm.of(self.input_layernorm)
        self._head_norm = self._norm_of_heads() if "q_norm" in norms else None
        self._qkv = _fuse(make, attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = _fuse(make, attention.o_proj)
        self._before_mlp = RMSNorm.of(self.post_attention_layernorm)
        if "experts" in _children(self.mlp):
            pack_experts(self.mlp)
        self._mlp: Product = _GatedMLP(self.mlp, make) if "gate_proj" in _children(self.mlp) else self._run_experts

    def forward(self, hidden: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """Take ``[T, hidden_size]``, which may be overwritten, and return as much."""
        queries, keys, values = self._heads
        heads = self._qkv(self._before_attention(hidden)).view(len(hidden), -1, self._head_dim)
        turning = heads[:, : queries + keys]
        if self._head_norm is not None:
            self._head_norm.apply_(turning)
        rolled = turning.roll(self._head_dim // 2, dims=-1)
        turning.mul_(rotation.cos).addcmul_(rolled, rotation.sin)
        query, fresh = torch.split_with_sizes(heads, (queries, keys + values), 1)
        attended = attention.attend(self._index, query, fresh, scaling=self._scaling, window=self._window)
        hidden = self._out(attended, hidden)
        return self._mlp(self._before_mlp(hidden), hidden)

    def _norm_of_heads(self) -> RMSNorm:
        """Return the norm of queries and keys together, which have different weights."""
        attention: Any = self.self_attn
        query, key = RMSNorm.of(attention.q_norm), RMSNorm.of(attention.k_norm)
        if query.eps != key.eps or len(query.weight) != self._head_dim:
            raise UnsupportedModelError(f"{type(attention).__name__} normalizes queries and keys in an unknown way.")
        weights = [norm.weight.expand(count, -1) for norm, count in zip((query, key), self._heads[:2], strict=True)]
        return RMSNorm(torch.cat(weights), query.eps)

    def _run_experts(self, rows: Tensor, onto: Tensor | None = None) -> Tensor:
        output: Tensor = self.mlp(rows[None])[0]
        return output if onto is None else onto.add_(output)


class RMSNorm:
    """Root mean square layer normalization (Zhang and Sennrich 2019), as transformers computes it: in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """``weight`` is ``[…, width]``."""
        self.weight = weight
        self.eps = eps
        self._width = weight.shape[-1]
        self._eps = torch.tensor(eps, device=weight.device)

    @classmethod
    def of(cls, module: Any) -> RMSNorm:
        """Raises UnsupportedModelError if the module of transformers is not such a norm."""
        if not type(module).__name__.endswith("RMSNorm") or {name for name, _ in module.named_parameters()} != {
            "weight"
        }:
            raise UnsupportedModelError(f"chiasm doesn't know the normalization {type(module).__name__}.")
        return cls(module.weight.detach(), float(module.variance_epsilon))

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.is_cuda:  # one kernel there; on a CPU it is a chain of operators, slower than this one
            return functional.rms_norm(rows, (self._width,), None, self.eps) * self.weight
        scaled = rows * self._scale(rows)
        if rows.dtype != torch.float32:
            scaled = scaled.to(rows.dtype)
        return scaled.mul_(self.weight)

    def apply_(self, rows: Tensor) -> None:
        """Write the normalized rows over the rows."""
        if rows.is_cuda:
            torch.mul(functional.rms_norm(rows, (self._width,), None, self.eps), self.weight, out=rows)
        else:
            rows.mul_(self._scale(rows)).mul_(self.weight)

    def _scale(self, rows: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(self._eps, norm, norm, value=1 / self._width).rsqrt_()


class Rotary:
    """Rotary positions (Su et al. 2021) on one axis, or on three (M-RoPE): each pair of columns turns by one of the axes."""

    def __init__(self, module: Any, head_dim: int, dtype: torch.dtype) -> None:
        """Take frequencies, scaling and axes from a module of transformers.

        Raises UnsupportedModelError if it turns only a part of the head, or combines axes in a way that isn't known.
        """
        frequencies: Tensor = module.inv_freq.float()
        if 2 * len(frequencies) != head_dim:
            raise UnsupportedModelError(
                f"{type(module).__name__} rotates {2 * len(frequencies)} of {head_dim} columns."
            )
        self._frequencies = torch.cat([frequencies, frequencies])
        scaling = float(module.attention_scaling)
        half = torch.full((head_dim // 2,), scaling, device=frequencies.device)
        self._signs = torch.cat([-half, half])
        self._scaling = scaling
        self._axes = _axes(module, head_dim)
        self._dtype = dtype

    def __call__(self, position_ids: Tensor) -> Rotation:
        """``position_ids`` is int64 ``[axes, T]``, or ``[1, T]`` where all axes are alike."""
        positions = position_ids.t()
        if positions.shape[1] > 1:
            positions = positions.index_select(1, self._axes)
        angles = positions * self._frequencies
        cos, sin = angles.cos(), angles.sin().mul_(self._signs)
        if self._scaling != 1:
            cos.mul_(self._scaling)
        if self._dtype != torch.float32:
            cos, sin = cos.to(self._dtype), sin.to(self._dtype)
        return Rotation(cos[:, None], sin[:, None])


def _axes(module: Any, head_dim: int) -> Tensor:
    """Return by which axis each column turns, int64 ``[head_dim]``: the module is shown a step along each axis alone."""
    device = module.inv_freq.device
    axes = torch.zeros(head_dim, dtype=torch.int64, device=device)
    # A config may leave the sections out; then the module has its own.
    if not hasattr(module, "mrope_section") and "mrope_section" not in (module.config.rope_parameters or {}):
        return axes
    turned = []
    for step in torch.eye(3, dtype=torch.int64, device=device):
        try:
            _, sin = module(torch.zeros(1, 1, 1, device=device), step.view(3, 1, 1))
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"The sections of {type(module).__name__} (mrope_section) don't make up {head_dim // 2} columns."
            ) from error
        if sin.numel() != head_dim:
            raise UnsupportedModelError(
                f"{type(module).__name__} of this version of transformers doesn't combine its axes."
            )
        turned.append(sin.view(head_dim) != 0)
    shown = torch.stack(turned)
    if not bool((shown.sum(0) == 1).all()):
        raise UnsupportedModelError(f"{type(module).__name__} turns columns by several axes.")
    return shown.int().argmax(0)


class _GatedMLP:
    """``down(act(gate(x)) * up(x))``"""

    def __init__(self, mlp: Any, make: MakeProduct) -> None:
        _check(mlp, _children(mlp).keys(), required=_MLP)
        self._width = mlp.gate_proj.weight.shape[0]
        self._activate = mlp.act_fn
        self._gate_up = _fuse(make, mlp.gate_proj, mlp.up_proj)
        self._down = _fuse(make, mlp.down_proj)

    def __call__(self, rows: Tensor, onto: Tensor | None = None) -> Tensor:
        gate, up = torch.split_with_sizes(self._gate_up(rows), (self._width, self._width), 1)
        return self._down(self._activate(gate).mul_(up), onto)


def _fuse(make: MakeProduct, *linears: nn.Linear) -> Product:
    """Return one product for several. The weights of the modules become views of the fused one, or nothing if it is packed."""
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise UnsupportedModelError(
            "Some of the projections that chiasm computes together have a bias, and others not."
        )
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    computed, is_packed = make(weight, bias)
    rows = [len(part) for part in weights]
    for linear, part in zip(linears, torch.split(weight, rows), strict=True):
        linear.weight = nn.Parameter(weight.new_empty(0) if is_packed else part, requires_grad=False)
    if bias is not None:
        for linear, part in zip(linears, torch.split(bias, rows), strict=True):
            linear.bias = nn.Parameter(part, requires_grad=False)
    return computed


def _window(attention: Any) -> int | None:
    """Return how many of the last tokens a layer attends to; None if it is all."""
    # Those of Mistral don't keep it themselves.
    holder = attention.config if attention.config.model_type == "mistral" else attention
    window: int | None = getattr(holder, "sliding_window", None)
    return window


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_children())


def _check(module: nn.Module, names: Set[str], *, required: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raise UnsupportedModelError unless a module has exactly the parts that are computed here."""
    name = type(module).__name__
    if unknown := names - required - optional:
        raise UnsupportedModelError(f"{name} has parts that chiasm doesn't know: {', '.join(sorted(unknown))}.")
    if missing := required - names:
        raise UnsupportedModelError(f"{name} lacks {', '.join(sorted(missing))}.")
