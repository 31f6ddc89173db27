"""KV that is set aside, and put back into other blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chiasm.engine.request import SamplingParams
from chiasm.engine.sequence import Sequence
from chiasm.engine.set_aside import SetAside
from tests.engine.driver import prompt


def preempted(request_id: str, index: int = 0) -> Sequence:
    """Return a sequence of two full blocks of four tokens, whose KV is to be set aside."""
    return Sequence(
        request_id=request_id,
        index=index,
        arrival=0,
        prompt=prompt(8),
        sampling=SamplingParams(),
        seed=0,
        block_size=4,
        num_remote=8,
    )


@pytest.fixture
def blocks() -> Tensor:
    return torch.arange(4, dtype=torch.uint8)[:, None].repeat(1, 3)


def test_what_was_set_aside_comes_back_into_other_blocks_except_for_those_that_the_prefix_cache_has(
    blocks: Tensor,
) -> None:
    aside, sequence = SetAside(blocks, max_bytes=4 * blocks.shape[1]), preempted("r")
    assert aside.keep(sequence, [1, 2])
    blocks[1:3] = 9
    aside.put_back(sequence, [1, 0, 3], 1)
    assert blocks[:, 0].tolist() == [2, 9, 9, 3]


def test_what_is_set_aside_is_bounded(blocks: Tensor) -> None:
    aside, first = SetAside(blocks, max_bytes=4 * blocks.shape[1]), preempted("a")
    assert aside.keep(first, [0, 1])
    assert aside.keep(preempted("b"), [2, 3])
    assert not aside.keep(preempted("c"), [0, 1])
    aside.put_back(first, [0, 1], 0)
    assert aside.keep(preempted("c"), [0, 1])
    assert not aside.keep(preempted("d"), [0, 1])
    aside.drop("b")
    assert aside.keep(preempted("d"), [0, 1])


def test_choices_of_one_request_take_room_once(blocks: Tensor) -> None:
    aside = SetAside(blocks, max_bytes=4 * blocks.shape[1])
    choices = [preempted("r", index) for index in range(8)]
    assert all(aside.keep(choice, [0, 1]) for choice in choices)
    assert aside.keep(preempted("another"), [2, 3])
    for choice in choices:
        blocks[:2] = 9
        aside.put_back(choice, [0, 1], 0)
        assert blocks[:2, 0].tolist() == [0, 1]
