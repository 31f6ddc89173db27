"""Attention in blocks of rows gives what the definition of attention gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from chiasm.models import dot_product_attention
from chiasm.models.dot_product_attention import FEW_SCORES, attend_in_blocks, is_faster_in_blocks
from chiasm.models.products import HAS_ONEDNN
from tests.models.conftest import HAS_ONEDNN_BFLOAT16, OneDnnProducts

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
AVX2, AVX512 = frozenset({"avx2"}), frozenset({"avx2", "avx512f", "avx512_bf16"})
AMX = AVX512 | {"amx_bf16"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_BLOCK_SCORES": 300, "_FEWEST_ROWS": 3, "_CAUSAL_ROWS": 8}.items():
        monkeypatch.setattr(dot_product_attention, name, value)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 20), (3, 1, 7)])
@pytest.mark.parametrize(("rows", "context"), [(1, 0), (8, 0), (37, 0), (21, 30), (1, 50)])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_causal_attention(
    rows: int, context: int, window: int | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    query, key, value = _states(rows, rows + context, heads, kv_heads, head_dim)
    own = torch.arange(rows)[:, None] + context
    column = torch.arange(rows + context)
    visible = (column <= own) & (column > own - (window or 1000))
    attended = attend_in_blocks(query, key, value, scaling=0.3, is_causal=True, window=window)
    torch.testing.assert_close(attended, _defined(query, key, value, 0.3, visible), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("rows", [1, 30, 53])
def test_attention_to_both_sides(rows: int, heads: int, kv_heads: int) -> None:
    query, key, value = _states(rows, 53, heads, kv_heads, 16)
    visible = torch.ones(rows, 53, dtype=torch.bool)
    attended = attend_in_blocks(query, key, value, scaling=0.3, is_causal=False)
    torch.testing.assert_close(attended, _defined(query, key, value, 0.3, visible), rtol=1e-5, atol=1e-5)
    visible[: rows // 2, 20:] = visible[rows // 2 :, :20] = False
    mask = torch.zeros(rows, 53).masked_fill(~visible, torch.finfo(torch.float32).min)
    attended = attend_in_blocks(query, key, value, scaling=0.3, is_causal=False, mask=mask)
    torch.testing.assert_close(attended, _defined(query, key, value, 0.3, visible), rtol=1e-5, atol=1e-5)


def test_scores_take_bounded_memory() -> None:
    """One block has at most so many scores, unless it has the fewest rows; PyTorch's attention isn't called."""
    query, key, value = _states(40, 60, 4, 2, 16)
    for is_causal in (False, True):
        products = OneDnnProducts()
        with products:
            attend_in_blocks(query, key, value, scaling=0.3, is_causal=is_causal)
        assert 0 < max(products.sizes) <= 3 * 2 * 60


@pytest.mark.skipif(not HAS_ONEDNN_BFLOAT16, reason="oneDNN doesn't compute in bfloat16 on this CPU")
def test_scores_of_bfloat16_are_not_rounded() -> None:
    """Rounded to bfloat16, scores around 200 would be wrong by up to a half, and their exponentials by two fifths."""
    query, key, value = (states.bfloat16() for states in _states(40, 40, 4, 2, 64))
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    attended = attend_in_blocks(query, key, value, scaling=10.0, is_causal=True)
    assert attended.dtype == torch.bfloat16
    expected = _defined(query, key, value, 10.0, visible)
    assert float((query.float() @ key.float().repeat_interleave(2, 1).mT).abs().max()) > 20
    torch.testing.assert_close(attended.float(), expected, rtol=0.02, atol=0.02)


def test_it_is_used_where_onednn_computes_the_products_and_for_many_rows() -> None:
    def is_faster(rows: int, columns: int, *, flags: frozenset[str], dtype: torch.dtype, is_causal: bool) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dot_product_attention, "cpu_flags", lambda: flags)
            query, key, _ = _states(rows, columns, 8, 4, 2)
            return is_faster_in_blocks(query.to(dtype), key.to(dtype), is_causal=is_causal)

    single, half = torch.float32, torch.bfloat16
    for flags, dtype in itertools.product((AVX2, AVX512, AMX), (single, half)):
        expected = flags is AVX512 or (flags is AMX and dtype is single)
        assert is_faster(1000, 1000, flags=flags, dtype=dtype, is_causal=True) == expected, (flags, dtype)
    assert not is_faster(1000, 1000, flags=AVX512, dtype=torch.float16, is_causal=True)
    rows = FEW_SCORES // 2 // 256
    assert not is_faster(rows, 256, flags=AVX512, dtype=single, is_causal=False)
    assert is_faster(rows + 1, 256, flags=AVX512, dtype=single, is_causal=False)
    assert not is_faster(rows + 1, 256, flags=AVX512, dtype=single, is_causal=True)


def _states(rows: int, columns: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, a key and a value. Key and value are views of one tensor, as those in the cache are."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, heads, head_dim, generator=generator)
    key, value = torch.randn(columns, 2 * kv_heads, head_dim, generator=generator).chunk(2, dim=1)
    return query, key, value


def _defined(query: Tensor, key: Tensor, value: Tensor, scaling: float, visible: Tensor) -> Tensor:
    """Return what attention is, computed in float64."""
    group = query.shape[1] // key.shape[1]
    queries, keys, values = (states.double().transpose(0, 1) for states in (query, key, value))
    scores = queries @ keys.repeat_interleave(group, 0).mT * scaling
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (probabilities @ values.repeat_interleave(group, 0)).transpose(0, 1).float()
