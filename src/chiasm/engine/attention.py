"""Attention over a paged KV cache.

The model calls it in every layer with the rows of the whole step, all requests flattened into one sequence: first one row for
each decoding request, then the chunk of each prefilling one.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from chiasm.errors import ConfigurationError
from chiasm.models.dot_product_attention import attend_in_blocks, is_faster_in_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from chiasm.models.base import LanguageModel

MOST_PADDING = 2
"""Decoding rows that are gathered together have at most this many times as many slots as they need."""
FREE_SLOTS = 2048
"""So few slots are gathered together, padded or not: another operator takes longer than they do."""
MOST_SLOTS = 1 << 16
"""Maximum slots that several decoding rows gather at a time, in each layer. One row gathers all of its own."""
_MOST_CPU_BYTES = 8 << 20
"""The same on a CPU, in bytes. More leaves its caches and takes up to twice as long; glibc maps buffers over 32 MB anew."""


class KVCache:
    """Keys and values of all layers, in ``num_blocks`` blocks of ``block_size`` token slots.

    A block is one piece of memory, ``[num_layers, block_size, 2, num_kv_heads, head_dim]``, so that moving a block moves one
    piece, and the key and the value of a token are written and read together. ``layers[layer]`` is
    ``[slots, 2 * num_kv_heads, head_dim]``, keys before values, a view that begins where that layer's part of block 0 begins;
    in each of them token ``i`` of a request is at slot ``block_ids[i // block_size] * slots_per_block + i % block_size``.
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
        self.slots_per_block = language.num_layers * block_size
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
        self.most_slots = MOST_SLOTS
        """Maximum slots that several decoding rows gather at a time."""
        if language.device.type == "cpu":
            self.most_slots = min(MOST_SLOTS, _MOST_CPU_BYTES // _bytes_per_slot(language))
        slots = memory.view(language.dtype).view(-1, 2 * language.num_kv_heads, language.head_dim)
        self.layers = [slots[layer * block_size :] for layer in range(language.num_layers)]

    @staticmethod
    def bytes_per_block(language: LanguageModel, block_size: int) -> int:
        """Return the size of one block: keys and values of all layers."""
        return language.num_layers * block_size * _bytes_per_slot(language)


def _bytes_per_slot(language: LanguageModel) -> int:
    """Return the size of the key and the value of a token in one layer."""
    return 2 * language.num_kv_heads * language.head_dim * language.dtype.itemsize


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


@dataclass(frozen=True)
class DecodeGroup:
    """Decoding requests of similar length, which are computed together: rows ``[start, start + size)`` of the step."""

    start: int
    size: int
    longest: int
    slots: Tensor
    """int64 ``[size * longest]``: the slots that each request attends to, its own included, padded with 0."""
    lengths: Tensor
    """int64 ``[size]``: how many of them are not padding."""
    is_even: bool
    """Whether nothing is padding."""


def group_by_length(lengths: Sequence[int], most_slots: int) -> list[int]:
    """Return the sizes of groups of decoding requests, whose ``lengths`` descend.

    A group of B requests gathers B times the slots of its first. That is at most ``MOST_PADDING`` times what its requests
    need, or ``FREE_SLOTS``, and at most ``most_slots`` unless it is a single request. So a long request beside many short
    ones costs no more than both cost alone.
    """
    sizes: list[int] = []
    longest = needed = 0
    for length in lengths:
        size = sizes[-1] + 1 if sizes else 1
        gathered = size * longest
        if sizes and gathered <= min(most_slots, max(FREE_SLOTS, MOST_PADDING * (needed + length))):
            sizes[-1] = size
            needed += length
        else:
            sizes.append(1)
            longest = needed = length
    return sizes


def decode_groups(slots: Sequence[NDArray[np.int64]], device: torch.device, most_slots: int) -> list[DecodeGroup]:
    """Return the groups of decoding requests, whose ``slots`` descend in number; their rows begin with 0.

    Several requests gather at most ``most_slots`` at a time.
    """
    groups: list[DecodeGroup] = []
    start = 0
    for size in group_by_length([len(one) for one in slots], most_slots):
        members = slots[start : start + size]
        longest = len(members[0])
        table = np.zeros((size, longest), dtype=np.int64)
        for row, member in zip(table, members, strict=True):
            row[: len(member)] = member
        lengths = np.array([len(member) for member in members], dtype=np.int64)
        groups.append(
            DecodeGroup(
                start,
                size,
                longest,
                torch.from_numpy(table.reshape(-1)).to(device),
                torch.from_numpy(lengths).to(device),
                len(members[-1]) == longest,
            )
        )
        start += size
    return groups


@dataclass
class AttentionStep:
    """What attention needs to know about one step: the rows of all groups of decodes, then the prefill segments in order."""

    cache: KVCache
    slots: Tensor
    """int64 [T]: the slot for each row's key and value."""
    prefills: Sequence[PrefillSegment]
    decodes: Sequence[DecodeGroup] = ()
    _masks: dict[object, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, fresh: Tensor, *, scaling: float, window: int | None) -> Tensor:
        """Write the step's keys and values to the cache, and attend to it."""
        cached = self.cache.layers[layer]
        cached.index_copy_(0, self.slots, fresh)
        attended = [self._decode(group, query, cached, scaling, window) for group in self.decodes]
        attended += [self._prefill(segment, query, fresh, cached, scaling, window) for segment in self.prefills]
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def _decode(self, group: DecodeGroup, query: Tensor, cached: Tensor, scaling: float, window: int | None) -> Tensor:
        _, heads, head_dim = cached.shape
        seen = cached.index_select(0, group.slots).view(group.size, group.longest, heads, head_dim).transpose(1, 2)
        key, value = torch.split_with_sizes(seen, (heads // 2, heads // 2), 1)
        # Query heads that share a KV head are rows of one small attention, so the cache is never repeated.
        rows = query if group.size == len(query) else query[group.start : group.start + group.size]
        attended = scaled_dot_product_attention(
            rows.reshape(group.size, heads // 2, -1, head_dim),
            key,
            value,
            attn_mask=None if group.is_even and window is None else self._decode_mask(group, window, query.dtype),
            scale=scaling,
        )
        return attended.reshape(group.size, -1)

    def _prefill(
        self,
        segment: PrefillSegment,
        query: Tensor,
        fresh: Tensor,
        cached: Tensor,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        rows = query[segment.start : segment.end]
        seen = fresh[segment.start : segment.end] if segment.num_context == 0 else cached.index_select(0, segment.slots)
        key, value = seen.chunk(2, dim=1)
        if is_faster_in_blocks(rows, key, is_causal=True):
            attended = attend_in_blocks(rows, key, value, scaling=scaling, is_causal=True, window=window)
            return attended.view(segment.num_rows, -1)
        causal = segment.num_context == 0 and (window is None or segment.num_rows <= window)
        attended = scaled_dot_product_attention(
            rows.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=None if causal else self._prefill_mask(segment, window, query.dtype),
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended[0].transpose(0, 1).reshape(segment.num_rows, -1)

    def _decode_mask(self, group: DecodeGroup, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask ``[B, 1, 1, longest]``, made once per step, group and window."""
        key = ("decode", group.start, window)
        if key not in self._masks:
            index = torch.arange(group.longest, device=group.slots.device)
            length = group.lengths[:, None]
            visible = index < length
            if window is not None:
                visible &= index >= length - window
            self._masks[key] = _additive(visible, dtype)[:, None, None, :]
        return self._masks[key]

    def _prefill_mask(self, segment: PrefillSegment, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive causal mask ``[rows, context + rows]``, made once per step, segment and window."""
        key = ("prefill", segment.start, window)
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
