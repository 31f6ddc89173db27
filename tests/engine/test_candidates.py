"""The best token of each row, against torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.engine import candidates

# Few distinct values, so that many are equal; both zeros are.
VALUES = (float("-inf"), -1.5, -0.0, 0.0, 1e-45, 2.5, 3.4e38, float("inf"), float("nan"), -float("nan"))
SIZES = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 1000, 5003)


def first_largest(row: list[float]) -> int:
    """By definition: the first NaN, otherwise the first of the largest."""
    return next((place for place, value in enumerate(row) if math.isnan(value)), row.index(max(row)))


@given(
    rows=st.integers(1, 9),
    size=st.sampled_from(SIZES),
    values=st.lists(st.sampled_from(VALUES), min_size=1, max_size=len(VALUES), unique_by=str),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=300, deadline=None)
def test_the_best_of_equal_infinite_and_undefined_logits_is_the_one_that_torch_takes(
    rows: int, size: int, values: list[float], seed: int
) -> None:
    places = torch.randint(len(values), (rows, size), generator=torch.Generator().manual_seed(seed))
    logits = torch.tensor(values)[places]
    best = candidates.best(logits)
    assert best == logits.argmax(1).tolist() == [first_largest(row) for row in logits.tolist()]


@given(size=st.sampled_from((*SIZES, 32_000, 151_936)), seed=st.integers(0, 1 << 32), data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_special_logit_at_any_place_is_found(size: int, seed: int, data: st.DataObject) -> None:
    logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    place = data.draw(st.integers(0, size - 1))
    logits[1, place] = data.draw(st.sampled_from([50.0, float("inf"), float("nan")]))
    assert candidates.best(logits) == [int(logits[0].argmax()), place]


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), 0.0])
def test_of_a_row_that_is_all_alike_the_first_token_is_best(value: float) -> None:
    assert candidates.best(torch.full((3, 152_000), value)) == [0, 0, 0]


def test_logits_of_bfloat16_as_float32_give_the_same_token() -> None:
    coarse = torch.randn(8, 151_936, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert candidates.best(coarse.float()) == coarse.argmax(1).tolist()


def test_padding_of_minus_infinity_is_never_best() -> None:
    logits = torch.randn(4, 152_064, generator=torch.Generator().manual_seed(5)) - 1000
    logits[:, 151_936:] = float("-inf")
    assert max(candidates.best(logits)) < 151_936
