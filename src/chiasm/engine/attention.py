"""Attention over a paged KV cache, plugged into transformers' models through ``AttentionInterface``.

The model classes of transformers call the registered function in every layer with the rows of the whole step, all requests
flattened into one sequence: first one row for each decoding request, then the chunk of each prefilling one.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from chiasm.errors import ConfigurationError
from chiasm.models.base import ATTENTION_NAME

if TYPE_CHECKING:
    from torch import Tensor

    from chiasm.models.base import LanguageModel


class KVCache:
    """Keys and values of all layers, in ``num_blocks`` blocks of ``block_size`` token slots.

    A block is one piece of memory, ``[num_layers, 2, block_size, num_kv_heads, head_dim]``, so that moving a block moves one
    piece. ``keys[layer]`` and ``values[layer]`` are ``[slots, num_kv_heads, head_dim]``, views that begin where that
    layer's part of block 0 begins; in each of them token ``i`` of a request is at slot
    ``block_ids[i // block_size] * slots_per_block + i % block_size``.
    """

    def __init__(
        self,
        language: LanguageModel,
        *,
        num_blocks: int,
        block_size: int,
        allocate: Callable[[int], Tensor | None] | None = None,
    ) -> None:
        """``allocate`` returns zeroed memory, uint8 ``[num_bytes]`` on the model's device, or None for ordinary memory.

        Raises ConfigurationError if there is not enough memory.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.slots_per_block = 2 * language.num_layers * block_size
        num_bytes = num_blocks * self.bytes_per_block(language, block_size)
        try:
            # Zeros, not empty: padded rows of a decode batch read slot 0 under a mask, and NaN would survive the mask.
            memory = None if allocate is None else allocate(num_bytes)
            if memory is None:
                memory = zeroed(num_bytes, language.device)
        except (RuntimeError, OSError) as error:  # on CUDA torch.OutOfMemoryError, a RuntimeError; on CPU a plain one
            raise ConfigurationError(
                f"There is not enough memory on {language.device} for a KV cache of {num_blocks} blocks of {block_size} "
                "tokens; lower --kv-cache-bytes."
            ) from error
        self.blocks = memory.view(num_blocks, -1)
        """uint8 ``[num_blocks, bytes_per_block]``: the same memory."""
        slots = memory.view(language.dtype).view(-1, language.num_kv_heads, language.head_dim)
        self.keys = [slots[2 * layer * block_size :] for layer in range(language.num_layers)]
        self.values = [slots[(2 * layer + 1) * block_size :] for layer in range(language.num_layers)]

    @staticmethod
    def bytes_per_block(language: LanguageModel, block_size: int) -> int:
        """Return the size of one block: keys and values of all layers."""
        slot_bytes = language.num_kv_heads * language.head_dim * language.dtype.itemsize
        return 2 * language.num_layers * block_size * slot_bytes


def zeroed(num_bytes: int, device: torch.device) -> Tensor:
    """Return zeroed memory, uint8 ``[num_bytes]``; on CPU it takes none of the machine's before it is used.

    Raises RuntimeError or OSError if there is not enough.
    """
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    # torch.zeros would write to all of it. The kernel gives zeroed pages at the first access.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass(frozen=True)
class PrefillSegment:
    """One request's chunk: rows ``[start, end)`` of the step. They attend to ``slots``: context first, then themselves."""

    start: int
    end: int
    slots: Tensor
    """int64 [context + (end - start)] on the cache's device."""

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def num_context(self) -> int:
        return self.slots.shape[0] - self.num_rows


@dataclass
class AttentionStep:
    """What attention needs to know about one step. Its rows are the decodes first, then the prefill segments in order."""

    cache: KVCache
    slots: Tensor
    """int64 [T]: the slot for each row's key and value."""
    prefills: list[PrefillSegment]
    decode_slots: Tensor | None = None
    """int64 [B, longest]: the slots that each decoding request attends to, its own included, padded with 0."""
    decode_lengths: Tensor | None = None
    """int64 [B]: how many of them are not padding."""
    _masks: dict[object, Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask ``[B, 1, 1, longest]``, made once per step and window."""
        key = ("decode", window, dtype)
        if key not in self._masks:
            assert self.decode_slots is not None
            assert self.decode_lengths is not None
            index = torch.arange(self.decode_slots.shape[1], device=self.decode_slots.device)
            length = self.decode_lengths[:, None]
            visible = index < length
            if window is not None:
                visible &= index >= length - window
            self._masks[key] = _additive(visible, dtype)[:, None, None, :]
        return self._masks[key]

    def prefill_mask(self, segment: PrefillSegment, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive causal mask ``[rows, context + rows]``, made once per step, segment and window."""
        key = (segment.start, window, dtype)
        if key not in self._masks:
            device = segment.slots.device
            row = torch.arange(segment.num_context, segment.slots.shape[0], device=device)[:, None]
            column = torch.arange(segment.slots.shape[0], device=device)
            visible = column <= row
            if window is not None:
                visible &= column > row - window
            self._masks[key] = _additive(visible, dtype)
        return self._masks[key]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: AttentionStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write the step's keys and values to the cache, and attend to it.

    ``query`` is ``[1, Hq, T, D]``, ``key`` and ``value`` ``[1, Hkv, T, D]`` after rotary embedding; the result is
    ``[1, T, Hq, D]``. ``attention_mask`` is always None: no mask is registered for this name.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    keys.index_copy_(0, paged.slots, key[0].transpose(0, 1))
    values.index_copy_(0, paged.slots, value[0].transpose(0, 1))
    num_heads, num_rows, head_dim = query.shape[1:]
    num_kv_heads = key.shape[1]
    output = query.new_empty(1, num_rows, num_heads, head_dim)

    if paged.decode_slots is not None:
        batch, longest = paged.decode_slots.shape
        flat = paged.decode_slots.reshape(-1)
        shape = (batch, longest, num_kv_heads, head_dim)
        # Query heads that share a KV head are rows of one small attention, so the cache is never repeated.
        attended = scaled_dot_product_attention(
            query[0, :, :batch].transpose(0, 1).reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim),
            keys.index_select(0, flat).view(shape).transpose(1, 2),
            values.index_select(0, flat).view(shape).transpose(1, 2),
            attn_mask=paged.decode_mask(sliding_window, query.dtype),
            scale=scaling,
        )
        output[0, :batch] = attended.reshape(batch, num_heads, head_dim)

    for segment in paged.prefills:
        rows = slice(segment.start, segment.end)
        fresh = segment.num_context == 0
        if fresh:
            seen_keys, seen_values = key[:, :, rows], value[:, :, rows]
        else:
            seen_keys = keys.index_select(0, segment.slots).transpose(0, 1)[None]
            seen_values = values.index_select(0, segment.slots).transpose(0, 1)[None]
        causal = fresh and (sliding_window is None or segment.num_rows <= sliding_window)
        attended = scaled_dot_product_attention(
            query[:, :, rows],
            seen_keys,
            seen_values,
            attn_mask=None if causal else paged.prefill_mask(segment, sliding_window, query.dtype),
            is_causal=causal,
            scale=scaling,
            enable_gqa=num_heads != num_kv_heads,
        )
        output[0, rows] = attended[0].transpose(0, 1)
    return output, None


def register_paged_attention() -> None:
    """Register ``ATTENTION_NAME`` with transformers; idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)
