"""The KV cache, and attention over it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from chiasm.engine.attention import (
    FREE_SLOTS,
    MOST_PADDING,
    MOST_SLOTS,
    AttentionStep,
    KVCache,
    PrefillSegment,
    decode_groups,
    group_by_length,
    zeroed,
)
from chiasm.models import dot_product_attention
from chiasm.models.products import HAS_ONEDNN

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def test_memory_that_nobody_has_used_takes_none_of_the_machine() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    memory = zeroed(512 << 20, torch.device("cpu"))
    assert not memory[:: 1 << 20].any()
    memory[-1] = 7
    assert memory[-1] == 7
    assert process.memory_info().rss < before + (64 << 20)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=64), st.sampled_from([500, 4096, MOST_SLOTS]))
def test_what_is_gathered_at_a_time_is_bounded_whatever_the_lengths(lengths: list[int], most_slots: int) -> None:
    lengths.sort(reverse=True)
    sizes = group_by_length(lengths, most_slots)
    assert sum(sizes) == len(lengths)
    ends = list(itertools.accumulate(sizes))
    for size, end in zip(sizes, ends, strict=True):
        members = lengths[end - size : end]
        gathered = size * members[0]
        assert gathered <= max(FREE_SLOTS, MOST_PADDING * sum(members))
        assert size == 1 or gathered <= most_slots


def test_equal_lengths_and_few_slots_are_one_group() -> None:
    assert group_by_length([100] * 64, MOST_SLOTS) == [64]
    assert group_by_length([300, 20, 3, 1], MOST_SLOTS) == [4]
    assert group_by_length([1000] * 100, MOST_SLOTS) == [65, 35]


@pytest.mark.parametrize(("device", "most_bytes"), [("cpu", 8 << 20), ("meta", MOST_SLOTS * 2 * 4 * 128 * 4)])
def test_a_cpu_gathers_what_fits_its_caches(device: str, most_bytes: int) -> None:
    language: Any = SimpleNamespace(
        num_layers=1, num_kv_heads=4, head_dim=128, dtype=torch.float32, device=torch.device(device)
    )
    cache = KVCache(language, num_blocks=1, block_size=16, allocate=lambda size: torch.zeros(size, dtype=torch.uint8))
    assert cache.most_slots * 2 * 4 * 128 * 4 == most_bytes


def test_one_long_request_beside_many_short_ones_gathers_little_more_than_each_needs() -> None:
    lengths = [32_768, *[64] * 63]
    step, query, _ = _decode_step(lengths, num_blocks=2400)
    sizes = _Gathered()
    with sizes:
        _attend(step, query)
    assert sizes.slots <= MOST_PADDING * sum(lengths)


def test_rows_of_different_lengths_get_what_each_gets_alone() -> None:
    lengths = [3000, 2900, 700, 40, 39, 1]
    step, query, slots = _decode_step(lengths, num_blocks=500)
    assert [group.size for group in step.decodes] == [4, 2]
    together = _attend(step, query)
    for row, seen in enumerate(slots):
        alone = AttentionStep(step.cache, torch.zeros(0, dtype=torch.int64), [], decode_groups([seen], CPU, MOST_SLOTS))
        torch.testing.assert_close(together[row : row + 1], _attend(alone, query[row : row + 1]))


@pytest.mark.parametrize("window", [5, 100])
def test_a_window_hides_all_but_the_last_tokens(window: int) -> None:
    step, query, slots = _decode_step([60, 30], num_blocks=20)
    together = _attend(step, query, window=window)
    for row, seen in enumerate(slots):
        last = AttentionStep(
            step.cache, torch.zeros(0, dtype=torch.int64), [], decode_groups([seen[-window:]], CPU, MOST_SLOTS)
        )
        torch.testing.assert_close(together[row : row + 1], _attend(last, query[row : row + 1]))


@pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("window", [None, 7])
def test_a_prompt_is_attended_to_alike_in_blocks_and_by_pytorch(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a chunk without context, of one with context, and of a request that decodes, in one step."""
    lengths, contexts = [50, 90], [0, 40]
    step, query, slots = _decode_step([30], num_blocks=40)
    free = np.arange(40, dtype=np.int64)[5:, None] * step.cache.slots_per_block + np.arange(16)
    generator = torch.Generator().manual_seed(1)
    queries = torch.cat([query, torch.randn(100, HEADS, HEAD_DIM, generator=generator)])
    fresh = torch.randn(101, 2 * KV_HEADS, HEAD_DIM, generator=generator)
    segments, written, row, first = [], [slots[0][-1:]], 1, 0
    for length, context in zip(lengths, contexts, strict=True):
        seen = free[first:].reshape(-1)[:length]
        rows = length - context
        segments.append(PrefillSegment(row, row + rows, torch.from_numpy(seen)))
        written.append(seen[context:])
        row += rows
        first += -(-length // 16)
    both = AttentionStep(step.cache, torch.from_numpy(np.concatenate(written)), segments, step.decodes)
    attended = {}
    monkeypatch.setattr(dot_product_attention, "FEW_SCORES", 0)
    for flags in ("avx2", "avx512f"):
        monkeypatch.setattr(dot_product_attention, "cpu_flags", lambda flags=flags: frozenset({flags}))
        sizes = _Gathered()
        with sizes:
            attended[flags] = both.attend(0, queries, fresh, scaling=HEAD_DIM**-0.5, window=window)
        assert sizes.by_pytorch == (3 if flags == "avx2" else 1)
    torch.testing.assert_close(attended["avx512f"], attended["avx2"], rtol=1e-5, atol=1e-5)


def _decode_step(lengths: list[int], *, num_blocks: int) -> tuple[AttentionStep, torch.Tensor, list[Any]]:
    """Return a step that decodes requests of these lengths over random keys and values, its queries, and their slots."""
    language: Any = SimpleNamespace(
        num_layers=1, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.float32, device=CPU
    )
    cache = KVCache(language, num_blocks=num_blocks, block_size=16)
    generator = torch.Generator().manual_seed(0)
    cache.blocks.view(torch.float32).normal_(generator=generator)
    starts = np.arange(num_blocks, dtype=np.int64) * cache.slots_per_block
    free = (starts[:, None] + np.arange(16)).reshape(-1)
    slots = []
    for length in lengths:
        slots.append(free[:length])
        free = free[-(-length // 16) * 16 :]
    query = torch.randn(len(lengths), HEADS, HEAD_DIM, generator=generator)
    groups = decode_groups(slots, CPU, cache.most_slots)
    return AttentionStep(cache, torch.zeros(0, dtype=torch.int64), [], groups), query, slots


def _attend(step: AttentionStep, query: torch.Tensor, window: int | None = None) -> torch.Tensor:
    nothing = torch.empty(0, 2 * KV_HEADS, HEAD_DIM)
    return step.attend(0, query, nothing, scaling=HEAD_DIM**-0.5, window=window)


class _Gathered(TorchFunctionMode):
    """Counts the slots that are gathered from the cache, and PyTorch's attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = self.by_pytorch = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.index_select:
            self.slots += len(args[2])
        self.by_pytorch += function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))
