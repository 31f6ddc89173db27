"""Vision towers of transformers, made fast on a CPU.

The modules stay. What is replaced is how the layers compute that take the time: linear layers, the activation after one, the
convolution that embeds patches, and attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chiasm.cores import cpu_flags
from chiasm.models.dot_product_attention import attend_in_blocks, is_faster_in_blocks
from chiasm.models.products import Form, best_form, forget_weight, is_packed_in, product, product_with_gelu

ATTENTION = "chiasm_vision"
"""The name of the attention of towers, for transformers."""
_NOT_IN_BLOCKS = ("softcap", "position_bias", "cache")
"""What transformers may ask of attention and only its own computes."""
_MLPS = (("fc1", "activation_fn", "fc2"), ("linear_fc1", "act_fn", "linear_fc2"))
"""The parts of a module that computes ``second(activation(first(x)))``."""


def speed_up(module: nn.Module, flags: Set[str] | None = None) -> None:
    """Have the layers of a tower compute in the best form. The weights of packed ones are empty then.

    ``flags`` are the CPU's; None: this one's.
    """
    flags = cpu_flags() if flags is None else flags
    fused = [_fuse_gelu(layer, flags) for layer in module.modules()]
    for layer in module.modules():
        if type(layer) is nn.Linear and layer not in fused:  # no subclass, which may compute something else
            _replace_linear(layer, flags)
        elif isinstance(layer, nn.Conv2d | nn.Conv3d):
            _replace_convolution(layer, flags)


def _fuse_gelu(mlp: nn.Module, flags: Set[str]) -> nn.Linear | None:
    """Have the first product of an MLP compute the activation too, if that is GELU with tanh, and return its layer.

    oneDNN does that while the results are in the CPU's registers. By itself, this GELU takes a third of the product's time.
    """
    for names in _MLPS:
        if {name for name, _ in mlp.named_children()} != set(names):
            continue
        first, activation = getattr(mlp, names[0]), getattr(mlp, names[1])
        is_gelu = type(activation) is type(ACT2FN["gelu_pytorch_tanh"])
        if not is_gelu or type(first) is not nn.Linear:
            continue
        if is_packed_in(best_form(first.weight.dtype, first.weight.device, flags), first.weight):
            _compute(first, product_with_gelu(first.weight, first.bias), is_packed=True)
            setattr(mlp, names[1], nn.Identity())
            return first
    return None


def _replace_linear(linear: nn.Linear, flags: Set[str]) -> None:
    form = best_form(linear.weight.dtype, linear.weight.device, flags)
    if form is not Form.PLAIN:
        compute, is_packed = product(linear.weight, linear.bias, form)
        _compute(linear, compute, is_packed=is_packed)


def _compute(linear: nn.Linear, compute: Callable[[Tensor], Tensor], *, is_packed: bool) -> None:
    def forward(inputs: Tensor) -> Tensor:
        return compute(inputs.reshape(-1, inputs.shape[-1])).view(*inputs.shape[:-1], -1)

    linear.forward = forward  # type: ignore[method-assign, assignment]
    if is_packed:
        forget_weight(linear)


def _replace_convolution(convolution: nn.Conv2d | nn.Conv3d, flags: Set[str]) -> None:
    """Have a convolution of patches that don't overlap compute as one product of all patches.

    oneDNN's convolution of 1024 patches of 16 x 16 pixels took seven times as long on a Zen 5.
    """
    form = best_form(convolution.weight.dtype, convolution.weight.device, flags)
    size = convolution.kernel_size
    is_of_patches = (
        size == convolution.stride
        and convolution.groups == 1
        and convolution.padding in ("valid", (0,) * len(size))
        and convolution.dilation == (1,) * len(size)
    )
    if form is Form.PLAIN or not is_of_patches:
        return
    compute, is_packed = product(convolution.weight.flatten(1), convolution.bias, form)

    def forward(inputs: Tensor) -> Tensor:
        patches = inputs
        for axis, side in enumerate(size, start=2):
            patches = patches.unfold(axis, side, side)
        # [batch, channels, *counts, *size] -> [batch, *counts, channels, *size]
        patches = patches.movedim(1, len(size) + 1)
        places = patches.shape[: len(size) + 1]
        return compute(patches.reshape(math.prod(places), -1)).view(*places, -1).movedim(-1, 1)

    convolution.forward = forward  # type: ignore[method-assign, assignment]
    if is_packed:
        forget_weight(convolution)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute what transformers' ``sdpa`` does.

    ``query``, ``key`` and ``value`` are ``[batch, heads, rows, head_dim]``; returns ``[batch, rows, heads, head_dim]``.
    """
    images = [states.transpose(1, 2) for states in (query, key, value)]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask, expected = attention_mask, (1, query.shape[2], key.shape[2])
    is_simple = not is_causal and all(options.get(name) is None for name in _NOT_IN_BLOCKS)
    is_simple = is_simple and (mask is None or (mask.is_floating_point() and mask.shape[1:] == expected))
    if not (is_simple and is_faster_in_blocks(images[0][0], images[1][0], is_causal=False)):
        options |= {"scaling": scaling, "is_causal": is_causal}
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    attended = [
        attend_in_blocks(
            *image,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            is_causal=False,
            mask=None if mask is None else mask[min(number, len(mask) - 1), 0],
        )
        for number, image in enumerate(zip(*images, strict=True))
    ]
    return torch.stack(attended), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
